"""DFloat11 blocks on a card: brought there once, decoded into a buffer of the caller's as often as they are needed.

The file's own index lets threads start at every eighth byte of the codes, each then finding a different number of
weights: they must be counted before any can be written. Here the card makes another index once, when a block is
brought: of every 128th weight the place of its code, in a few bytes more than the file's gaps take. From it every
thread decodes as many weights as all others, in one pass, and any part of a block can be had alone.

Importing this module needs the triton package; everything that runs without it stays outside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..memory import current
from .df11 import BYTES, THREADS, Block
from .df11_codes import decoding_table

# Weights that a thread decodes, and those of them that it holds until they are written.
_GROUP, _HELD = 128, 32
# Threads of a program: one warp, in which the question whether any code is a long one costs little.
_LANES = 32


@dataclass(frozen=True)
class CardBlock:
    """A block on its device, as `decode` reads it.

    `words` int32: the codes, 32 bits each, the first bit the highest. `starts` int32: of every 128th weight the place
    of its code's first bit. `sign_mantissa` uint8, filled up to whole groups of weights. `table` uint16 [tables, 256]:
    `df11_codes.decoding_table`.
    """

    words: Tensor
    starts: Tensor
    sign_mantissa: Tensor
    table: Tensor
    weights: int

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.words, self.starts, self.sign_mantissa, self.table))


@triton.jit
def _open(words_at, start):
    """Readers of the codes from bit `start`: two words, the place in the first, the word after them and its number."""
    word = (start >> 5).to(tl.int32)
    high = tl.load(words_at + word).to(tl.uint32, bitcast=True)
    low = tl.load(words_at + word + 1).to(tl.uint32, bitcast=True)
    ahead = tl.load(words_at + word + 2).to(tl.uint32, bitcast=True)
    return high, low, (start & 31).to(tl.int32), ahead, word + 2


@triton.jit
def _next(words_at, table_at, high, low, place, ahead, word):
    """256 * length + symbol of the next code, and the readers after it."""
    bits = (((high.to(tl.uint64) << 32) | low.to(tl.uint64)) << place.to(tl.uint64)) >> 32
    bits = bits.to(tl.uint32)
    entry = tl.load(table_at + (bits >> 24).to(tl.int32)).to(tl.int32)
    if tl.min(entry, 0) < 256:
        for level in tl.static_range(1, 4):
            byte = (bits >> (24 - 8 * level)).to(tl.int32) & 255
            deeper = table_at + (entry << 8) + byte
            entry = tl.load(deeper, mask=entry < 256, other=entry.to(tl.uint16)).to(tl.int32)
    place += entry >> 8
    over = place >= 32
    place &= 31
    high = tl.where(over, low, high)
    low = tl.where(over, ahead, low)
    word += over.to(tl.int32)
    # Asked for long before it is needed.
    ahead = tl.load(words_at + word, mask=over, other=ahead.to(tl.int32, bitcast=True)).to(tl.uint32, bitcast=True)
    return entry, high, low, place, ahead, word


@triton.jit
def _four(words_at, table_at, high, low, place, ahead, word):
    """The next four symbols, the first in the lowest byte, and the readers after them."""
    symbols = tl.zeros_like(place)
    for byte in tl.static_range(4):
        entry, high, low, place, ahead, word = _next(words_at, table_at, high, low, place, ahead, word)
        symbols |= (entry & 255) << (8 * byte)
    return symbols, high, low, place, ahead, word


@triton.jit
def _decode(
    words_at, starts_at, rest_at, table_at, out_at, first, last, GROUP: tl.constexpr, HELD: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    group = first // GROUP + tl.program_id(0) * LANES + tl.arange(0, LANES)
    begin = group.to(tl.int64) * GROUP
    real = begin < last
    start = tl.load(starts_at + group, mask=real, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
    high, low, place, ahead, word = _open(words_at, start)
    for done in range(0, GROUP, HELD):
        a, high, low, place, ahead, word = _four(words_at, table_at, high, low, place, ahead, word)
        b, high, low, place, ahead, word = _four(words_at, table_at, high, low, place, ahead, word)
        c, high, low, place, ahead, word = _four(words_at, table_at, high, low, place, ahead, word)
        d, high, low, place, ahead, word = _four(words_at, table_at, high, low, place, ahead, word)
        e, high, low, place, ahead, word = _four(words_at, table_at, high, low, place, ahead, word)
        f, high, low, place, ahead, word = _four(words_at, table_at, high, low, place, ahead, word)
        g, high, low, place, ahead, word = _four(words_at, table_at, high, low, place, ahead, word)
        h, high, low, place, ahead, word = _four(words_at, table_at, high, low, place, ahead, word)
        # Every join adds a lower bit to the place: a, b, c ... come out in order.
        even = tl.join(tl.join(a, e), tl.join(c, g))
        odd = tl.join(tl.join(b, f), tl.join(d, h))
        fours = tl.reshape(tl.join(even, odd), [LANES, HELD // 4])
        exponents = (fours[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :]) & 255
        exponents = tl.reshape(exponents, [LANES, HELD])
        places = (begin + done)[:, None] + tl.arange(0, HELD)[None, :]
        rest = tl.load(rest_at + places, mask=real[:, None], other=0).to(tl.int32)
        numbers = (((rest & 128) << 8) | (exponents << 7) | (rest & 127)).to(tl.int16)
        tl.store(out_at + (places - first), numbers, mask=(places >= first) & (places < last))


@triton.jit
def _count_codes(
    words_at, gaps_at, table_at, firsts_at, starts_at, counts_at, pieces, gap_bytes, weights, steps,
    GROUP: tl.constexpr, MARK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Codes that start in every piece of 64 bits; with MARK the places of every 128th, from pieces' first numbers."""
    piece = tl.program_id(0) * LANES + tl.arange(0, LANES)
    real = piece < pieces
    # Five bits out of two bytes.
    bit = piece.to(tl.int64) * 5
    both = tl.load(gaps_at + bit // 8, mask=real, other=0).to(tl.int32) << 8
    both |= tl.load(gaps_at + bit // 8 + 1, mask=real & (bit // 8 + 1 < gap_bytes), other=0).to(tl.int32)
    place = (both >> (11 - bit % 8).to(tl.int32)) & 31
    start = tl.where(real, piece, 0).to(tl.int64) * 64
    high, low, at, ahead, word = _open(words_at, start + place)
    count = tl.zeros_like(place)
    first = place.to(tl.int64)
    if MARK:
        first = tl.load(firsts_at + piece, mask=real, other=0)
    for _ in range(steps):
        inside = real & (place < 64)
        if MARK:
            number = first + count
            mark = inside & (number % GROUP == 0) & (number < weights)
            tl.store(starts_at + number // GROUP, (start + place).to(tl.int32), mask=mark)
        entry, high, low, at, ahead, word = _next(words_at, table_at, high, low, at, ahead, word)
        count += inside.to(tl.int32)
        place += entry >> 8
    if not MARK:
        tl.store(counts_at + piece, count, mask=real)


def load(block: Block, device: torch.device) -> CardBlock:
    """A block on the card. Raises ValueError where its parts do not belong together."""
    block.check()
    table = torch.from_numpy(decoding_table(block.luts.numpy())).to(device)
    words, gaps = _words(block.encoded_exponent.to(device)), block.gaps.to(device)
    rest = block.sign_mantissa.to(device)
    if block.weights % _GROUP:
        rest = torch.cat([rest, rest.new_zeros(-block.weights % _GROUP)])
    with current(device):
        starts = _starts(block, words, gaps, table)
    return CardBlock(words, starts, rest, table, block.weights)


def decode(block: CardBlock, out: Tensor, first: int = 0, last: int | None = None) -> Tensor:
    """Weights `first` up to `last` of a block, all unless told otherwise, into `out`, bfloat16, flat: what is filled.

    They go to the current card, which must be the block's. Fastest where `first` and the address of `out` are divisible
    by 16. Raises ValueError for an `out` that does not take them or is of another type or not contiguous.
    """
    last = block.weights if last is None else last
    if not 0 <= first <= last <= block.weights:
        raise ValueError(f"Weights {first} to {last} are not all in a DFloat11 block of {block.weights}.")
    if out.dtype != torch.bfloat16 or not out.is_contiguous() or out.numel() < last - first:
        raise ValueError(
            f"{last - first} weights of a DFloat11 block do not fit {list(out.shape)} of {out.dtype}: decode them into "
            "a contiguous bfloat16 tensor of at least that size."
        )
    made = out.view(-1)[: last - first]
    if last > first:
        grid = (triton.cdiv(last - first // _GROUP * _GROUP, _GROUP * _LANES),)
        _decode[grid](
            block.words, block.starts, block.sign_mantissa, block.table, made.view(torch.int16), first, last,
            GROUP=_GROUP, HELD=_HELD, LANES=_LANES, num_warps=1,
        )  # fmt: skip
    return made


def _words(encoded: Tensor) -> Tensor:
    """Bytes as big-endian words of 32 bits, int32, with some more: what follows the last code is read like a code."""
    count = encoded.numel()
    padded = encoded.new_zeros(-(-count // BYTES) * BYTES + 4 * (_GROUP + 4))
    padded[:count] = encoded
    return padded.view(-1, 4).flip(1).contiguous().view(torch.int32).view(-1)


def _starts(block: Block, words: Tensor, gaps: Tensor, table: Tensor) -> Tensor:
    """Where the code of every 128th weight starts, int32 (as unsigned) [groups].

    Raises ValueError where the codes are not as many as the file says.
    """
    if block.encoded_exponent.numel() >= 2**29:
        raise ValueError(f"encoded_exponent has {block.encoded_exponent.numel()} bytes; fewer than {2**29} can be read")
    device, pieces = words.device, -(-block.encoded_exponent.numel() // BYTES)
    counts = torch.empty(pieces, dtype=torch.int32, device=device)
    starts = torch.empty(-(-block.weights // _GROUP), dtype=torch.int32, device=device)
    if not pieces:
        return starts
    lengths = block.luts[-1]
    steps = triton.cdiv(8 * BYTES, int(lengths[lengths > 0].min()))
    firsts = counts
    for mark in (False, True):
        _count_codes[(triton.cdiv(pieces, _LANES),)](
            words, gaps, table, firsts, starts, counts, pieces, gaps.numel(), block.weights, steps,
            GROUP=_GROUP, MARK=mark, LANES=_LANES, num_warps=1,
        )  # fmt: skip
        firsts = counts.cumsum(0) - counts
    told = block.positions()
    found = firsts[::THREADS][: len(told) - 1].cpu()
    if not torch.equal(found, told[:-1]) or int(firsts[-1] + counts[-1]) < block.weights:
        raise ValueError("encoded_exponent does not hold the codes that output_positions tells")
    return starts
