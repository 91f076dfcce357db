"""Where the weights are: the repositories, the official files, what a folder holds of them, and the command that
fetches the rest (`helpers.download`).
"""

import json
import math
import shlex
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.hardware import AUTODL_DATA
from helpers.workbook import anchor, repository

OFFICIAL_MODEL = "ByteDance-Seed/BAGEL-7B-MoT"
# Short name -> repository.
REPOSITORIES = {"bagel": OFFICIAL_MODEL, "df11": "DFloat11/BAGEL-7B-MoT-DF11"}
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


def usual_places(name: str = OFFICIAL_MODEL) -> list[Path]:
    """Where the folder of a repository is looked for: AutoDL's data disk, then beside the workbook."""
    folder = name.rpartition("/")[2]
    return [AUTODL_DATA / folder, repository().parent / folder]


def proposed_place(name: str = OFFICIAL_MODEL) -> Path:
    """Where a repository should be downloaded to: the first of the usual places whose disk is here."""
    return next(place for place in usual_places(name) if place.parent.is_dir())


def fetch_command(folder: Path | str, mirror: bool = False) -> str:
    """The shell command that downloads the official folder and verifies it, going on where it stopped.

    With `mirror` it asks hf-mirror.com instead of Hugging Face.
    """
    return f"python -m helpers download --to {shlex.quote(str(folder))}{' --mirror' if mirror else ''}"


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
            raise _headless(path)
        header = file.read(length)
    try:
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        return tensors, 8 + length + end
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _headless(path) from error


def _headless(path: Path) -> ValueError:
    return ValueError(f"{path.name} ({path.stat().st_size} bytes) has no whole safetensors header: fetch it again")


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
    return manifest("ema.safetensors") | manifest("ae.safetensors")


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in one of the released model's weight files; empty for any other file."""
    file = repository() / "tests" / "reference" / f"manifest_{name.removesuffix('.safetensors')}.json"
    if name not in ("ema.safetensors", "ae.safetensors"):
        return {}
    return {tensor: tuple(shape) for tensor, shape in json.loads(file.read_text()).items()}


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
