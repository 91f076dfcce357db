"""GGUF files of a BAGEL: read in place, and written from an official folder.

The format (github.com/ggml-org/ggml, `docs/gguf.md`): "GGUF", the version, metadata, a list of tensors (name, sizes
with the shortest step first, type, place), then their blocks. The package `gguf` reads and writes it.

A GGUF stands for `ema.safetensors` and has its names; the autoencoder, the JSON files and the tokenizer stay beside it.
`general.architecture` says little: converters for image models write whatever they were told, so BAGEL is recognised
by the names. 118 of them have 64 characters or more, beyond the limit of ggml; the converters keep them.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..tensors import TYPES as STORED
from ..tensors import damaged
from .gguf_blocks import FORMATS, Blocks, packed_shape
from .gguf_rounding import TYPES, library, quantise

ARCHITECTURE = "bagel"  # what our own files say
VERSIONS = (2, 3)
# What makes a model a BAGEL, with the generation expert or without.
MARK = "language_model.model.layers.0.self_attn.q_proj.weight"
LAYER_MATRIX = re.compile(r"language_model\.model\.layers\.\d+\..*\.weight")
FALLBACK = "Q8_0"  # in blocks of 32, for rows that are no multiple of 256


@dataclass(frozen=True)
class Gguf:
    """An open GGUF: its metadata, and by name the tensors as they lie in the file.

    The tensors' blocks are views of the mapped file: nothing is read before they are used, and they must not be written
    to. `blocks.storage_offset()` is a tensor's place in the file, in bytes.
    """

    file: Path
    metadata: dict[str, object]
    tensors: dict[str, Blocks]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in torch's order."""
        return {name: packed.shape for name, packed in self.tensors.items()}

    @property
    def types(self) -> dict[str, str]:
        """Name -> type."""
        return {name: packed.type for name, packed in self.tensors.items()}


@dataclass(frozen=True)
class Written:
    """A GGUF that was written: its bytes, the type asked for and by name the type each tensor got.

    `fallbacks`: those matrices of the decoder's layers that could not have the type asked for, with their row length.
    """

    file: Path
    bytes: int
    asked: str
    types: dict[str, str]
    fallbacks: dict[str, int]

    def __str__(self) -> str:
        counts = Counter(self.types.values())
        told = f"{self.file.name}: {self.bytes:,} bytes; tensors: {_told(counts)}."
        if self.fallbacks:
            lengths = ", ".join(map(str, sorted(set(self.fallbacks.values()))))
            instead = Counter(self.types[name] for name in self.fallbacks)
            told += (
                f" {len(self.fallbacks)} matrices with rows of {lengths} numbers cannot be {self.asked} "
                f"(blocks of {FORMATS[self.asked].values}); they are: {_told(instead)}."
            )
        return told


def open_gguf(file: Path | str) -> Gguf:
    """A BAGEL's GGUF, mapped into memory.

    Raises FileNotFoundError; ValueError for a file that is no GGUF, of another version, truncated or damaged, of
    another model, or with types that are not in `FORMATS`; ImportError without the package `gguf`.
    """
    file = Path(file)
    _check_start(file)
    reader = _reader(file)
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    _check_model(file, metadata, [tensor.name for tensor in reader.tensors])
    _check_types(file, {tensor.name: tensor.tensor_type.name for tensor in reader.tensors})
    whole = _mapped(reader.data)
    return Gguf(file, metadata, {tensor.name: _packed(tensor, whole) for tensor in reader.tensors})


def write_gguf(folder: Path | str, file: Path | str, type: str = FALLBACK) -> Written:
    """Write the `ema.safetensors` of a BAGEL folder as a GGUF, one tensor at a time in memory.

    The matrices of the decoder's layers become `type` (of `gguf_rounding.TYPES`), or Q8_0 where their rows are no
    multiple of its block; where that does not fit either, they keep their type, as the other matrices do. Vectors
    become F32. Until it is whole, the file has `.part` after its name. Raises FileNotFoundError, ValueError for another
    type or a damaged folder, OSError when the disk is or gets full, ImportError without the package `gguf`.
    """
    source, file = Path(folder) / "ema.safetensors", Path(file)
    if type not in TYPES:
        raise ValueError(f"Tensors cannot be rounded to the GGUF type {type} here: choose one of {', '.join(TYPES)}.")
    gguf = library()
    with _tensors(source) as tensors:
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        types = {name: _type(name, shape, _stored(source, tensors, name), type) for name, shape in shapes.items()}
        _check_disk(file, shapes, types)
        with _part(file) as part:
            writer = gguf.GGUFWriter(part, ARCHITECTURE)
            try:
                _write_list(gguf, writer, shapes, types)
                for name, kind in types.items():
                    writer.write_tensor_data(quantise(tensors.get_tensor(name), kind).blocks.numpy())
            finally:
                writer.close()
    others = [name for name in types if _is_layer_matrix(name, shapes[name]) and types[name] != type]
    return Written(file, file.stat().st_size, type, types, {name: shapes[name][-1] for name in others})


# Reading


def _check_start(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: give the path of a GGUF file of BAGEL.")
    with open(file, "rb") as source:
        start = source.read(8)
    if start[:4] != b"GGUF":
        raise ValueError(
            f"{file} is no GGUF: it starts with {start[:4]!r} instead of {b'GGUF'!r}. Give the path of a file whose "
            "name ends in .gguf, and fetch it again if this one does."
        )
    version = int.from_bytes(start[4:], "little")
    if version not in VERSIONS:
        order = " (in big-endian order)" if version and version % 2**16 == 0 else ""
        raise ValueError(
            f"{file} is a GGUF of version {version}{order}; versions {' and '.join(map(str, VERSIONS))} in "
            "little-endian order can be read: convert it again with a current tool."
        )


def _reader(file: Path):
    """The package's reader, which trusts a file: a damaged one fails wherever it happens to."""
    gguf = library()
    try:
        return gguf.GGUFReader(file, "r")
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        if unknown := re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", str(error)):
            raise _unsupported(file, f"the type number {unknown[1]}") from error
        raise damaged(file, error) from error


def _check_model(file: Path, metadata: dict[str, object], names: list[str]) -> None:
    if MARK not in names:
        architecture = metadata.get("general.architecture", "none")
        some = ", ".join(names[:3]) or "none"
        raise ValueError(
            f"{file} holds another model: its architecture is {architecture!r} and its {len(names)} tensors are named "
            f"{some} ...; wanted is BAGEL-7B-MoT with the tensors of ema.safetensors, such as {MARK}. Other models "
            "have bagel in their names, too: look for one made from ByteDance-Seed/BAGEL-7B-MoT."
        )


def _check_types(file: Path, types: dict[str, str]) -> None:
    if others := Counter(kind for kind in types.values() if kind not in FORMATS):
        raise _unsupported(file, _told(others))


def _unsupported(file: Path, found: str) -> ValueError:
    return ValueError(
        f"{file} holds tensors of types that cannot be read here: {found}. Use a file with tensors of "
        f"{', '.join(FORMATS)}."
    )


def _mapped(data: np.memmap) -> Tensor:
    """The file's bytes as a tensor that shares the mapping."""
    with warnings.catch_warnings():
        # Mapped for reading alone: what could be written would need as much memory as the file is long.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(data))


def _packed(tensor, whole: Tensor) -> Blocks:
    """One of the reader's tensors; it lists the sizes as the file does, the last dimension first."""
    shape, kind = tuple(reversed(tensor.shape.tolist())), tensor.tensor_type.name
    blocks = whole[tensor.data_offset : tensor.data_offset + tensor.n_bytes]
    return Blocks(kind, shape, blocks.view(packed_shape(shape, kind)))


# Writing


@contextmanager
def _tensors(source: Path) -> Iterator:
    if not source.is_file():
        raise FileNotFoundError(f"{source} is missing: a GGUF is made from a BAGEL folder with {source.name}.")
    try:
        tensors = safe_open(source, "pt")
    except SafetensorError as error:
        raise damaged(source, error) from error
    with tensors:
        yield tensors


def _stored(source: Path, tensors, name: str) -> str:
    kind = tensors.get_slice(name).get_dtype()
    if kind not in STORED:
        raise ValueError(f"{source} holds {name} as {kind}, which must be one of {', '.join(STORED)}.")
    return kind


def _type(name: str, shape: tuple[int, ...], stored: str, asked: str) -> str:
    """The type that a tensor is to have."""
    if len(shape) < 2:
        return "F32"
    if _is_layer_matrix(name, shape):
        for kind in (asked, FALLBACK):
            if shape[-1] % FORMATS[kind].values == 0:
                return kind
    return stored


def _is_layer_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and LAYER_MATRIX.fullmatch(name) is not None


def _check_disk(file: Path, shapes: dict[str, tuple[int, ...]], types: dict[str, str]) -> None:
    needed = sum(rows * size for rows, size in (packed_shape(shapes[name], types[name]) for name in types))
    free = shutil.disk_usage(file.absolute().parent).free
    if needed > free:
        raise OSError(
            f"{file} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on its disk: make room, or name another."
        )


@contextmanager
def _part(file: Path) -> Iterator[Path]:
    """Where a file is written until it is whole; what an error leaves is removed."""
    part = file.with_name(file.name + ".part")
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _write_list(gguf, writer, shapes: dict[str, tuple[int, ...]], types: dict[str, str]) -> None:
    """All that comes before the tensors' blocks."""
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, kind in types.items():
        rows, size = packed_shape(shapes[name], kind)
        bytes_shape = (*shapes[name][:-1], size)
        writer.add_tensor_info(name, bytes_shape, np.dtype(np.uint8), rows * size, gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _told(counts: Counter) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
