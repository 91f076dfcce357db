"""The tensors of a safetensors file, read straight to where they stay: never twice on the host or on the card.

The format (github.com/huggingface/safetensors): eight bytes with the length of the header (little-endian), the header
(JSON: type, shape and place of every tensor), then the tensors' bytes.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from io import FileIO
from itertools import cycle
from math import ceil
from pathlib import Path

import torch
from torch import Tensor

# One thread copies from the page cache slower than a card takes data in. Each has two buffers of a piece: it reads into
# one while the card copies from the other. Small enough to stay in the processor's cache on the way.
THREADS = 8
PIECE = 4 * 2**20  # bytes
WORTH_A_THREAD = 16  # pieces; for fewer, to start one takes longer than it saves
TYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,  # the codes of packed weights, read into tensors of their own type
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class _Piece:
    """Where in the file some values begin (in bytes), their type there, and the flat tensor that takes them."""

    start: int
    dtype: torch.dtype
    target: Tensor

    @property
    def size(self) -> int:
        return self.target.numel() * self.dtype.itemsize


def read_tensors(file: Path, targets: dict[str, Tensor]) -> None:
    """Fill the targets with the file's tensors of the same names, converted to their type on their device.

    `targets` are contiguous, on one device, and shaped as in the file, whose header `safe_open` has accepted. Raises
    ValueError for a file that ends early or holds values of another type than `TYPES`.
    """
    if not targets:
        return
    pieces = deque(sorted(_pieces(file, targets), key=lambda piece: piece.start))
    threads = min(THREADS, ceil(sum(piece.size for piece in pieces) / PIECE / WORTH_A_THREAD))
    size, device = max(piece.size for piece in pieces), pieces[0].target.device
    if device.type == "cuda":
        # Other streams may still use memory that the targets were given.
        torch.cuda.synchronize(device)
    with ThreadPoolExecutor(THREADS) as pool:
        others = [pool.submit(_read, file, pieces, size, device) for _ in range(threads - 1)]
        _read(file, pieces, size, device)
    for other in others:
        other.result()


def damaged(file: Path, why: object) -> ValueError:
    """The error to raise for a file of weights that cannot be read."""
    return ValueError(
        f"{file} ({file.stat().st_size:,} bytes) cannot be read ({why}): it is truncated or damaged; fetch it again "
        "and compare its size with the official one."
    )


def _pieces(file: Path, targets: dict[str, Tensor]) -> Iterator[_Piece]:
    with open(file, "rb") as source:
        length = int.from_bytes(source.read(8), "little")
        header = json.loads(source.read(length))
    for name, target in targets.items():
        dtype = _type(file, name, header[name]["dtype"])
        start = 8 + length + header[name]["data_offsets"][0]
        for part in target.view(-1).split(PIECE // dtype.itemsize):
            yield _Piece(start, dtype, part)
            start += part.numel() * dtype.itemsize


def _type(file: Path, name: str, written: str) -> torch.dtype:
    if written not in TYPES:
        raise ValueError(
            f"{file} holds {name} as {written}, which must be one of {', '.join(TYPES)}: use the official weights, or "
            "convert these to BF16."
        )
    return TYPES[written]


@torch.inference_mode()  # as everywhere where weights are only used; threads do not inherit it
def _read(file: Path, pieces: deque[_Piece], size: int, device: torch.device) -> None:
    """What one thread does: take piece after piece, as long as there are any, through its own file and stream."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    with open(file, "rb", buffering=0) as source, torch.cuda.stream(stream) if stream else nullcontext():
        try:
            for stage, piece in zip(cycle([_Stage(size, device), _Stage(size, device)]), _taken(pieces), strict=False):
                stage.move(piece, source)
        finally:
            pieces.clear()  # after an error or an interrupt the other threads end with the piece at hand
            if stream:
                stream.synchronize()


def _taken(pieces: deque[_Piece]) -> Iterator[_Piece]:
    """The pieces that no other thread has taken."""
    while True:
        try:
            piece = pieces.popleft()
        except IndexError:
            return
        yield piece


class _Stage:
    """A buffer between the file and the device, and the event after which it may be written again."""

    def __init__(self, size: int, device: torch.device):
        on_card = device.type == "cuda"
        self.buffer = torch.empty(size, dtype=torch.uint8, pin_memory=on_card)  # unpinned, a copy would block
        self.copied = torch.cuda.Event() if on_card else None

    def move(self, piece: _Piece, source: FileIO) -> None:
        if self.copied:
            self.copied.synchronize()
        values = self.buffer[: piece.size]
        _fill(values, source, piece.start)
        piece.target.copy_(values.view(piece.dtype), non_blocking=True)
        if self.copied:
            self.copied.record()


def _fill(values: Tensor, source: FileIO, start: int) -> None:
    """Bytes of the file from `start`, until `values` is full."""
    source.seek(start)
    rest = memoryview(values.numpy())
    while rest:
        count = source.readinto(rest)
        if not count:
            raise damaged(Path(source.name), f"it ends {len(rest):,} bytes too early")
        rest = rest[count:]
