"""Weights in fewer bits, made whole again for every product.

A product of many rows takes far longer than making its weights whole, and the one buffer in which that happens serves
all layers: what stays on the device is the packed form. Rounded by rows or by groups within a row, as the libraries do
whose names the formats have: torchao's weight-only int8 and int4, bitsandbytes' NF4.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

# Weights of a row that share a scale, at most.
INT4_GROUP, NF4_GROUP = 128, 64
# The values that four bits stand for: whole numbers, or (Dettmers et al., arXiv 2305.14314, appendix E) numbers that
# split a normal distribution into parts of equal chance.
WHOLE_NUMBERS = tuple(float(number) for number in range(-8, 8))
NORMAL_FLOATS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Weights that are rounded or made whole at a time where no kernel does it.
_AT_ONCE = 2**22


class Room:
    """The buffer in which packed weights become whole: one product uses it at a time."""

    def __init__(self, device: torch.device, dtype: torch.dtype, kernels: ModuleType | None):
        self.device, self.kernels = device, kernels
        self.buffer = torch.empty(0, device=device, dtype=dtype)

    def widen(self, numbers: int) -> None:
        """Make sure that matrices of so many numbers fit; before anything is recorded that uses the buffer."""
        if numbers > self.buffer.numel():
            self.buffer = self.buffer.new_empty(0)  # first gone, then larger
            self.buffer = self.buffer.new_empty(numbers)

    def matrix(self, shape: tuple[int, int]) -> Tensor:
        return self.buffer[: shape[0] * shape[1]].view(shape)


class Packed(ABC):
    """A matrix [outputs, inputs] in fewer bits; its parts are tensors by name."""

    def __init__(self, shape: tuple[int, int], room: Room):
        self.shape, self.room = shape, room
        room.widen(shape[0] * shape[1])

    def whole(self) -> Tensor:
        """The matrix in the type of activations, in the room: it lasts until the next one is made whole."""
        out = self.room.matrix(self.shape)
        self.fill(out)
        return out

    @abstractmethod
    def fill(self, out: Tensor) -> None:
        """Write the matrix into `out`."""

    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """What it holds, each with the rows of the matrix first."""

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts().values())


class Int8(Packed):
    """Eight bits a weight, `codes` int8 [outputs, inputs], and a `scale` float32 [outputs] for each row."""

    def __init__(self, codes: Tensor, scale: Tensor, room: Room):
        super().__init__(tuple(codes.shape), room)
        self.codes, self.scale = codes, scale

    @classmethod
    def empty(cls, shape: tuple[int, int], room: Room) -> Int8:
        """With parts that are still to be filled."""
        codes = torch.empty(shape, device=room.device, dtype=torch.int8)
        return cls(codes, torch.empty(shape[0], device=room.device), room)

    @classmethod
    def of(cls, weight: Tensor, room: Room) -> Int8:
        """Rounded so that the 255 steps reach from a row's largest weight to its opposite."""
        packed = cls.empty(weight.shape, room)
        torch.div(weight.abs().amax(1).float().clamp(min=1e-12), 127.5, out=packed.scale)
        for rows in _rows(weight):
            packed.codes[rows] = (weight[rows].float() / packed.scale[rows, None]).round_().clamp_(-128, 127)
        return packed

    def fill(self, out: Tensor) -> None:
        torch.mul(self.codes, self.scale[:, None], out=out)

    def parts(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scale": self.scale}


class FourBits(Packed):
    """Four bits a weight: `table[code] * scale + shift`, with a scale and perhaps a shift for each group of a row.

    `codes` uint8 [outputs, inputs / 2], the first of two weights in the lower half; `scale` and `shift` bfloat16
    [outputs, groups].
    """

    def __init__(self, table: tuple[float, ...], codes: Tensor, scale: Tensor, shift: Tensor | None, room: Room):
        super().__init__((len(codes), 2 * codes.shape[1]), room)
        self.table, self.codes, self.scale, self.shift = _on(table, codes.device), codes, scale, shift

    @classmethod
    def empty_int4(cls, shape: tuple[int, int], room: Room) -> FourBits:
        """With parts that are still to be filled."""
        return cls(WHOLE_NUMBERS, *_empty(shape, INT4_GROUP, room.device), room)

    @classmethod
    def int4(cls, weight: Tensor, room: Room) -> FourBits:
        """Groups of 128 whole numbers between a group's smallest and largest weight."""
        packed = cls.empty_int4(weight.shape, room)
        for rows, groups, scale in packed._groups(weight):
            low, high = groups.amin(2), groups.amax(2)
            step = (high - low).clamp_(min=1e-6) / 15
            scale.copy_(step)
            packed.shift[rows] = low + 8 * step
            steps = (groups - packed.shift[rows, :, None].float()) / scale[..., None].float()
            packed._take(rows, steps.round_().clamp_(-8, 7) + 8)
        return packed

    @classmethod
    def empty_nf4(cls, shape: tuple[int, int], room: Room) -> FourBits:
        """With parts that are still to be filled."""
        codes, scale, _ = _empty(shape, NF4_GROUP, room.device)
        return cls(NORMAL_FLOATS, codes, scale, None, room)

    @classmethod
    def nf4(cls, weight: Tensor, room: Room) -> FourBits:
        """Groups of 64 normal floats, the largest weight of a group being 1 or -1."""
        packed = cls.empty_nf4(weight.shape, room)
        between = (packed.table[1:] + packed.table[:-1]) / 2
        for rows, groups, scale in packed._groups(weight):
            scale.copy_(groups.abs().amax(2).clamp_(min=1e-12))
            packed._take(rows, torch.bucketize(groups / scale[..., None].float(), between))
        return packed

    def _groups(self, weight: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Some rows at a time: which, their groups in float32 [rows, groups, size], their scales."""
        for rows in _rows(weight):
            scale = self.scale[rows]
            yield rows, weight[rows].float().view(*scale.shape, -1), scale

    def _take(self, rows: slice, values: Tensor) -> None:
        """Codes 0 to 15, two in a byte."""
        pairs = values.to(torch.uint8).view(*self.codes[rows].shape, 2)
        self.codes[rows] = pairs[..., 0] | pairs[..., 1] << 4

    def fill(self, out: Tensor) -> None:
        if self.room.kernels is not None:
            self.room.kernels.fill_four_bits(self.codes, self.table, self.scale, self.shift, out)
            return
        for rows in _rows(out):
            codes = torch.stack([self.codes[rows] & 15, self.codes[rows] >> 4], dim=-1).long()
            values = self.table[codes].view(*self.scale[rows].shape, -1) * self.scale[rows, :, None].float()
            values = values if self.shift is None else values + self.shift[rows, :, None].float()
            out[rows] = values.view(len(codes), -1)

    def parts(self) -> dict[str, Tensor]:
        parts = {"codes": self.codes, "scale": self.scale}
        return parts if self.shift is None else parts | {"shift": self.shift}


# Format -> what rounds a matrix to it.
PACKERS = {"int8": Int8.of, "int4": FourBits.int4, "nf4": FourBits.nf4}
# Format -> what makes room for such a matrix, to be read from a file.
EMPTY = {"int8": Int8.empty, "int4": FourBits.empty_int4, "nf4": FourBits.empty_nf4}
# Format -> bytes of a weight in large matrices, scales included; DFloat11's as measured on normal random weights.
BYTES = {"fp8": 1.0, "int8": 1.0, "int4": 0.5 + 4 / INT4_GROUP, "nf4": 0.5 + 2 / NF4_GROUP, "df11": 1.37}


@cache
def _on(table: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(table, device=device)


def _rows(matrix: Tensor) -> list[slice]:
    """Slices of rows that together hold about `_AT_ONCE` numbers."""
    step = max(1, _AT_ONCE // matrix.shape[1])
    return [slice(begin, begin + step) for begin in range(0, len(matrix), step)]


def _empty(shape: tuple[int, int], most: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and shifts for groups of `most` weights, or as many as the rows' length allows."""
    outputs, inputs = shape
    size = most
    while inputs % size:
        size //= 2
    if size < 2:
        raise ValueError(f"Rows of {inputs} weights cannot be packed in pairs: use weights='int8' or 'bf16'.")
    codes = torch.empty(outputs, inputs // 2, device=device, dtype=torch.uint8)
    scale, shift = (codes.new_empty(outputs, inputs // size, dtype=torch.bfloat16) for _ in range(2))
    return codes, scale, shift
