"""Folders of packed weights: a model that was loaded as int8, int4 or nf4, kept so that it loads without the original.

The folder is an official one but for `ema.safetensors`: its header names the format, and for each packed weight it
holds that weight's parts, `<name>.codes`, `<name>.scale` and, where there is one, `<name>.shift`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..bagel.layers import replace_by_packed
from ..bagel.packed import EMPTY, Packed, Room
from ..tensors import damaged

# Under this name the header of the file of weights tells their format.
FORMAT = "bagel_weights"


def saved_format(file: Path) -> str | None:
    """The packed format of a file of weights; None for weights as they were trained, or no such file.

    Raises ValueError for a damaged file.
    """
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as tensors:
            return (tensors.metadata() or {}).get(FORMAT)
    except SafetensorError as error:
        raise damaged(file, error) from error


def packed_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> part of every packed weight, views of what the model holds."""
    return {f"{name}.weight.{part}": tensor for name, parts in _packed_layers(model) for part, tensor in parts.items()}


def prepare(kind: str, groups: list[list[nn.Linear]], room: Room, dtype: torch.dtype) -> None:
    """Give layers on the meta device, group by group, packed weights of this format, not filled."""
    for layers in groups:
        shape = sum(layer.out_features for layer in layers), layers[0].in_features
        replace_by_packed(layers, EMPTY[kind](shape, room), room.device, dtype)


def save(model: nn.Module, kind: str, source: Path, target: Path) -> None:
    """Write a loaded model and what else its folder `source` holds to the new folder `target`.

    Raises FileExistsError where `target` holds anything, OSError where the disk has too little room.
    """
    weights = model.state_dict() | packed_tensors(model)
    prepare_folder(source, target, sum(weight.nbytes for weight in weights.values()))
    unfinished = target / "ema.safetensors.part"
    weights = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(weights, unfinished, {"format": "pt", FORMAT: kind})
    unfinished.rename(target / "ema.safetensors")


def prepare_folder(source: Path, target: Path, needed: int) -> None:
    """A new folder with all files of `source` but its weights, for which `needed` bytes are wanted as well.

    Raises FileExistsError where `target` holds anything, OSError where the disk has too little room.
    """
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty: name a new folder for the packed weights.")
    others = [file for file in source.iterdir() if file.is_file() and file.name != "ema.safetensors"]
    needed += sum(file.stat().st_size for file in others)
    target.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target).free
    if needed > free:
        raise OSError(f"{needed / 1e9:.1f} GB do not fit {target}, {free / 1e9:.1f} GB are free: name another disk.")
    for file in others:
        shutil.copyfile(file, target / file.name)


def _packed_layers(model: nn.Module) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every layer with a packed weight, by name, and its rows of the parts."""
    names = {layer: name for name, layer in model.named_modules()}
    for part in model.modules():
        for layers in part.over_one_input() if hasattr(part, "over_one_input") else []:
            packed = layers[0].joined.weight
            if isinstance(packed, Packed):
                sizes = [layer.out_features for layer in layers]
                rows = zip(*(tensor.split(sizes) for tensor in packed.parts().values()), strict=True)
                for layer, tensors in zip(layers, rows, strict=True):
                    yield names[layer], dict(zip(packed.parts(), tensors, strict=True))
