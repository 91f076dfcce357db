"""The blocks of a GGUF: small integers with a few scales, and the numbers they stand for, in plain torch on any device.

The layouts are those of github.com/ggml-org/ggml, `src/ggml-common.h`. In every type a number is scale * integer, some
subtract a minimum; a group of 16 or 32 numbers shares both, and the types with a K pack the groups' scales themselves
into a few bits, with one float16 for 256 numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
from torch import Tensor

# Numbers made at a time, so that what lies between the blocks and the result (up to 7 bytes a number) stays small: in
# the processor's cache, and on a card few enough calls that starting them does not count.
PIECE = {"cpu": 2**20, "cuda": 2**24}
# What the sixteen codes of IQ4_NL and IQ4_XS stand for.
CODES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

# (integers [blocks, groups, size], scale [blocks, groups, 1], minimum of that shape or None)
Parts = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class BlockFormat:
    """A type: how many numbers a block holds in how many bytes, and what takes blocks [blocks, bytes] apart.

    `plain` is set instead of `parts` where the bytes are the numbers.
    """

    values: int
    bytes: int
    parts: Callable[[Tensor], Parts] | None = None
    plain: torch.dtype | None = None


@dataclass(frozen=True)
class Blocks:
    """A tensor as it lies in a GGUF: its type, its shape (in torch's order) and its blocks.

    `blocks` is uint8 [rows, bytes per row], contiguous, on any device; a row is what the last dimension counts. Blocks
    tensors of one type and row length are joined by their rows: `torch.cat` of their blocks.
    """

    type: str
    shape: tuple[int, ...]
    blocks: Tensor

    def to(self, device: torch.device | str) -> Blocks:
        """The same with its blocks on `device`."""
        return replace(self, blocks=self.blocks.to(device))

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers on the blocks' device, computed in float32 and rounded once to `dtype`.

        In float32 they are those of `gguf.quants.dequantize`, bit for bit.
        """
        target = torch.empty(self.shape, dtype=dtype, device=self.blocks.device)
        self.dequantise_into(target)
        return target

    @torch.no_grad()
    def dequantise_into(self, target: Tensor) -> None:
        """Write the numbers into `target`: contiguous, of this shape, on the blocks' device, of any floating type."""
        form = block_format(self.type)
        if tuple(target.shape) != self.shape:
            raise ValueError(f"A tensor of shape {list(self.shape)} does not fit into one of {list(target.shape)}.")
        count = PIECE[target.device.type] // form.values
        pieces = self.blocks.view(-1, form.bytes).split(count), target.view(-1, form.values).split(count)
        for blocks, values in zip(*pieces, strict=True):
            dequantise_blocks(blocks, form, values)


def block_format(kind: str) -> BlockFormat:
    """The layout of a type. Raises ValueError for one that is not among `FORMATS`."""
    if kind not in FORMATS:
        raise ValueError(f"The GGUF type {kind} cannot be read here: use a file of {', '.join(FORMATS)}.")
    return FORMATS[kind]


def packed_shape(shape: tuple[int, ...], kind: str) -> tuple[int, int]:
    """(rows, bytes per row) of a tensor of this shape. Raises ValueError for rows that are no whole blocks."""
    form = block_format(kind)
    if not shape or shape[-1] % form.values:
        raise ValueError(
            f"A tensor of shape {list(shape)} cannot be {kind}: its rows must be multiples of {form.values} numbers."
        )
    return prod(shape[:-1]), shape[-1] // form.values * form.bytes


def dequantise_blocks(blocks: Tensor, form: BlockFormat, target: Tensor) -> None:
    """The numbers of blocks [blocks, bytes] into target [blocks, values], contiguous.

    Made for `torch.compile(..., fullgraph=True)`, which turns it into one kernel; as it stands it is four to twelve.
    """
    if form.plain:
        target.copy_(blocks.view(form.plain))
        return
    integers, scale, minimum = form.parts(blocks)
    target = target.view_as(integers)
    # `out` lets the last operation round to the target's type on its way.
    if minimum is None:
        torch.mul(integers, scale, out=target)
    else:
        torch.sub(integers * scale, minimum, out=target)


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 number at a byte of each block, as float32 [blocks, 1]."""
    return blocks[:, start : start + 2].view(torch.float16).float()


def _fields(part: Tensor, run: int, bits: int) -> Tensor:
    """The numbers of `bits` bits in bytes [blocks, bytes]: of each run of bytes those in the lowest bits come first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=part.device)[:, None]
    return (part.unflatten(1, (-1, 1, run)) >> shifts).bitwise_and_(2**bits - 1).flatten(1)


def _signed(integers: Tensor, offset: int) -> Tensor:
    """Unsigned integers below 128, less `offset`."""
    return integers.view(torch.int8).sub_(offset)


def _groups(integers: Tensor, scale: Tensor, minimum: Tensor | None = None) -> Parts:
    """Integers [blocks, values] beside one scale, and one minimum, [blocks, groups] for each of their groups."""
    integers = integers.unflatten(1, (scale.shape[1], -1))
    return integers, scale.unsqueeze(-1), None if minimum is None else minimum.unsqueeze(-1)


def _q8_0(blocks: Tensor) -> Parts:
    return _groups(blocks[:, 2:].view(torch.int8), _half(blocks, 0))


def _q4_0(blocks: Tensor) -> Parts:
    return _groups(_signed(_fields(blocks[:, 2:], 16, 4), 8), _half(blocks, 0))


def _q4_1(blocks: Tensor) -> Parts:
    return _groups(_fields(blocks[:, 4:], 16, 4), _half(blocks, 0), -_half(blocks, 2))


def _five_bits(blocks: Tensor, start: int) -> Tensor:
    """From `start` of each block: 4 bytes of fifth bits, then 16 of the lower four."""
    high, low = blocks[:, start : start + 4], blocks[:, start + 4 :]
    return _fields(low, 16, 4) | _fields(high, 1, 1) << 4


def _q5_0(blocks: Tensor) -> Parts:
    return _groups(_signed(_five_bits(blocks, 2), 16), _half(blocks, 0))


def _q5_1(blocks: Tensor) -> Parts:
    return _groups(_five_bits(blocks, 4), _half(blocks, 0), -_half(blocks, 2))


def _q2_k(blocks: Tensor) -> Parts:
    packed = blocks[:, :16]  # of each group: four bits of its scale, above them four of its minimum
    scale, minimum = _half(blocks, 80) * (packed & 15), _half(blocks, 82) * (packed >> 4)
    return _groups(_fields(blocks[:, 16:80], 32, 2), scale, minimum)


def _q3_k(blocks: Tensor) -> Parts:
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    scales = _signed(_fields(low, 8, 4) | _fields(high, 4, 2) << 4, 32)
    # The third bit is set where nothing is to be subtracted.
    integers = _signed(_fields(blocks[:, 32:96], 32, 2) | _fields(blocks[:, :32], 32, 1) << 2, 4)
    return _groups(integers, _half(blocks, 108) * scales)


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of the eight groups of Q4_K and Q5_K, from the bytes 0 to 15: two float16, then twelve bytes of six-bit numbers.

    The first four bytes hold four scales and the next four minima, in six bits. Their upper two bits continue the
    other four scales and minima, whose lower four bits share the last four bytes.
    """
    first, second, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([first & 63, (rest & 15) | (first >> 6) << 4], 1)
    minima = torch.cat([second & 63, (rest >> 4) | (second >> 6) << 4], 1)
    return _half(blocks, 0) * scales, _half(blocks, 2) * minima


def _q4_k(blocks: Tensor) -> Parts:
    return _groups(_fields(blocks[:, 16:], 32, 4), *_scales_and_minima(blocks))


def _q5_k(blocks: Tensor) -> Parts:
    integers = _fields(blocks[:, 48:], 32, 4) | _fields(blocks[:, 16:48], 32, 1) << 4
    return _groups(integers, *_scales_and_minima(blocks))


def _q6_k(blocks: Tensor) -> Parts:
    integers = _signed(_fields(blocks[:, :128], 64, 4) | _fields(blocks[:, 128:192], 32, 2) << 4, 32)
    return _groups(integers, _half(blocks, 208) * blocks[:, 192:208].view(torch.int8))


def _decoded(codes: Tensor) -> Tensor:
    return torch.tensor(CODES, dtype=torch.int8, device=codes.device)[codes.int()]


def _iq4_nl(blocks: Tensor) -> Parts:
    return _groups(_decoded(_fields(blocks[:, 2:], 16, 4)), _half(blocks, 0))


def _iq4_xs(blocks: Tensor) -> Parts:
    scales = _signed(_fields(blocks[:, 4:8], 1, 4) | _fields(blocks[:, 2:4], 1, 2) << 4, 32)
    return _groups(_decoded(_fields(blocks[:, 8:], 16, 4)), _half(blocks, 0) * scales)


_PLAIN = partial(BlockFormat, 1)
FORMATS = {
    "F32": _PLAIN(4, plain=torch.float32),
    "F16": _PLAIN(2, plain=torch.float16),
    "BF16": _PLAIN(2, plain=torch.bfloat16),
    "Q8_0": BlockFormat(32, 34, _q8_0),
    "Q6_K": BlockFormat(256, 210, _q6_k),
    "Q5_K": BlockFormat(256, 176, _q5_k),
    "Q5_1": BlockFormat(32, 24, _q5_1),
    "Q5_0": BlockFormat(32, 22, _q5_0),
    "Q4_K": BlockFormat(256, 144, _q4_k),
    "Q4_1": BlockFormat(32, 20, _q4_1),
    "Q4_0": BlockFormat(32, 18, _q4_0),
    "IQ4_NL": BlockFormat(32, 18, _iq4_nl),
    "IQ4_XS": BlockFormat(256, 136, _iq4_xs),
    "Q3_K": BlockFormat(256, 110, _q3_k),
    "Q2_K": BlockFormat(256, 84, _q2_k),
}
