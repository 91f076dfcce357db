"""DFloat11: bfloat16 weights without loss in about 11 bits each (LeanModels/DFloat11; arXiv 2504.11651).

A bfloat16 number is a sign, 8 bits of exponent and 7 of mantissa. Sign and mantissa are stored as they are, in a byte;
exponents, of which a trained model uses few, become codes of 1 to 32 bits in one stream, the first bit of a byte
first. So that a card can start everywhere, the stream is cut into pieces of 8 bytes, one for each of a card's threads,
and blocks of 512 of them: of each piece the place of the first code that starts in it is stored (5 bits), of each
block the number of that code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from math import prod

import numpy as np
import torch
from torch import Tensor

from .df11_codes import END, LONGEST, Codes, decoding_table, exponent_codes, lookup_tables

BYTES, THREADS = 8, 512  # of a piece of the stream; of a block of pieces
_BITS = 8 * BYTES
# Weights, and pieces of the stream, that are worked on at a time: small enough for the processor's cache.
_WEIGHTS, _PIECES = 2**17, 2**14


@dataclass(frozen=True)
class Block:
    """Compressed weights of some tensors, one behind the other, under the names and in the types of a DFloat11 file.

    `luts` uint8 [tables + 1, 256]: tables by which codes are read, then the length of every exponent's code.
    `encoded_exponent` uint8 [bytes]: the codes. `sign_mantissa` uint8 [weights].
    `output_positions` uint8 [4 * (blocks + 1)]: as uint32 the number of the first weight of every block of 4096 bytes
    of codes, then the number of weights. `gaps` uint8 [320 * blocks]: 5 bits for every 8 bytes of codes, the place of
    the first code there. `split_positions` int64 [tensors - 1]: the number of every tensor's first weight but the
    first's.
    """

    luts: Tensor
    encoded_exponent: Tensor
    sign_mantissa: Tensor
    output_positions: Tensor
    gaps: Tensor
    split_positions: Tensor

    @property
    def weights(self) -> int:
        return self.sign_mantissa.numel()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.parts().values())

    @property
    def sizes(self) -> list[int]:
        """Weights of each tensor."""
        return np.diff([0, *self.split_positions.tolist(), self.weights]).tolist()

    def parts(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    def positions(self) -> Tensor:
        """`output_positions` as numbers, int64."""
        return torch.from_numpy(self.output_positions.numpy().view("<u4").astype(np.int64))

    def check(self) -> None:
        """Raises ValueError where the parts do not belong together."""
        for name, right, what in self._rules():
            if not right:
                raise ValueError(f"{name} {what}")

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        for name, tensor in self.parts().items():
            kind = torch.int64 if name == "split_positions" else torch.uint8
            yield name, tensor.dtype == kind, f"is of type {tensor.dtype} instead of {kind}"
        yield "luts", self.luts.ndim == 2 and len(self.luts) > 1 and self.luts.shape[1] == 256, "is no list of tables"
        lengths = self.luts[-1]
        yield "luts", int(lengths.max()) <= LONGEST, f"tells of a code of {int(lengths.max())} bits"
        yield "luts", bool(lengths.any()) or not self.weights, "tells of no code"
        blocks = -(-self.encoded_exponent.numel() // (BYTES * THREADS))
        found, needed = self.gaps.numel(), 5 * THREADS // 8 * blocks
        yield "gaps", found == needed, f"has {found} bytes instead of {needed}"
        found = self.output_positions.numel()
        # The last block may hold nothing but the end of a code that starts before.
        yield "output_positions", found in (4 * blocks, 4 * blocks + 4), f"has {found} bytes for {blocks} blocks"
        last = int(self.positions()[-1]) if found else 0
        yield "output_positions", last == self.weights, f"ends at weight {last} of {self.weights}"
        yield "split_positions", min(self.sizes) >= 0, "does not rise"


def compress(tensors: Sequence[Tensor]) -> Block:
    """One block of bfloat16 tensors of any shapes and values.

    The bytes are those that the dfloat11 package makes. Raises ValueError for tensors of another type or none at all.
    """
    if not tensors or any(tensor.dtype != torch.bfloat16 for tensor in tensors):
        kinds = ", ".join(sorted({str(tensor.dtype) for tensor in tensors})) or "nothing"
        raise ValueError(f"DFloat11 compresses torch.bfloat16, not {kinds}: convert the weights to bfloat16 first.")
    exponents, rest, counts = _split(tensors)
    codes = exponent_codes(counts)
    encoded, gaps, positions = _encode(exponents, codes, counts)
    splits = np.cumsum([tensor.numel() for tensor in tensors], dtype=np.int64)[:-1]
    parts = lookup_tables(codes), encoded, rest, positions.astype("<u4").view(np.uint8), gaps, splits
    return Block(*(torch.from_numpy(part) for part in parts))


def decompress(block: Block, shapes: Sequence[Sequence[int]] | None = None) -> list[Tensor]:
    """The tensors of a block, as they were, on the processor; without `shapes` as vectors.

    Raises ValueError for shapes that do not fit the block, and for a damaged block.
    """
    block.check()
    exponents, rest = _decode(block), block.sign_mantissa.numpy()
    numbers = np.empty(block.weights, np.uint16)
    for part in _parts(block.weights):
        signs = (rest[part] & np.uint8(128)).astype(np.uint16) << 8
        numbers[part] = signs | exponents[part].astype(np.uint16) << 7 | rest[part] & np.uint8(127)
    return views(torch.from_numpy(numbers.view(np.int16)).view(torch.bfloat16), block, shapes)


def views(numbers: Tensor, block: Block, shapes: Sequence[Sequence[int]] | None = None) -> list[Tensor]:
    """The tensors of a block within its decoded weights [weights], of these shapes, otherwise as vectors.

    Raises ValueError for shapes that do not fit the block.
    """
    shapes = [(size,) for size in block.sizes] if shapes is None else shapes
    if [prod(shape) for shape in shapes] != block.sizes:
        raise ValueError(
            f"Tensors of {', '.join(str(list(shape)) for shape in shapes)} do not fit a DFloat11 block of "
            f"{', '.join(map(str, block.sizes))} weights: use the configuration that belongs to these weights."
        )
    return [part.view(tuple(shape)) for part, shape in zip(numbers.split(block.sizes), shapes, strict=True)]


def _parts(count: int, most: int = _WEIGHTS) -> Iterator[slice]:
    return (slice(begin, min(begin + most, count)) for begin in range(0, count, most))


def _split(tensors: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Exponents, signs with mantissas, both uint8 [weights], and how often each exponent occurs [256]."""
    count = sum(tensor.numel() for tensor in tensors)
    exponents, rest, counts = np.empty(count, np.uint8), np.empty(count, np.uint8), np.zeros(256, np.int64)
    begin = 0
    for tensor in tensors:
        numbers = tensor.detach().cpu().contiguous().view(-1).view(torch.int16).numpy().view(np.uint16)
        for part in _parts(len(numbers)):
            here = slice(begin + part.start, begin + part.stop)
            exponents[here] = numbers[part] >> 7
            rest[here] = (numbers[part] >> 8) & 128 | numbers[part] & 127
            counts += np.bincount(exponents[here], minlength=256)
        begin += len(numbers)
    return exponents, rest, counts


class _Codes:
    """Codes by exponent, and of two exponents that follow each other at once: both fit 64 bits."""

    def __init__(self, codes: Codes):
        self.bits, self.lengths = np.zeros(256, np.uint64), np.zeros(256, np.uint64)
        for symbol, (length, bits) in codes.items():
            if symbol != END:
                self.bits[symbol], self.lengths[symbol] = bits << (_BITS - length), length
        # Row: the second exponent, column: the first, as in the two bytes of a little-endian number.
        self.pairs = (self.bits[None] | self.bits[:, None] >> self.lengths[None]).ravel()
        self.pair_lengths = (self.lengths[None] + self.lengths[:, None]).ravel()
        self.end_length, self.end_bits = codes[END]

    def end(self, total: int) -> tuple[np.ndarray, np.ndarray]:
        """What fills the last byte after `total` bits: as much of the end mark's code as it takes."""
        room = -total % 8
        code = self.end_bits << (_BITS - self.end_length) >> (_BITS - room) << (_BITS - room)
        return np.array([code], np.uint64), np.array([room], np.uint64)


def _encode(exponents: np.ndarray, codes: Codes, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The stream of codes, and where its pieces and blocks start: gaps and output positions (as numbers)."""
    table = _Codes(codes)
    total = int((counts * table.lengths.astype(np.int64)).sum())
    stream = _Stream(total)
    for part in _parts(len(exponents) - 1):
        pairs = exponents[part][: (part.stop - part.start) // 2 * 2].view("<u2")
        code, length = table.pairs[pairs], table.pair_lengths[pairs]
        stream.add(part.start + 2 * np.arange(len(pairs)), code, length, table.lengths[pairs & 255])
    # The last one or two exponents alone: a pair's second code would be missed as the only one of a piece.
    alone = exponents[(len(exponents) - 1) // 2 * 2 :]
    stream.add(np.arange(len(exponents) - len(alone), len(exponents)), table.bits[alone], table.lengths[alone])
    stream.add(np.array([len(exponents)]), *table.end(total))
    return stream.bytes(total), *stream.starts(total, len(exponents))


class _Stream:
    """Codes put together in words of 64 bits, which are the pieces of a stream, and where pieces start."""

    def __init__(self, total: int):
        self.words = np.zeros(total // _BITS + 2, np.uint64)
        # Of every piece the place of its first code, and the number of that code.
        self.gaps, self.firsts = np.zeros(len(self.words), np.uint8), np.zeros(len(self.words), np.uint32)
        self.length, self.pieces = 0, 0
        self.last_second = -1  # where the second code of the last pair starts

    def add(self, number: np.ndarray, code: np.ndarray, length: np.ndarray, first: np.ndarray | int = 0) -> None:
        """Append codes or pairs of them, left-justified in 64 bits, and the numbers of their weights.

        `length` uint64: bits of each. `first` uint64: bits of a pair's first code, 0 for a code alone.
        """
        if not length.any():
            return
        length = length.astype(np.int64)
        begin = self.length + np.cumsum(length) - length
        word, offset = begin >> 6, (begin & 63).astype(np.uint64)
        turns = np.flatnonzero(np.diff(word, prepend=-1))
        lasts = np.append(turns[1:], len(word)) - 1
        self.words[word[turns]] += np.add.reduceat(code >> offset, turns)
        # What of a word's last pair does not fit it.
        spill = np.where(offset[lasts] > 0, code[lasts] << (-offset[lasts] & np.uint64(63)), np.uint64(0))
        self.words[word[lasts] + 1] += spill
        second = begin + np.asarray(first).astype(np.int64)
        self._note_starts(turns[word[turns] >= self.pieces], number, begin, np.append(self.last_second, second))
        self.length, self.pieces = int(begin[-1] + length[-1]), int(word[-1]) + 1
        self.last_second = int(second[-1])

    def _note_starts(self, turns: np.ndarray, number: np.ndarray, begin: np.ndarray, second: np.ndarray) -> None:
        """A piece's first code is that of the first pair that starts there, or the second one of the pair before."""
        pieces = begin[turns] >> 6
        early = second[turns] >= pieces * _BITS
        self.gaps[pieces] = np.where(early, second[turns], begin[turns]) - pieces * _BITS
        self.firsts[pieces] = number[turns] - early

    def bytes(self, total: int) -> np.ndarray:
        return self.words.astype(">u8").view(np.uint8)[: -(-total // 8)].copy()

    def starts(self, total: int, weights: int) -> tuple[np.ndarray, np.ndarray]:
        """Gaps, five bits each, one for every thread of every block; output positions."""
        blocks = -(-total // (_BITS * THREADS))
        gaps = np.zeros(blocks * THREADS, np.uint8)
        gaps[: self.pieces] = self.gaps[: self.pieces]
        packed = np.packbits(np.unpackbits(gaps[:, None], axis=1)[:, 3:])
        return packed, np.append(self.firsts[: self.pieces : THREADS], np.uint32(weights))


def _decode(block: Block) -> np.ndarray:
    """The exponents of a block, uint8 [weights]."""
    table = decoding_table(block.luts.numpy()).ravel()
    words, gaps = _pieces(block)
    exponents, found = np.empty(block.weights, np.uint8), 0
    for part in _parts(len(words) - 1, _PIECES):
        some = _decode_pieces(table, words[part], words[part.start + 1 : part.stop + 1], gaps[part])
        some = some[: block.weights - found]
        exponents[found : found + len(some)] = some
        found += len(some)
    if found < block.weights:
        raise ValueError(f"encoded_exponent holds {found} codes for {block.weights} weights")
    return exponents


def _pieces(block: Block) -> tuple[np.ndarray, np.ndarray]:
    """The stream as words, uint64 [pieces + 1], and the place of the first code in each, uint64 [pieces]."""
    pieces = -(-block.encoded_exponent.numel() // BYTES)
    stream = np.zeros((pieces + 1) * BYTES, np.uint8)
    stream[: block.encoded_exponent.numel()] = block.encoded_exponent.numpy()
    bits = np.unpackbits(block.gaps.numpy())[: 5 * pieces].reshape(pieces, 5)
    return stream.view(">u8").astype(np.uint64), (bits @ np.array([16, 8, 4, 2, 1], np.uint8)).astype(np.uint64)


def _decode_pieces(table: np.ndarray, word: np.ndarray, following: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The symbols of all codes that start in these pieces, in order."""
    columns, live = [], []
    for _ in range(_BITS):  # no more than that, whatever the tables say
        if (at >= _BITS).all():
            break
        live.append(at < _BITS)
        place = np.minimum(at, np.uint64(63))
        bits = word << place | following >> np.uint64(1) >> np.uint64(63) - place
        entry = table[bits >> np.uint64(56)]
        for level in range(1, 4):
            rest = np.flatnonzero(entry < 256)
            byte = (bits[rest] >> np.uint64(56 - 8 * level)).astype(np.uint8)
            entry[rest] = table[entry[rest].astype(np.int64) * 256 + byte]
        columns.append(entry.astype(np.uint8))
        at = at + (entry >> 8).astype(np.uint64)
    return np.stack(columns, 1)[np.stack(live, 1)]
