"""The prefix codes that DFloat11 gives to exponents, and the tables by which codes are read.

The codes are Huffman's, built as the dfloat11 package does with dahuffman 0.4.2, so that the same weights become the
same bytes: an end mark of count 1 takes part; of two nodes of equal count the one whose first symbol is smaller comes
first, the end mark before all; the node that comes first takes bit 0. No code is longer than 32 bits.

A code is read a byte at a time through tables of 256 places. A place holds the symbol whose code ends there, or 256
minus the number of the table to go on with; from 240 on it is the latter, except in the fourth table of a chain.
(LeanModels/DFloat11; arXiv 2504.11651.)
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np

END = -1  # the end mark's symbol
LONGEST = 32  # bits of a code
JUMP = 240  # a place's smallest value that stands for another table
TABLES = 1 + 256 - JUMP
# Stands for all exponents from 240 on until each gets a code that only the fourth table ends.
_HUGE = 256
_HUGE_BITS = 28

# Symbol -> (length, bits).
Codes = dict[int, tuple[int, int]]


def exponent_codes(counts: np.ndarray) -> Codes:
    """Codes of the exponents that occur, and of the end mark; `counts` [256]: how often each exponent does.

    Where the package's own codes could not be read through the tables (an exponent from 240 on, as in infinities and
    NaN, or too many tables), flatter codes are made that its decoder reads as well.
    """
    found = {int(exponent): int(counts[exponent]) for exponent in np.flatnonzero(counts)}
    codes = _limited(found)
    return codes if max(found, default=0) < JUMP and len(_prefixes(codes)) <= TABLES else _flat(found)


def _limited(counts: dict[int, int]) -> Codes:
    """Huffman codes of at most 32 bits: the rarest symbols count as one each, more of them until no code is longer."""
    codes = _huffman({END: 1, **counts})
    rarest = 2
    while _longest(codes) > LONGEST:
        few = np.argpartition(np.array(list(counts.values())), rarest)[:rarest]
        codes = _huffman({END: 1, **counts, **{list(counts)[place]: 1 for place in few}})
        rarest += 1
    return codes


def _flat(counts: dict[int, int]) -> Codes:
    """Codes of at most 8 bits, except those of the exponents from 240 on."""
    huge = [exponent for exponent in counts if exponent >= JUMP]
    plain = {END: 1} | {exponent: count for exponent, count in counts.items() if exponent < JUMP}
    if huge:
        plain[_HUGE] = sum(counts[exponent] for exponent in huge)
    least, codes = 1, _huffman(plain)
    while _longest(codes) > 8:
        least *= 2
        codes = _huffman({symbol: max(count, least) for symbol, count in plain.items()})
    length, bits = codes.pop(_HUGE, (0, 0))
    # Counted from zero, so that the fourth table has an end at every place: the package's decoder would wait for ever
    # if what fills the last byte led to none.
    return codes | {symbol: (_HUGE_BITS, (bits << (_HUGE_BITS - length)) + rank) for rank, symbol in enumerate(huge)}


def _huffman(counts: dict[int, int]) -> Codes:
    heap = [(count, symbol, symbol) for symbol, count in counts.items()]
    heapq.heapify(heap)
    while len(heap) > 1:
        zero_count, first, zero = heapq.heappop(heap)
        one_count, _, one = heapq.heappop(heap)
        heapq.heappush(heap, (zero_count + one_count, first, (zero, one)))
    return dict(_leaves(heap[0][2]))


def _leaves(node: int | tuple, length: int = 0, bits: int = 0) -> Iterator[tuple[int, tuple[int, int]]]:
    if isinstance(node, int):
        yield node, (length, bits)
    else:
        for bit, child in enumerate(node):
            yield from _leaves(child, length + 1, 2 * bits + bit)


def _longest(codes: Codes) -> int:
    return max(length for length, _ in codes.values())


def _prefixes(codes: Codes) -> list[tuple[int, int]]:
    """Length and bits of the whole bytes that some code goes on after: each has a table, the first of them none."""
    found = {
        (taken, bits >> (length - taken))
        for symbol, (length, bits) in codes.items()
        if symbol != END
        for taken in range(0, length, 8)
    }
    return sorted(found | {(0, 0)})


def lookup_tables(codes: Codes) -> np.ndarray:
    """Tables as a file holds them, uint8 [tables + 1, 256]; the last row has the length of every symbol's code.

    A place that no code leads to repeats the one before it, over the tables' borders too, as in the package's files.
    """
    tables = {prefix: number for number, prefix in enumerate(_prefixes(codes))}
    places, lengths = np.full((len(tables), 256), -1), np.zeros((1, 256), np.uint8)
    for symbol, (length, bits) in codes.items():
        if symbol != END:
            lengths[0, symbol] = length
            _enter(places, tables, symbol, length, bits)
    known = np.flatnonzero(places >= 0)
    nearest = np.searchsorted(known, np.arange(places.size), "right") - 1
    filled = places.ravel()[known[nearest.clip(0)]] if known.size else np.zeros(places.size)
    return np.concatenate([filled.reshape(places.shape).astype(np.uint8), lengths])


def _enter(places: np.ndarray, tables: dict[tuple[int, int], int], symbol: int, length: int, bits: int) -> None:
    for taken in range(0, length, 8):
        left = length - taken
        table = tables[taken, bits >> left]
        if left <= 8:
            places[table, (bits << (8 - left)) & 255] = symbol
        else:
            places[table, (bits >> (left - 8)) & 255] = 256 - tables[taken + 8, bits >> (left - 8)]


def decoding_table(luts: np.ndarray) -> np.ndarray:
    """A file's tables in the form that our decoders read, uint16 [tables, 256].

    A place holds 256 * length + symbol where a code ends, otherwise the number of the table to go on with. Raises
    ValueError for a table that does not exist.
    """
    tables, lengths = luts[:-1].astype(np.uint16), luts[-1].astype(np.uint16)
    # What no code leads to may name a symbol without one; it must not be taken for another table.
    ends = np.maximum(lengths, 1)[tables] * 256 + tables
    decoding, seen, level = ends.copy(), {0}, {0}
    for _ in range(3):
        rows = sorted(level)
        jumps = tables[rows] >= JUMP
        decoding[rows] = np.where(jumps, 256 - tables[rows], ends[rows])
        level = {int(number) for number in np.unique(256 - tables[rows][jumps])} - seen
        seen |= level
        if level and max(level) >= len(tables):
            raise ValueError(f"a code goes on in table {max(level)} of {len(tables)}")
    return decoding
