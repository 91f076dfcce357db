"""A BAGEL whose layers stay as a GGUF has them, and become numbers for every product."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..bagel.packed import Packed, Room
from .gguf import LAYER_MATRIX, Gguf
from .gguf_blocks import Blocks


class GgufWeight(Packed):
    """Matrices of one row length, one behind the other."""

    def __init__(self, tensors: list[Blocks], room: Room):
        super().__init__((sum(tensor.shape[0] for tensor in tensors), tensors[0].shape[1]), room)
        self.tensors = tensors

    def fill(self, out: Tensor) -> None:
        rows = out.split([tensor.shape[0] for tensor in self.tensors])
        for tensor, part in zip(self.tensors, rows, strict=True):
            tensor.dequantise_into(part)

    def parts(self) -> dict[str, Tensor]:
        """None that could be saved: a GGUF is a file already."""
        return {}

    @property
    def nbytes(self) -> int:
        return sum(tensor.blocks.nbytes for tensor in self.tensors)


class GgufReader:
    """Brings a GGUF's tensors to a device, by name."""

    def __init__(self, source: Gguf, device: torch.device):
        self.source, self.device = source, device

    def packed(self, names: list[str], shape: tuple[int, int], room: Room) -> GgufWeight:
        """Matrices as the file has them, together of this shape."""
        return GgufWeight([self.source.tensors[name].to(self.device) for name in names], room)

    def read(self, targets: dict[str, Tensor]) -> None:
        """Fill the targets, on the device, with tensors of these names."""
        for name, target in targets.items():
            self.source.tensors[name].to(self.device).dequantise_into(target)


def gguf_file(model: Path) -> Path | None:
    """The GGUF that a path names, or that stands for `ema.safetensors` in a folder; None where there is none.

    Raises ValueError for a folder with several.
    """
    if model.suffix == ".gguf":
        return model
    found = [] if (model / "ema.safetensors").exists() else sorted(model.glob("*.gguf"))
    if len(found) > 1:
        raise ValueError(f"{model} has {', '.join(file.name for file in found)}: name the file that you want.")
    return found[0] if found else None


def bytes_of_a_weight(source: Gguf) -> float:
    """On average, of the matrices of the decoder's layers."""
    matrices = [tensor for name, tensor in source.tensors.items() if LAYER_MATRIX.fullmatch(name)]
    return sum(tensor.blocks.nbytes for tensor in matrices) / sum(prod(tensor.shape) for tensor in matrices)
