"""Reads a picture of the synthetic world back into objects: drawn, decoded or generated.

The reader is the judge of generated pictures, so it would rather reject a doubtful object than guess: an
object counts only when one of the ten outlines covers it well, no other shape covers it nearly as well, its
edge is no blur, and it has one colour.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from .world import BACKGROUNDS, CENTERS, COLORS, PLACES, SCALES, SHAPES, SIDE, SIZES, distances

CONTRAST = 50  # RGB distance from the background that makes a pixel foreground; the nearest colour is at 117
SPECK = 12  # pixels: smaller blobs are noise, neither read nor rejected
OVERLAP = 0.84  # least soft intersection over union with the best outline
STEEP = 2.0  # cover is steepened around one half before that, so that a slightly soft edge costs nothing
SOFTEST = 2.0  # pixels: largest standard deviation of the blur that an object's edge may show
MARGIN = 0.065  # by which the best outline must beat that of any other shape
TINT = 60  # largest RGB distance from a palette colour at which it is still that colour
STRAY = 45  # RGB distance of a pixel from every mixture of background and object colour that makes it foreign
PURITY = 0.94  # least part of an object's pixels that are not foreign
RIM = 2  # pixels from the edge where colours of object and background mix
BOX = 56  # pixels of the square in which objects and outlines are compared
STEPS = 4  # outlines are kept at every quarter of a pixel


@dataclass(frozen=True)
class Seen:
    """One recognised object: names as in `Thing`, centre in pixels of a 128x128 picture, overlap 0 to 1."""

    shape: str
    color: str
    size: str
    place: str
    x: float
    y: float
    score: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows.

    `background` is a name of `BACKGROUNDS` or "unknown"; `things` are in reading order; `rejected` counts the
    blobs that are no acceptable object.
    """

    background: str
    things: tuple[Seen, ...]
    rejected: int


@dataclass(frozen=True)
class Blob:
    """A connected piece of foreground.

    `cover` [height, width] says in 0 to 1 how far each pixel is from the background to `color`, the RGB
    median of the inside; it starts at (top, left) in the picture. `purity` is the part of pixels not foreign.
    """

    cover: np.ndarray
    top: int
    left: int
    color: np.ndarray
    purity: float


def read(picture: Image.Image | torch.Tensor) -> Reading:
    """Read a PIL picture or a tensor [3, height, width] in [-1, 1]; it is scaled to 128x128 first."""
    pixels = to_pixels(picture, SIDE)
    background = np.median(pixels[::2, ::2].reshape(-1, 3), axis=0)
    labels, _ = ndimage.label(np.square(pixels - background).sum(2) > CONTRAST**2)
    things, rejected = [], 0
    for index, box in enumerate(ndimage.find_objects(labels), 1):
        if np.count_nonzero(labels[box] == index) < SPECK:
            continue
        seen = _recognise(_cut_out(pixels, background, labels, index, box))
        if seen:
            things.append(seen)
        else:
            rejected += 1
    things.sort(key=lambda seen: (PLACES.index(seen.place), seen.x))
    return Reading(nearest(background, BACKGROUNDS) or "unknown", tuple(things), rejected)


def read_batch(pictures: Iterable[Image.Image | torch.Tensor]) -> list[Reading]:
    """Read several pictures, in order; a tensor [count, 3, height, width] will do."""
    return [read(picture) for picture in pictures]


def to_pixels(picture: Image.Image | torch.Tensor, side: int) -> np.ndarray:
    """RGB levels, float32 [side, side, 3] in 0 to 255, of a picture as `read` takes it."""
    if isinstance(picture, torch.Tensor):
        if picture.ndim != 3 or len(picture) != 3:
            raise ValueError(f"A picture is a tensor [3, height, width]; this one is {list(picture.shape)}.")
        levels = picture.detach().float().cpu().permute(1, 2, 0).numpy() * 127.5 + 127.5
        if levels.shape[:2] == (side, side):
            return np.clip(levels, 0, 255)
        picture = Image.fromarray(np.clip(levels + 0.5, 0, 255).astype(np.uint8))
    picture = picture.convert("RGB")
    if picture.size != (side, side):
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(picture, np.float32)


def nearest(color: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str | None:
    """The name of the palette's entry nearest to an RGB colour, None if even that is farther than TINT."""
    distance, name = min((float(np.linalg.norm(color - rgb)), name) for name, rgb in palette.items())
    return name if distance <= TINT else None


def _cut_out(pixels: np.ndarray, background: np.ndarray, labels: np.ndarray, index: int, box: tuple) -> Blob:
    """One labelled blob with a rim of 2 pixels."""
    rows, columns = (slice(max(0, side.start - RIM), side.stop + RIM) for side in box)
    mine = labels[rows, columns] == index
    inside = ndimage.binary_erosion(mine, iterations=RIM)
    patch = pixels[rows, columns]
    color = np.median(patch[inside if inside.any() else mine], axis=0)
    toward, away = color - background, patch - background
    cover = np.clip(away @ toward / max(float(toward @ toward), 1.0), 0, 1)
    stray = np.linalg.norm(away - cover[..., None] * toward, axis=2)[mine]
    cover = cover * ndimage.binary_dilation(mine, iterations=RIM)
    return Blob(cover, rows.start, columns.start, color, float(np.mean(stray <= STRAY)))


def _recognise(blob: Blob) -> Seen | None:
    """The object that a blob shows, None if it is not acceptable as one."""
    color = nearest(blob.color, COLORS)
    if color is None or blob.purity < PURITY:
        return None
    height, width = blob.cover.shape
    total = blob.cover.sum()
    y = blob.cover.sum(1) @ (np.arange(height) + 0.5) / total
    x = blob.cover.sum(0) @ (np.arange(width) + 0.5) / total
    top, left = BOX // 2 - int(y), BOX // 2 - int(x)
    if min(top, left) < 0 or top + height > BOX or left + width > BOX:
        return None
    outlines = _outlines()
    near = outlines.covers[int(y % 1 * STEPS), int(x % 1 * STEPS)][:, top : top + height, left : left + width]
    steep = np.clip((blob.cover - 0.5) * STEEP + 0.5, 0, 1) * (blob.cover > 0)
    shared = np.minimum(near, steep).sum((1, 2))
    scores = (shared / (outlines.areas + steep.sum() - shared)).reshape(len(SHAPES), len(SIZES))
    best = int(scores.argmax())
    shape, size = divmod(best, len(SIZES))
    others = np.delete(scores, shape, axis=0).max()
    softness = (blob.cover * (1 - blob.cover)).sum() / outlines.lengths[best] * math.sqrt(math.pi)
    if scores[shape, size] < OVERLAP or scores[shape, size] - others < MARGIN or softness > SOFTEST:
        return None
    offset_y, offset_x = outlines.offsets[best]
    x, y = float(blob.left + x - offset_x), float(blob.top + y - offset_y)
    return Seen(SHAPES[shape], color, SIZES[size], place_of(x, y), x, y, float(scores[shape, size]))


def place_of(x: float, y: float, side: int = SIDE) -> str:
    """The name of the place whose centre is nearest to a point of a picture `side` pixels wide and high."""
    column, row = (min(range(3), key=lambda i: abs(CENTERS[i] - value * SIDE / side)) for value in (x, y))
    return PLACES[3 * row + column]


@dataclass(frozen=True)
class Outlines:
    """The ten outlines, shape by shape, small before large.

    `covers` [STEPS, STEPS, 10, BOX, BOX] have their centre of mass at each quarter pixel (y, x) of the box's
    middle pixel; `areas` [10] and circumferences `lengths` [10] are in pixels; `offsets` [10, 2] are the
    centres of mass (y, x) from the outlines' own centres.
    """

    covers: np.ndarray
    areas: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray


@cache
def _outlines() -> Outlines:
    pixel = torch.arange(BOX) + 0.5 - BOX / 2

    def covers(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        parts = [(0.5 - distances(x / scale, y / scale) * scale).clamp(0, 1) for scale in SCALES.values()]
        return torch.stack(parts, 1).flatten(0, 1)  # [10, BOX, BOX]

    centered = covers(*torch.meshgrid(pixel, pixel, indexing="xy"))
    areas = centered.sum((1, 2))
    lengths = torch.hypot(*torch.gradient(centered, dim=(1, 2))).sum((1, 2))
    offsets = torch.stack([centered.sum(2) @ pixel, centered.sum(1) @ pixel], 1) / areas[:, None]
    quarter = (torch.arange(STEPS) + 0.5) / STEPS
    bank = torch.zeros(STEPS, STEPS, len(areas), BOX, BOX)
    for i, (offset_y, offset_x) in enumerate(offsets):
        for row, down in enumerate(quarter):
            for column, right in enumerate(quarter):
                x, y = torch.meshgrid(pixel - right + offset_x, pixel - down + offset_y, indexing="xy")
                bank[row, column, i] = covers(x, y)[i]
    return Outlines(bank.numpy(), areas.numpy(), lengths.numpy(), offsets.numpy())
