"""Clips of one or two bouncing balls, 64x64: exact paths, texts, how they are drawn and read back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from .reader import to_pixels
from .wording import article
from .world import BACKGROUND_NAMES, BACKGROUNDS, COLORS, PLACES, in_test, pick, row_and_column

SIDE = 64
RADIUS = 8
LOW, HIGH = float(RADIUS), float(SIDE - RADIUS)  # where a ball's centre can be
SLOWEST, FASTEST = 0.02 * SIDE, 4.0  # pixels per frame
APART = 2 * RADIUS + 2  # least distance of two centres in any frame: the balls never touch
STARTS = (11, 32, 53)  # centres of the three columns and rows, where prompted clips begin
SPEEDS = {"slowly": 1.6, "fast": 3.2}
DIRECTIONS = {
    "right": (1, 0), "down right": (1, 1), "down": (0, 1), "down left": (-1, 1),
    "left": (-1, 0), "up left": (-1, -1), "up": (0, -1), "up right": (1, -1),
}  # fmt: skip
COLOR_NAMES = tuple(COLORS)
NEXT_FRAME = "the next frame"  # the instruction before each predicted frame of an unprompted clip
BALL_COLUMNS = 11  # present, x, y, vx, vy, three colour and three background values
LEAST_PART = 0.5  # of a ball's area: smaller pieces of one colour are no ball


@dataclass(frozen=True)
class Ball:
    """A ball of radius 8: colour, centre (x, y) in pixels and velocity in pixels per frame at frame 0."""

    color: str
    x: float
    y: float
    vx: float
    vy: float


@dataclass(frozen=True)
class Clip:
    """One or two balls of different colours that never touch, on a plain background, for `frames` frames."""

    balls: tuple[Ball, ...]
    background: str
    frames: int


def fold(path: torch.Tensor) -> torch.Tensor:
    """Straight paths folded at the walls: what a ball that bounces without loss does."""
    span = HIGH - LOW
    return HIGH - ((path - LOW).remainder(2 * span) - span).abs()


def positions(clip: Clip) -> np.ndarray:
    """The true centres (x, y) in pixels, float32 [frames, balls, 2]."""
    balls = torch.tensor([(b.x, b.y, b.vx, b.vy) for b in clip.balls], dtype=torch.float64)
    time = torch.arange(clip.frames, dtype=torch.float64)[:, None, None]
    return fold(balls[:, :2] + time * balls[:, 2:]).float().numpy()


def random_clip(rng: Random, frames: int = 13, split: str = "train", prompted: bool = False) -> Clip:
    """A clip of one or two balls that belongs to `split` ("train" or "test", which are disjoint).

    A prompted clip starts at a place's centre in one of eight directions at one of two speeds, so that
    `clip_prompt` says all about it. Any other starts anywhere, at 1.28 to 4 pixels per frame.
    """
    if split not in ("train", "test"):
        raise ValueError(f"Unknown split {split!r} for clips; choose train or test.")
    while True:
        color = pick(rng, COLOR_NAMES)
        colors = [color]
        if rng.random() < 0.5:
            colors.append(pick(rng, [name for name in COLOR_NAMES if name != color]))
        make = _worded_ball if prompted else _free_ball
        clip = Clip(tuple(make(rng, color) for color in colors), pick(rng, BACKGROUND_NAMES), frames)
        if not touching(clip) and split == ("test" if in_test(clip_prompt(clip)) else "train"):
            return clip


def _worded_ball(rng: Random, color: str) -> Ball:
    row, column = row_and_column(pick(rng, PLACES))
    dx, dy = pick(rng, tuple(DIRECTIONS.values()))
    step = pick(rng, tuple(SPEEDS.values())) / math.hypot(dx, dy)
    return Ball(color, STARTS[column], STARTS[row], dx * step, dy * step)


def _free_ball(rng: Random, color: str) -> Ball:
    x, y = (LOW + (HIGH - LOW) * rng.random() for _ in range(2))
    angle, speed = 2 * math.pi * rng.random(), SLOWEST + (FASTEST - SLOWEST) * rng.random()
    return Ball(color, x, y, speed * math.cos(angle), speed * math.sin(angle))


def touching(clip: Clip) -> bool:
    """Whether two balls come nearer than 18 pixels from centre to centre in any frame."""
    if len(clip.balls) < 2:
        return False
    path = positions(clip)
    return bool(np.linalg.norm(path[:, 0] - path[:, 1], axis=1).min() < APART)


def clip_prompt(clip: Clip) -> str:
    """The clip in words, from where it starts: exact for a prompted clip, rounded to words for any other."""
    balls = []
    for ball in clip.balls:
        row, column = (min(range(3), key=lambda i: abs(STARTS[i] - value)) for value in (ball.y, ball.x))
        angle = math.atan2(ball.vy, ball.vx)
        direction = tuple(DIRECTIONS)[round(angle / (math.pi / 4)) % 8]
        speed = min(SPEEDS, key=lambda word: abs(SPEEDS[word] - math.hypot(ball.vx, ball.vy)))
        start = PLACES[3 * row + column]
        name = article(f"{ball.color} ball")
        balls.append(f"{name} starts at the {start} and moves {direction} {speed}")
    return f"{', '.join(balls)}, on a {clip.background} background"


def test_clips(count: int, seed: int, frames: int = 13, prompted: bool = False) -> list[Clip]:
    """`count` clips that training never sees, the same for the same seed."""
    rng = Random(f"clips {prompted} {seed}")
    return [random_clip(rng, frames, "test", prompted) for _ in range(count)]


# Drawing


def clip_table(clips: Sequence[Clip]) -> np.ndarray:
    """Clips as numbers for `draw_clip_table`, float32 [clips, 2, 11]: small enough for workers to send."""
    table = np.zeros((len(clips), 2, BALL_COLUMNS), np.float32)
    for rows, clip in zip(table, clips, strict=True):
        rows[:, 8:] = np.array(BACKGROUNDS[clip.background]) / 127.5 - 1
        for row, ball in zip(rows, clip.balls, strict=False):
            row[:5] = 1, ball.x, ball.y, ball.vx, ball.vy
            row[5:8] = np.array(COLORS[ball.color]) / 127.5 - 1
    return table


def draw_clip_table(table: torch.Tensor, frames: int) -> torch.Tensor:
    """Draw `clip_table`'s numbers on the table's device: float32 [clips, frames, 3, 64, 64] in [-1, 1]."""
    time = torch.arange(frames, device=table.device)[None, :, None]
    pixel = torch.arange(SIDE, device=table.device) + 0.5
    pictures = table[:, :1, 8:, None, None].expand(-1, frames, -1, SIDE, SIDE)
    for ball in table.unbind(1):
        center = fold(ball[:, None, 1:3] + time * ball[:, None, 3:5])  # [clips, frames, 2]
        x, y = (pixel - center[..., i, None] for i in (0, 1))  # [clips, frames, 64]
        distance = torch.hypot(x[..., None, :], y[..., :, None]) - RADIUS
        cover = (0.5 - distance).clamp(0, 1) * ball[:, :1, None, None]
        pictures = torch.lerp(pictures, ball[:, None, 5:8, None, None], cover[:, :, None])
    return pictures


def draw_clips(clips: Sequence[Clip], device: str | torch.device = "cpu") -> torch.Tensor:
    """Frames of clips, float32 [clips, frames, 3, 64, 64] in [-1, 1]. Raises ValueError if lengths differ."""
    lengths = {clip.frames for clip in clips}
    if len(lengths) != 1:
        raise ValueError(f"Clips drawn together need one length; these have {sorted(lengths)} frames. Draw them apart.")
    return draw_clip_table(torch.from_numpy(clip_table(clips)).to(device), lengths.pop())


# Reading and predicting


def read_balls(picture: Image.Image | torch.Tensor) -> list[tuple[str, float, float]]:
    """The balls in a frame: (colour, x, y) in pixels of a 64x64 frame, at most one of each colour.

    A centre is the mean of the ball's pixels, each weighted by how far it is from background to ball.
    """
    pixels = to_pixels(picture, SIDE)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    palette = np.array([*COLORS.values(), background])
    kinds = np.square(pixels[:, :, None] - palette).sum(3).argmin(2)
    found = []
    for i, color in enumerate(COLORS):
        labels, count = ndimage.label(kinds == i)
        areas = np.bincount(labels.ravel(), minlength=2)[1:]
        if count and areas.max() >= LEAST_PART * math.pi * RADIUS**2:
            found.append((color, *_center(pixels, background, labels == areas.argmax() + 1)))
    return found


def _center(pixels: np.ndarray, background: np.ndarray, ball: np.ndarray) -> tuple[float, float]:
    """Centre (x, y) of one ball's pixels [64, 64] and the rim where it mixes with the background."""
    near = ndimage.binary_dilation(ball, iterations=2)
    toward = np.median(pixels[ball], axis=0) - background
    weights = np.clip((pixels[near] - background) @ toward / (toward @ toward), 0, 1)
    y, x = (np.nonzero(near)[axis] + 0.5 for axis in (0, 1))
    return float(x @ weights / weights.sum()), float(y @ weights / weights.sum())


def straight_line(first: np.ndarray, count: int) -> np.ndarray:
    """`count` further positions at the last velocity in `first` [frames, balls, 2], blind to walls."""
    steps = np.arange(1, count + 1)[:, None, None]
    return first[-1] + steps * (first[-1] - first[-2])


def copy_last(first: np.ndarray, count: int) -> np.ndarray:
    """`count` further positions equal to the last of `first` [frames, balls, 2]."""
    return np.repeat(first[-1:], count, axis=0)


def ball_errors(clip: Clip, pictures: Sequence[Image.Image | torch.Tensor], start: int) -> np.ndarray:
    """Pixels from each ball to its true centre, float [pictures, balls]; the first picture is frame `start`.

    A ball whose colour is not found counts as a whole side (64 pixels) away.
    """
    truth = positions(clip)[start : start + len(pictures)]
    errors = np.full(truth.shape[:2], float(SIDE))
    for row, centers, picture in zip(errors, truth, pictures, strict=True):
        seen = {color: (x, y) for color, x, y in read_balls(picture)}
        for i, ball in enumerate(clip.balls):
            if ball.color in seen:
                row[i] = math.dist(seen[ball.color], centers[i])
    return errors
