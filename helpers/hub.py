"""Where the weights are: the official files, what a folder holds of them, and the command that fetches the
rest.
"""

import json
import math
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.hardware import AUTODL_DATA
from helpers.workbook import anchor, repository

OFFICIAL_MODEL = "ByteDance-Seed/BAGEL-7B-MoT"
MIRROR = "https://hf-mirror.com"
# Models that come from no file: the released and the tiny one's sizes with random weights.
RANDOM = ("random-7b", "random-tiny")
# Part -> what the names of its tensors contain; the first that fits counts.
PARTS = {
    "generation expert": ("_moe_gen",),
    "understanding expert": ("language_model.model.layers.", "language_model.model.norm."),
    "words in and out": ("embed_tokens", "lm_head"),
    "ViT": ("vit_model.",),
    "autoencoder": ("encoder.", "decoder."),
}
REST = "connectors, time, places"


@dataclass(frozen=True)
class OfficialFile:
    """A file of the official folder; `tensors` and `bytes` (of the tensors alone) where they are known."""

    name: str
    holds: str
    tensors: int | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class FoundFile:
    """An official file and what a folder has of it.

    `bytes` is its size (None: missing), `tensors` the number its header lists, `truncated` whether the file
    is shorter than its header says.
    """

    official: OfficialFile
    bytes: int | None
    tensors: int | None = None
    truncated: bool = False


OFFICIAL_FILES = (
    OfficialFile("ema.safetensors", "decoder with both experts, ViT, connectors (bfloat16)", 1223, 29_214_520_256),
    OfficialFile("ae.safetensors", "autoencoder of FLUX (float32)", 244, 335_278_732),
    OfficialFile("llm_config.json", "decoder sizes"),
    OfficialFile("vit_config.json", "ViT sizes"),
    OfficialFile("config.json", "sizes of the whole; may be missing"),
    OfficialFile("vocab.json", "tokenizer"),
    OfficialFile("merges.txt", "tokenizer"),
    OfficialFile("tokenizer.json", "tokenizer"),
    OfficialFile("tokenizer_config.json", "tokenizer"),
)


def inventory(folder: Path | str) -> list[FoundFile]:
    """What `folder` holds of the official files, in the official order; a missing folder holds none
    of them.
    """
    return [_look(official, Path(folder) / official.name) for official in OFFICIAL_FILES]


def where(model: str = "") -> Path | None:
    """The folder of the weights: of the tiny model, of a folder's name, or (model="") a usual place.

    A relative name is anchored on the repository. None when nothing is there, as for a model with random weights.
    """
    if model in RANDOM:
        return None
    if model == "tiny":
        return repository() / "helpers" / "tiny" / "checkpoint"
    places = [anchor(model)] if model else usual_places()
    return next((place for place in places if (place / "ema.safetensors").is_file()), None)


def usual_places() -> list[Path]:
    """Where the official folder is looked for: AutoDL's data disk, then beside the repository."""
    name = OFFICIAL_MODEL.partition("/")[2]
    return [AUTODL_DATA / name, repository().parent / name]


def fetch_command(folder: Path | str, mirror: bool = False) -> str:
    """The shell command that downloads the official folder, resuming where it stopped.

    With `mirror` the two variables that point at hf-mirror.com come first (without the second, large files
    leave it).
    """
    variables = f"HF_ENDPOINT={MIRROR} HF_HUB_DISABLE_XET=1 " if mirror else ""
    return f"{variables}hf download {OFFICIAL_MODEL} --local-dir {folder}"


def bytes_missing(found: list[FoundFile]) -> int:
    """Bytes of tensors still to download, as far as the official sizes are known."""
    return sum(file.official.bytes or 0 for file in found if file.bytes is None or file.truncated)


def free_bytes(folder: Path | str) -> int:
    """Free bytes on the disk where `folder` is or would be made."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def read_header(path: Path) -> tuple[dict[str, dict], int]:
    """(the tensors of a safetensors file by name, each with dtype and shape; the bytes the whole file must
    have).

    Reads the header alone: 8 bytes of length, then JSON. Raises ValueError if that is not what the file
    starts with.
    """
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= path.stat().st_size - 8:
            raise ValueError(
                f"{path.name} ({path.stat().st_size} bytes) has no whole safetensors header: fetch it again"
            )
        tensors = json.loads(file.read(length))
    tensors.pop("__metadata__", None)
    return tensors, 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)


def shapes(folder: Path | str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a folder's two weight files, from their headers alone.

    Of a model with random weights, those of the model whose sizes it has. Raises FileNotFoundError for a missing
    file, ValueError for one without a header.
    """
    if folder == "random-7b":
        return official_shapes()
    folder = where("tiny") if folder == "random-tiny" else folder
    files = (Path(folder) / "ema.safetensors", Path(folder) / "ae.safetensors")
    return {name: tuple(entry["shape"]) for file in files for name, entry in read_header(file)[0].items()}


def official_shapes() -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the released model's two weight files, from the lists in `tests/reference`."""
    files = [repository() / "tests" / "reference" / f"manifest_{name}.json" for name in ("ema", "ae")]
    return {name: tuple(shape) for file in files for name, shape in json.loads(file.read_text()).items()}


def parameters_by_part(tensors: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """How many numbers each part of a BAGEL holds, in the order of PARTS; `tensors`: name -> shape."""
    counts = dict.fromkeys([*PARTS, REST], 0)
    for name, shape in tensors.items():
        part = next((part for part, marks in PARTS.items() if any(mark in name for mark in marks)), REST)
        counts[part] += math.prod(shape)
    return counts


def _look(official: OfficialFile, path: Path) -> FoundFile:
    """One file: its size and, for weights, its tensors and whether all of them are there."""
    if not path.is_file():
        return FoundFile(official, bytes=None)
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        return FoundFile(official, bytes=size)
    try:
        tensors, whole = read_header(path)
    except ValueError:
        return FoundFile(official, bytes=size, truncated=True)
    return FoundFile(official, bytes=size, tensors=len(tensors), truncated=size < whole)
