"""A tensor of numbers -> the blocks of a GGUF.

The package `gguf` rounds to the older types. Q4_K and Q6_K, which it only reads, are rounded here: of several steps
that could span a group, each with the scale that fits the rounded integers best, the one with the least squared error
is taken; then the groups' scales are rounded themselves, and the integers once more, to what can be written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from .gguf_blocks import FORMATS, PIECE, Blocks, block_format, packed_shape

LARGEST = torch.finfo(torch.float16).max  # the type of every scale
# Steps tried for a group: as many as would fit this much more than its range.
STRETCHES = torch.linspace(-1, 1, 9).tolist()


@torch.no_grad()
def quantise(tensor: Tensor, kind: str) -> Blocks:
    """A tensor rounded to a type of `TYPES`; its blocks lie where it does.

    Raises ValueError for another type, for rows that are no whole blocks, and for numbers that the type cannot hold;
    ImportError where the package `gguf` is needed and missing.
    """
    shape = packed_shape(tuple(tensor.shape), kind)
    if kind not in TYPES:
        raise ValueError(f"Tensors cannot be rounded to the GGUF type {kind} here: choose one of {', '.join(TYPES)}.")
    if kind not in ("F32", "BF16"):
        _check_range(tensor, kind)
    return Blocks(kind, tuple(tensor.shape), torch.cat(list(_blocks(tensor, kind))).view(shape))


def library() -> ModuleType:
    """The package `gguf`. Raises ImportError, which names the extra that brings it."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the gguf package: pip install '.[gguf]'.") from error
    return gguf


def _check_range(tensor: Tensor, kind: str) -> None:
    largest = tensor.abs().max().item() if tensor.numel() else 0.0
    if not largest <= LARGEST:
        raise ValueError(
            f"A tensor with a number of size {largest:g} cannot be {kind}, whose scales end at {LARGEST:g}: keep it as "
            "F32 or BF16."
        )


def _blocks(tensor: Tensor, kind: str) -> Iterator[Tensor]:
    """The blocks [blocks, bytes] of some numbers after the other."""
    form = block_format(kind)
    for numbers in tensor.reshape(-1, form.values).split(max(PIECE[tensor.device.type] // form.values, 1)):
        yield _ROUND[kind](numbers.float()) if kind in _ROUND else _by_library(numbers, kind)


def _by_library(numbers: Tensor, kind: str) -> Tensor:
    gguf = library()
    # As one row: the package works on sixteen at a time, which takes twenty times as long where they are short.
    row = numbers.float().cpu().numpy().reshape(1, -1)
    rounded = gguf.quants.quantize(row, gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(rounded).view(len(numbers), -1).to(numbers.device)


def _as(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda numbers: numbers.to(dtype).view(torch.uint8)


def _q6_k(numbers: Tensor) -> Tensor:
    """[blocks, 256] -> [blocks, 210]: 128 bytes of low bits, 64 of high bits, 16 scales and theirs."""
    groups = numbers.unflatten(1, (16, 16))
    scales = _best_scale(groups, -32, 31)  # [blocks, 16, 1]
    # The largest of them becomes -128: an eight-bit integer reaches one further down than up.
    whole = (_extreme(scales, 1) / -128).half()  # [blocks, 1, 1]
    factors = _over(scales, whole.float()).round().clamp(-128, 127)
    integers = _over(groups, factors * whole.float()).round().clamp(-32, 31).add(32).to(torch.uint8).flatten(1)
    low = _joined(integers & 15, 64, 4)
    high = _joined(integers >> 4, 32, 2)
    return torch.cat([low, high, factors.to(torch.int8).view(torch.uint8).flatten(1), _bytes(whole)], 1)


def _q4_k(numbers: Tensor) -> Tensor:
    """[blocks, 256] -> [blocks, 144]: scales' scale, minima's scale, 12 bytes of both, 128 bytes of integers."""
    groups = numbers.unflatten(1, (8, 32))
    scales, minima = _best_scale_and_minimum(groups, 15)  # [blocks, 8, 1] each
    whole, least = ((part.amax(1, keepdim=True) / 63).half() for part in (scales, minima))  # [blocks, 1, 1] each
    factors = _over(scales, whole.float()).round().clamp(0, 63)
    minima = _over(minima, least.float()).round().clamp(0, 63)
    integers = _over(groups + minima * least.float(), factors * whole.float()).round().clamp(0, 15)
    packed = _six_bits(factors.to(torch.uint8).flatten(1), minima.to(torch.uint8).flatten(1))
    return torch.cat([_bytes(whole), _bytes(least), packed, _joined(integers.to(torch.uint8).flatten(1), 32, 4)], 1)


def _six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """Eight scales and eight minima below 64, [blocks, 8] each, in 12 bytes as `_scales_and_minima` finds them."""
    first, second = scales[:, 4:], minima[:, 4:]
    rest = (first & 15) | (second & 15) << 4
    return torch.cat([scales[:, :4] | (first >> 4) << 6, minima[:, :4] | (second >> 4) << 6, rest], 1)


def _best_scale(groups: Tensor, lowest: int, highest: int) -> Tensor:
    """For each group [..., size] the scale [..., 1] with which integers in these bounds come closest to its numbers."""
    extreme = _extreme(groups, -1)
    best, least = torch.zeros_like(extreme), (groups * groups).sum(-1, keepdim=True)
    for stretch in STRETCHES:
        integers = (groups * _over(lowest - stretch, extreme)).round().clamp(lowest, highest)
        scale = _over((groups * integers).sum(-1, keepdim=True), (integers * integers).sum(-1, keepdim=True))
        error = (groups - scale * integers).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _best_scale_and_minimum(groups: Tensor, highest: int) -> tuple[Tensor, Tensor]:
    """For each group the scale and the minimum, neither below 0, for integers from 0 on: scale * integer - minimum."""
    bottom = groups.amin(-1, keepdim=True).clamp(max=0)
    span = groups.amax(-1, keepdim=True) - bottom
    best, minimum = span / highest, -bottom
    least = torch.full_like(span, torch.inf)
    for stretch in STRETCHES:
        integers = ((groups - bottom) * _over(highest + stretch, span)).round().clamp(0, highest)
        scale, offset = _line(integers, groups)
        error = (groups - scale * integers + offset).square().sum(-1, keepdim=True)
        closer = error < least
        best, minimum = torch.where(closer, scale, best), torch.where(closer, offset, minimum)
        least = torch.minimum(error, least)
    return best, minimum


def _line(integers: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, minimum) of the least squared error; through the origin where the minimum would be negative."""
    middle, mean = integers.mean(-1, keepdim=True), numbers.mean(-1, keepdim=True)
    away = integers - middle
    scale = _over((away * numbers).sum(-1, keepdim=True), (away * away).sum(-1, keepdim=True))
    minimum = scale * middle - mean
    through = _over((integers * numbers).sum(-1, keepdim=True), (integers * integers).sum(-1, keepdim=True))
    return torch.where(minimum < 0, through, scale), minimum.clamp(min=0)


def _extreme(numbers: Tensor, dim: int) -> Tensor:
    """The number of the largest size along a dimension, which stays."""
    return numbers.gather(dim, numbers.abs().argmax(dim, keepdim=True))


def _over(above: Tensor | float, below: Tensor) -> Tensor:
    """The quotient; 0 where there is nothing to divide by."""
    return torch.where(below == 0, 0.0, above / below)


def _joined(integers: Tensor, run: int, bits: int) -> Tensor:
    """Integers of a few bits [blocks, 256] in bytes: the inverse of `_fields`."""
    parts = integers.unflatten(1, (-1, 8 // bits, run))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=integers.device)[:, None]
    return (parts << shifts).sum(2, dtype=torch.uint8).flatten(1)


def _bytes(halves: Tensor) -> Tensor:
    """[blocks, 1, 1] in float16 -> [blocks, 2]."""
    return halves.flatten(1).view(torch.uint8)


_ROUND = {
    "F32": _as(torch.float32),
    "F16": _as(torch.float16),
    "BF16": _as(torch.bfloat16),
    "Q6_K": _q6_k,
    "Q4_K": _q4_k,
}
# What `quantise` rounds to, the finest first; those that are not above are rounded by the package gguf.
TYPES = tuple(kind for kind in FORMATS if kind in _ROUND or kind in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"))
