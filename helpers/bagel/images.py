"""Pictures on the way in and out: files, colours, sizes, patches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .config import ResizeRule

MAX_PIXELS = 14 * 14 * 9 * 1024


def open_picture(source: Image.Image | Path | str) -> Image.Image:
    """A picture object or file as RGB, upright, transparency on white; of 16 bits a channel the upper 8.

    Raises FileNotFoundError for a missing file, TypeError for what is neither picture nor file name, ValueError for
    a file that is no picture, a picture that cannot be read or is empty, and values whose white is not known.
    """
    if isinstance(source, (str, Path)):
        source = _read(Path(source))
    if not isinstance(source, Image.Image):
        raise TypeError(
            f"A picture must be a PIL image or a file name, not {type(source).__name__} "
            "(PIL.Image.fromarray makes one of an array)."
        )
    try:
        source.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"The picture cannot be read ({error}): give its file name, or open it again.") from error
    if 0 in source.size:
        raise ValueError(f"The picture has {source.width} x {source.height} pixels: each side needs at least 1.")
    if source.mode in ("I", "F"):
        raise ValueError(
            f"A picture of mode {source.mode} does not say which of its values is white: "
            "scale it to 0..255 and convert it to 'L' or 'RGB' first."
        )
    if source.mode.startswith("I;16"):
        # Pillow's own conversion cuts at 255, which would turn the picture white.
        source = Image.fromarray((np.asarray(source) >> 8).astype(np.uint8))
    # Phones store the camera's rotation beside the pixels; the official code ignores it and sees the scene lying down.
    source = ImageOps.exif_transpose(source)
    if source.mode != "RGBA" and source.info.get("transparency") is None:
        return source.convert("RGB")
    source = source.convert("RGBA")
    white = Image.new("RGB", source.size, (255, 255, 255))
    white.paste(source, mask=source.getchannel("A"))
    return white


def _read(file: Path) -> Image.Image:
    if not file.is_file():
        raise FileNotFoundError(f"No picture at {file}: check the name.")
    try:
        with Image.open(file) as picture:
            picture.load()
            return picture
    except UnidentifiedImageError as error:
        raise ValueError(f"{file} is no picture that Pillow can read: give a PNG, JPEG or WebP file.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{file} is too large to open safely ({error}): reduce it first.") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{file} is a damaged picture ({error}): copy it again.") from error


def fitted_size(height: int, width: int, rule: ResizeRule) -> tuple[int, int]:
    """(height, width) that a picture of this size gets: within the rule's limits, in whole strides.

    Source: BAGEL's `MaxLongEdgeMinShortEdgeResize`, its repeated passes and Python's rounding included.
    """
    scale = min(rule.max_size / max(height, width), 1.0)
    scale = max(scale, rule.min_size / min(height, width))
    height, width = _scaled(height, width, scale, rule.stride)
    if height * width > MAX_PIXELS:
        height, width = _scaled(height, width, MAX_PIXELS / (height * width), rule.stride)
    if max(height, width) > rule.max_size:
        height, width = _scaled(height, width, rule.max_size / max(height, width), rule.stride)
    return height, width


def _scaled(height: int, width: int, scale: float, stride: int) -> tuple[int, int]:
    def snap(side: int) -> int:
        return max(stride, round(round(side * scale) / stride) * stride)

    return snap(height), snap(width)


def resize(picture: Image.Image, rule: ResizeRule) -> Image.Image:
    """The picture at its fitted size, bicubic with antialiasing."""
    height, width = fitted_size(picture.height, picture.width, rule)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def to_pixels(picture: Image.Image) -> Tensor:
    """RGB picture -> float32 [3, height, width] in [-1, 1]."""
    values = torch.from_numpy(np.array(picture, dtype=np.float32))
    return (values / 255.0 - 0.5).div(0.5).permute(2, 0, 1).contiguous()


def to_picture(pixels: Tensor) -> Image.Image:
    """[3, height, width], nominally in [-1, 1] -> RGB picture; clamped, then truncated to whole grey levels."""
    values = (pixels.float() * 0.5 + 0.5).clamp(0, 1) * 255
    return Image.fromarray(values.to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def patchify(planes: Tensor, patch: int) -> Tensor:
    """[batch, channels, rows * patch, columns * patch] -> [batch, rows * columns, patch * patch * channels].

    A token lists its patch row by row, column by column, channels last.
    """
    batch, channels, height, width = planes.shape
    cut = planes.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def unpatchify(tokens: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """The inverse of `patchify`: [batch, rows * columns, patch * patch * channels] -> planes."""
    batch, _, size = tokens.shape
    channels = size // patch**2
    cut = tokens.reshape(batch, rows, columns, patch, patch, channels)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, rows * patch, columns * patch)


def grid_rows(rows: int, columns: int, side: int, device: torch.device | str) -> Tensor:
    """Rows of a side x side position table for a grid of patches, row major: int64 [rows * columns].

    Raises ValueError when the grid is larger than the table.
    """
    if rows > side or columns > side:
        raise ValueError(
            f"A picture of {rows} x {columns} patches is larger than the model's position table of {side} x {side}: "
            "ask for a smaller one."
        )
    return (torch.arange(rows, device=device)[:, None] * side + torch.arange(columns, device=device)).flatten()
