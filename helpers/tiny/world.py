"""The synthetic world: scenes of one to four plain things, their names, and how they are drawn.

A scene is exact data, so its picture, its description and every question about it have a known truth.
Sizes and positions are in pixels of a 128x128 picture; a picture of another size shows the same scene scaled.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np
import torch
from PIL import Image

SIDE = 128
SHAPES = ("circle", "square", "triangle", "star", "cross")
COLORS = {
    "red": (215, 25, 40),
    "orange": (255, 135, 10),
    "yellow": (255, 230, 40),
    "green": (25, 150, 50),
    "cyan": (0, 195, 225),
    "blue": (35, 65, 225),
    "purple": (150, 40, 190),
    "black": (15, 15, 20),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "gray": (150, 150, 150),
    "beige": (240, 222, 175),
    "mint": (165, 225, 190),
}
BACKGROUND_NAMES = tuple(BACKGROUNDS)
SIZES = ("small", "large")
SCALES = {"small": 0.7, "large": 1.0}  # times the outlines in `distances`, which are large
JITTER = {"small": 2, "large": 1}  # whole pixels; a large thing at +-1 still stays inside its own cell
PLACES = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
CENTERS = (21, 64, 107)  # of the three columns and rows
MOST_THINGS = 4
HELD_OUT_PAIRS = (("orange", "star"), ("cyan", "square"), ("purple", "triangle"), ("yellow", "cross"))

PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
TRAINED_PAIRS = tuple(pair for pair in PAIRS if pair not in HELD_OUT_PAIRS)
SPLITS = ("train", "test", "pairs")
TABLE_COLUMNS = 10  # scale (0 = nothing here), shape, x, y, three colour and three background values
WINDOW = 46  # pixels of a square that holds any outline


@dataclass(frozen=True)
class Thing:
    """One object: names for its looks, its place in the 3x3 grid, and a jitter (dx, dy) in whole pixels."""

    shape: str
    color: str
    size: str
    place: str
    dx: int = 0
    dy: int = 0

    @property
    def center(self) -> tuple[int, int]:
        """(x, y) in pixels of a 128x128 picture, measured from the top left corner."""
        row, column = divmod(PLACES.index(self.place), 3)
        return CENTERS[column] + self.dx, CENTERS[row] + self.dy


@dataclass(frozen=True)
class Scene:
    """A picture's whole truth: one to four things in reading order, one per place, on a plain background."""

    things: tuple[Thing, ...]
    background: str


def make_scene(things: Sequence[Thing], background: str) -> Scene:
    """A scene with its things in reading order. Raises ValueError for none, five, or two at one place."""
    places = {thing.place for thing in things}
    if not 1 <= len(things) <= MOST_THINGS or len(places) < len(things):
        raise ValueError(
            f"A scene holds 1 to {MOST_THINGS} things, each at its own place; got {len(things)} things at "
            f"{len(places)} places. Leave some out or move them."
        )
    return Scene(tuple(sorted(things, key=lambda thing: PLACES.index(thing.place))), background)


def row_and_column(place: str) -> tuple[int, int]:
    """Row and column (0 to 2, from the top left) of one of the nine place names."""
    return divmod(PLACES.index(place), 3)


def pick(rng: Random, items: Sequence):
    """One item, uniformly. Much faster than `rng.choice`, which training would feel."""
    return items[int(rng.random() * len(items))]


@cache
def fitting_pairs(color: str | None, shape: str | None) -> tuple[tuple[str, str], ...]:
    """The (colour, shape) pairs that training draws with this colour and this shape (None: any)."""
    return tuple(pair for pair in TRAINED_PAIRS if color in (None, pair[0]) and shape in (None, pair[1]))


def random_thing(
    rng: Random, place: str, color: str | None = None, shape: str | None = None, size: str | None = None
) -> Thing:
    """A thing at `place`, all that is None drawn uniformly; only a wholly given pair can be held out."""
    if color is None or shape is None:
        color, shape = pick(rng, fitting_pairs(color, shape))
    size = size or pick(rng, SIZES)
    span = JITTER[size]
    width = 2 * span + 1
    return Thing(shape, color, size, place, int(rng.random() * width) - span, int(rng.random() * width) - span)


def random_places(rng: Random, count: int) -> list[str]:
    """`count` different places, every choice and order equally likely."""
    places = list(PLACES)
    for i in range(count):
        j = i + int(rng.random() * (9 - i))
        places[i], places[j] = places[j], places[i]
    return places[:count]


def random_scene(rng: Random, count: int | None = None, split: str = "train") -> Scene:
    """A scene of `count` things (None: 1 to 4, equally likely) that belongs to `split`.

    "train" and "test" scenes are disjoint and hold no held-out pair; "pairs" scenes hold at least one.
    """
    while True:
        places = random_places(rng, count or 1 + int(rng.random() * MOST_THINGS))
        things = [random_thing(rng, place) for place in places]
        if split == "pairs":
            things[0] = random_thing(rng, places[0], *pick(rng, HELD_OUT_PAIRS))
        scene = make_scene(things, pick(rng, BACKGROUND_NAMES))
        if belongs(scene, split):
            return scene


def held_out(things: Sequence) -> bool:
    """Whether one of the things (true or seen) has a colour-shape pair that training never draws."""
    return any((thing.color, thing.shape) in HELD_OUT_PAIRS for thing in things)


def in_test(content: str) -> bool:
    """Whether a text is of the eighth that training never sees, by a hash that is equal on every machine."""
    return zlib.crc32(content.encode()) % 8 == 0


def belongs(scene: Scene, split: str) -> bool:
    """Whether a scene is one of `split`'s ("train", "test" or "pairs"); jitter makes no new scene."""
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; choose one of {', '.join(SPLITS)}.")
    if held_out(scene.things):
        return split == "pairs"
    words = [f"{thing.size} {thing.color} {thing.shape} {thing.place}" for thing in scene.things]
    return split == ("test" if in_test(f"{words} {scene.background}") else "train")


# Drawing


def scene_table(scenes: Sequence[Scene]) -> np.ndarray:
    """Scenes as numbers, float32 [scenes, 4, 10]: small enough to be made by workers and sent to a GPU."""
    table = np.zeros((len(scenes), MOST_THINGS, TABLE_COLUMNS), np.float32)
    for rows, scene in zip(table, scenes, strict=True):
        rows[:, 7:] = BACKGROUNDS[scene.background]
        for row, thing in zip(rows, scene.things, strict=False):
            row[:4] = SCALES[thing.size], SHAPES.index(thing.shape), *thing.center
            row[4:7] = COLORS[thing.color]
    table[..., 4:] = table[..., 4:] / 127.5 - 1
    return table


def distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Signed distance in pixels to each large shape's outline (negative inside): [5, *x.shape].

    `x` and `y` are pixels from the middle of the shape's box; outside near corners distances are too short,
    which antialiasing over one pixel does not notice.
    """
    ax, ay = x.abs(), y.abs()
    circle = torch.hypot(x, y) - 19
    square = torch.maximum(ax, ay) - 17
    triangle = torch.maximum(y - 18.5, (ax * 37 - (y + 18.5) * 19) / math.hypot(37, 19))  # 38 wide, 37 high
    cross = torch.minimum(torch.maximum(ax - 19, ay - 7.5), torch.maximum(ax - 7.5, ay - 19))
    return torch.stack([circle, square, triangle, _star(x, y - 2), cross])


def _star(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Signed distance to a fat five-pointed star around the origin (tips at 20 pixels, notches at 11)."""
    wedge = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    angle = (angle - wedge * torch.round(angle / wedge)).abs()  # all ten half points folded onto one
    radius = torch.hypot(x, y)
    notch_x, notch_y = 11 * math.cos(wedge / 2), 11 * math.sin(wedge / 2)
    length = math.hypot(20 - notch_x, notch_y)
    return ((radius * angle.cos() - 20) * notch_y + radius * angle.sin() * (20 - notch_x)) / length


def draw_table(table: torch.Tensor, size: int = SIDE) -> torch.Tensor:
    """Draw a table on its device: float32 [scenes, 3, size, size] in [-1, 1], antialiased."""
    unit = size / SIDE
    window = math.ceil(WINDOW * unit)
    canvas = table[:, 0, 7:, None].repeat(1, 1, size * size)  # [scenes, 3, pixels]
    offsets = torch.arange(window, device=table.device)
    for thing in table.unbind(1):
        first = (thing[:, 2:4] * unit - window / 2).round().long().clamp(0, size - window)
        columns, rows = (first[:, i, None] + offsets for i in (0, 1))  # [scenes, window]
        scale = thing[:, 0].clamp(min=0.1) * unit
        x = ((columns + 0.5 - thing[:, 2:3] * unit) / scale[:, None])[:, None, :]
        y = ((rows + 0.5 - thing[:, 3:4] * unit) / scale[:, None])[:, :, None]
        x, y = torch.broadcast_tensors(x, y)
        which = thing[:, 1].long()[None, :, None, None].expand(1, *x.shape)
        distance = distances(x, y).gather(0, which)[0] * scale[:, None, None]
        cover = (0.5 - distance).clamp(0, 1) * (thing[:, 0] > 0)[:, None, None]
        where = (rows[:, :, None] * size + columns[:, None, :]).flatten(1)[:, None].expand(-1, 3, -1)
        below = canvas.gather(2, where)
        canvas.scatter_(2, where, torch.lerp(below, thing[:, 4:7, None], cover.flatten(1)[:, None]))
    return canvas.view(len(table), 3, size, size)


def draw(scenes: Sequence[Scene], device: str | torch.device = "cpu", size: int = SIDE) -> torch.Tensor:
    """Pictures of scenes, float32 [scenes, 3, size, size] in [-1, 1]."""
    return draw_table(torch.from_numpy(scene_table(scenes)).to(device), size)


def to_picture(picture: torch.Tensor) -> Image.Image:
    """A [3, height, width] tensor in [-1, 1] as an RGB picture, rounded to the nearest of 256 levels."""
    levels = (picture.detach().float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())
