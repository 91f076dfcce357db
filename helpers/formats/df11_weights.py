"""A BAGEL whose layers stay as DFloat11 has them on a card, and are decoded for every product.

Importing this module needs the triton package, as `df11_kernel` does.
"""

from __future__ import annotations

from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from ..bagel.packed import Packed, Room
from .df11_folder import Df11Folder, check_size
from .df11_kernel import CardBlock, decode, load


class Df11(Packed):
    """Weights `first` and on of a block on the card."""

    def __init__(self, block: CardBlock, first: int, shape: tuple[int, int], room: Room):
        super().__init__(shape, room)
        self.block, self.first = block, first

    def fill(self, out: Tensor) -> None:
        _decode_into(out, self.block, self.first)

    def parts(self) -> dict[str, Tensor]:
        """None that are its own: the layers of a module share a block."""
        return {}

    @property
    def nbytes(self) -> int:
        """Its share of the block."""
        return round(self.block.nbytes * prod(self.shape) / self.block.weights)


class CardReader:
    """Brings a folder's blocks to a card, each once, and finds weights in them by name."""

    def __init__(self, folder: Df11Folder, device: torch.device):
        self.folder, self.device = folder, device
        self.module, self.block = "", None
        self.places: dict[str, tuple[int, int]] = {}  # in that block: name -> its first weight, the one after its last

    def packed(self, names: list[str], shape: tuple[int, int], room: Room) -> Df11:
        """Weights that lie one behind the other in their block. Raises ValueError for others."""
        block, first, last = self._find(names[0])
        for name in names[1:]:
            _, begin, end = self._find(name)
            if begin != last:
                raise ValueError(f"{name} does not follow {names[0]} in its DFloat11 block: use BAGEL's own patterns.")
            last = end
        if last - first != prod(shape):
            raise ValueError(f"{names[0]} has {last - first} weights in its DFloat11 block instead of {prod(shape)}.")
        return Df11(block, first, shape, room)

    def read(self, targets: dict[str, Tensor]) -> None:
        """Fill the targets, on the card, with tensors of these names."""
        for name, target in targets.items():
            if name in self.folder.tensors:
                target.copy_(self.folder.tensor(name))
                continue
            block, first, last = self._find(name)
            check_size(name, last - first, target)
            _decode_into(target, block, first)

    def _find(self, name: str) -> tuple[CardBlock, int, int]:
        module = next(module for module, names in self.folder.blocks.items() if name in names)
        if module != self.module:
            block = self.folder.block(module)
            ends = list(accumulate(block.sizes))
            places = zip(self.folder.blocks[module], [0, *ends], ends, strict=False)
            self.places = {found: (first, last) for found, first, last in places}
            self.module, self.block = module, load(block, self.device)
        return self.block, *self.places[name]


def _decode_into(target: Tensor, block: CardBlock, first: int) -> None:
    """Weights of a block, as many as the target takes, in its type."""
    made = target if target.dtype == torch.bfloat16 else torch.empty_like(target, dtype=torch.bfloat16)
    decode(block, made, first, first + target.numel())
    if made is not target:
        target.copy_(made)
