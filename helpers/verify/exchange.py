"""What passes between the two sides, and the files that carry it to another machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..tensors import damaged
from .works import Works, reference_folder, reference_works

WEIGHT_FILES = ("ema.safetensors", "ae.safetensors")
CONFIG_FILES = ("llm_config.json", "vit_config.json", "config.json")
_KEY = "bagel_verify"


@dataclass(frozen=True)
class Vectors:
    """What one side found: tensors named CASE.FIELD, and facts about the run.

    Facts: origin, weights, device, device_type, versions, attention, sizes, and by case seconds and peaks (bytes);
    what is not known is left out.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """Which checkpoint it was: SHA-256 by weight file, and what the JSON files say (None for a missing one)."""

    hashes: dict[str, str]
    configs: dict[str, dict | None]


def pictures_as_tensors(works: Works) -> dict[str, Tensor]:
    """The pictures as uint8 [height, width, 3 or 4], named picture.NAME; with transparency 4 channels."""
    return {f"picture.{name}": torch.from_numpy(np.array(_rgb(one))) for name, one in works.pictures.items()}


def _rgb(picture: Image.Image) -> Image.Image:
    clear = picture.mode == "RGBA" or picture.info.get("transparency") is not None
    return picture.convert("RGBA" if clear else "RGB")


def save(file: Path, works: Works, vectors: Vectors, checkpoint: Checkpoint) -> None:
    """Works, vectors and the checkpoint's hashes in one safetensors file."""
    words = {
        "cases": works.cases,
        "facts": vectors.facts,
        "hashes": checkpoint.hashes,
        "configs": checkpoint.configs,
    }
    save_file({**vectors.tensors, **pictures_as_tensors(works)}, file, {_KEY: json.dumps(words)})


def read(file: Path) -> tuple[Works, Vectors, Checkpoint]:
    """What `save` wrote. Raises FileNotFoundError, or ValueError for another or a damaged file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: `verify --official ... --save {file.name}` writes such a file.")
    try:
        with safe_open(file, "pt") as opened:
            words = json.loads((opened.metadata() or {}).get(_KEY, "null"))
        tensors = load_file(file)
    except SafetensorError as error:
        raise damaged(file, error) from error
    if words is None:
        raise ValueError(f"{file} holds no vectors of `verify --save`: name a file that it wrote.")
    pictures = {
        name.removeprefix("picture."): Image.fromarray(tensors.pop(name).numpy())
        for name in [name for name in tensors if name.startswith("picture.")]
    }
    works = Works(words["cases"], pictures)
    return works, Vectors(tensors, words["facts"]), Checkpoint(words["hashes"], words["configs"])


def read_reference() -> tuple[Works, Vectors]:
    """The repository's own vectors: of the official code in float32 on a processor."""
    tensors = load_file(reference_folder() / "expected.safetensors")
    facts = {"origin": "the repository's reference vectors", "weights": "fp32", "device_type": "cpu"}
    works = reference_works()
    kept = {name: tensor for name, tensor in tensors.items() if name.split(".")[0] in works.cases}
    return works, Vectors(kept, facts)


def checkpoint_of(folder: Path) -> Checkpoint:
    """Hashes and configurations of a checkpoint folder; reads every byte of the weights.

    Raises FileNotFoundError for missing weights.
    """
    hashes = {name: _sha256(folder / name) for name in WEIGHT_FILES}
    return Checkpoint(hashes, {name: _json(folder / name) for name in CONFIG_FILES})


def is_reference(folder: Path) -> bool:
    """Whether a folder holds the small random checkpoint of `tests/reference`."""
    own = reference_folder() / "checkpoint"
    files = [(folder / name, own / name) for name in WEIGHT_FILES]
    if not all(mine.is_file() and its.is_file() and mine.stat().st_size == its.stat().st_size for mine, its in files):
        return False
    return checkpoint_of(folder) == checkpoint_of(own)


def differences(ours: Checkpoint, theirs: Checkpoint) -> Iterator[str]:
    """What two checkpoints differ in, a line for each file or setting."""
    for name in CONFIG_FILES:
        mine, its = ours.configs[name] or {}, theirs.configs[name] or {}
        for key in sorted({*mine, *its}):
            if mine.get(key) != its.get(key):
                yield f"{name}: {key} is {mine.get(key)!r} in the folder and {its.get(key)!r} in the vectors"
    for name in WEIGHT_FILES:
        if ours.hashes[name] != theirs.hashes[name]:
            yield f"{name}: SHA-256 {ours.hashes[name][:12]}... in the folder and {theirs.hashes[name][:12]}... there"


def _sha256(file: Path) -> str:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: a BAGEL folder holds {' and '.join(WEIGHT_FILES)}.")
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _json(file: Path) -> dict | None:
    return json.loads(file.read_text(encoding="utf8")) if file.is_file() else None
