"""Triton kernels for what stands around the matrix products of the decoder's layers, and for writing text.

Between two products a layer only moves numbers, so each kernel here does all that it can with what it has read: a
norm with the sum before it, the gate, or norms, rotation and storing of a token's heads. While text is written even
the products are bound by reading the weights once: `row_product` is for a single row of activations. Sums are in
float32 and are rounded where the plain modules round their results.

Importing this module needs the triton package; everything that runs without it stays outside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of the weight and columns of it that one program holds at a time, and how many such pieces are under way.
_ROWS, _COLUMNS, _STAGES = 4, 512, 3
# Heads of a token that one program places, and numbers of a row that one gates.
_HEADS, _GATE = 8, 2048
# Bytes of weights of four bits that one program makes whole.
_PAIRS = 1024
# Keys that one program looks at a time, and programs that share the keys of one key/value head.
_KEYS, _SPLITS = 64, 32
_LOG2E = 1.4426950408889634


@triton.jit
def _row_product(
    x_at, norm_at, eps, weight_at, bias_at, scale_at, residual_at, out_at, width, count,
    HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = rows < count
    starts = rows.to(tl.int64)[:, None] * width
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    total_up = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([COLUMNS], tl.float32)
    for begin in tl.range(0, width, COLUMNS, num_stages=STAGES):
        columns = begin + tl.arange(0, COLUMNS)
        inside = columns < width
        both = real[:, None] & inside[None, :]
        x = tl.load(x_at + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            # The mean square is known at the end only: the products are scaled by it then.
            squares += x * x
            x = x * tl.load(norm_at + columns, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(weight_at + starts + columns[None, :], mask=both, other=0.0).to(tl.float32) * x[None, :]
        if GATED:
            up_at = weight_at + starts + columns[None, :] + count.to(tl.int64) * width
            total_up += tl.load(up_at, mask=both, other=0.0).to(tl.float32) * x[None, :]
    kind = out_at.dtype.element_ty
    factor = 1.0
    if HAS_NORM:
        factor = tl.rsqrt(tl.sum(squares, 0) / width + eps)
    made = tl.sum(total, 1) * factor
    if HAS_SCALE:
        made *= tl.load(scale_at + rows, mask=real, other=0.0)
    if HAS_BIAS:
        made += tl.load(bias_at + rows, mask=real, other=0.0).to(tl.float32)
    made = made.to(kind).to(tl.float32)
    if GATED:
        up = tl.sum(total_up, 1) * factor
        if HAS_SCALE:
            up *= tl.load(scale_at + count + rows, mask=real, other=0.0)
        up = up.to(kind).to(tl.float32)
        made = (made / (1.0 + tl.exp(-made))).to(kind).to(tl.float32) * up
    if HAS_RESIDUAL:
        made += tl.load(residual_at + rows, mask=real, other=0.0).to(tl.float32)
    tl.store(out_at + rows, made.to(kind), mask=real)


def row_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """One row x [width] times weight [count, width], with bias [count] and residual [count] added: [count].

    `scale` float32 [count]: of the weight's rows, where these are FP8 numbers.
    `norm` [width]: x goes through a root-mean-square norm with these weights and `eps` first. `gated`: the weight
    holds two matrices one behind the other, and the result is silu(first) * second.
    """
    count, width = weight.shape
    count = count // 2 if gated else count
    out = torch.empty(count, device=x.device, dtype=x.dtype)
    _row_product[(triton.cdiv(count, _ROWS),)](
        x, norm, eps, weight, bias, scale, residual, out, width, count,
        HAS_NORM=norm is not None, HAS_BIAS=bias is not None, HAS_SCALE=scale is not None,
        HAS_RESIDUAL=residual is not None, GATED=gated, ROWS=_ROWS, COLUMNS=_COLUMNS, STAGES=_STAGES,
    )  # fmt: skip
    return out


@triton.jit
def _place_heads(
    rows_at, bias_at, q_norm_at, k_norm_at, eps, cos_at, sin_at, index_at, q_at, keys_at, values_at,
    tokens, q_tokens, first, slot, slots, rope_sample, rope_token, rope_index,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INDEX: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0) // tokens
    token = tl.program_id(0) % tokens
    heads = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    places = tl.arange(0, PADDED)
    inside = (heads < HEADS + 2 * KV_HEADS)[:, None] & (places < HALF)[None, :]
    index = tl.load(index_at) if HAS_INDEX else 0
    in_row = heads[:, None] * 2 * HALF + places[None, :]
    row_at = rows_at + tl.program_id(0).to(tl.int64) * (HEADS + 2 * KV_HEADS) * 2 * HALF
    first_half = tl.load(row_at + in_row, mask=inside, other=0.0).to(tl.float32)
    second_half = tl.load(row_at + HALF + in_row, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        first_half += tl.load(bias_at + in_row, mask=inside, other=0.0).to(tl.float32)
        second_half += tl.load(bias_at + HALF + in_row, mask=inside, other=0.0).to(tl.float32)
    is_q, is_v = heads < HEADS, heads >= HEADS + KV_HEADS
    # Norm and rotation, which values go without.
    mean = (tl.sum(first_half * first_half, 1) + tl.sum(second_half * second_half, 1)) / (2 * HALF)
    factor = tl.rsqrt(mean + eps)[:, None]
    known = places < HALF
    q_first = tl.load(q_norm_at + places, mask=known, other=0.0).to(tl.float32)[None, :]
    k_first = tl.load(k_norm_at + places, mask=known, other=0.0).to(tl.float32)[None, :]
    q_second = tl.load(q_norm_at + HALF + places, mask=known, other=0.0).to(tl.float32)[None, :]
    k_second = tl.load(k_norm_at + HALF + places, mask=known, other=0.0).to(tl.float32)[None, :]
    normed_first = first_half * factor * tl.where(is_q[:, None], q_first, k_first)
    normed_second = second_half * factor * tl.where(is_q[:, None], q_second, k_second)
    # Cosines and sines repeat themselves in their second half.
    rope = sample * rope_sample + token * rope_token + index * rope_index
    cos = tl.load(cos_at + rope + places, mask=known, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_at + rope + places, mask=known, other=0.0).to(tl.float32)[None, :]
    kind = q_at.dtype.element_ty
    made_first = tl.where(is_v[:, None], first_half, normed_first * cos - normed_second * sin).to(kind)
    made_second = tl.where(is_v[:, None], second_half, normed_second * cos + normed_first * sin).to(kind)
    q_row = q_at + (sample * q_tokens + first + token).to(tl.int64) * HEADS * 2 * HALF
    tl.store(q_row + in_row, made_first, mask=inside & is_q[:, None])
    tl.store(q_row + HALF + in_row, made_second, mask=inside & is_q[:, None])
    here = (sample.to(tl.int64) * slots + slot + first + token + index) * KV_HEADS * 2 * HALF
    is_k = inside & (~is_q & ~is_v)[:, None]
    k_row = keys_at + here - HEADS * 2 * HALF
    tl.store(k_row + in_row, made_first, mask=is_k)
    tl.store(k_row + HALF + in_row, made_second, mask=is_k)
    v_row = values_at + here - (HEADS + KV_HEADS) * 2 * HALF
    tl.store(v_row + in_row, made_first, mask=inside & is_v[:, None])
    tl.store(v_row + HALF + in_row, made_second, mask=inside & is_v[:, None])


def place_heads(
    rows: Tensor,
    bias: Tensor | None,
    norms: tuple[Tensor, Tensor, float],
    rope: tuple[Tensor, Tensor],
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slot: int,
    first: int = 0,
    index: Tensor | None = None,
) -> None:
    """Merged q, k and v of tokens [batch, n, (heads + 2 * kv_heads) * d] -> rotated q, stored k and v.

    Token t of them is token `first + t` of q [batch, tokens, heads, d] and goes to slot `slot + first + t` of keys
    and values [batch, slots, kv_heads, d]. `bias`: where the rows lack it. `norms`: weights [d] of q's and k's norm,
    epsilon. `rope`: cosines and sines [batch, n, d] of any strides. `index` int64 [1], on the device, is added to the
    slot; `rope` may then be a table [rows, d] whose row `index` is that of all tokens.
    """
    (batch, tokens, width), (slots, kv_heads, head_dim) = rows.shape, keys.shape[1:]
    heads = width // head_dim - 2 * kv_heads
    strides = (0, 0, rope[0].stride(0)) if rope[0].ndim == 2 else (*rope[0].stride()[:2], 0)
    grid = batch * tokens, triton.cdiv(heads + 2 * kv_heads, _HEADS)
    _place_heads[grid](
        rows, bias, *norms, *rope, index, q, keys, values,
        tokens, q.shape[1], first, slot, slots, *strides,
        HEADS=heads, KV_HEADS=kv_heads, HALF=head_dim // 2, PADDED=triton.next_power_of_2(head_dim // 2), BLOCK=_HEADS,
        HAS_BIAS=bias is not None, HAS_INDEX=index is not None, num_warps=2,
    )  # fmt: skip


@triton.jit
def _scale(values):
    """What a row is divided by so that its largest number becomes FP8's largest."""
    return tl.maximum(tl.max(tl.abs(values), 0), 1e-12) / 448.0


@triton.jit
def _norm_rows(
    x_at, more_at, weight_at, eps, out_at, scale_at, width,
    HAS_MORE: tl.constexpr, ROUND: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.arange(0, PADDED)
    inside = columns < width
    here = row.to(tl.int64) * width + columns
    kind = x_at.dtype.element_ty
    x = tl.load(x_at + here, mask=inside, other=0.0).to(tl.float32)
    if HAS_MORE:
        x = (x + tl.load(more_at + here, mask=inside, other=0.0).to(tl.float32)).to(kind)
        tl.store(x_at + here, x, mask=inside)
        x = x.to(tl.float32)
    normed = (x * tl.rsqrt(tl.sum(x * x, 0) / width + eps)).to(kind).to(tl.float32)
    made = (normed * tl.load(weight_at + columns, mask=inside, other=0.0).to(tl.float32)).to(kind)
    if ROUND:
        scale = _scale(made.to(tl.float32))
        tl.store(scale_at + row, scale)
        made = made.to(tl.float32) / scale
    tl.store(out_at + here, made.to(out_at.dtype.element_ty), mask=inside)


def norm_rows(x: Tensor, weight: Tensor, eps: float, more: Tensor | None, fp8: bool) -> tuple[Tensor, Tensor | None]:
    """Root-mean-square norm of rows x [..., width], to which `more` is added first, in place.

    Comes back as it is, or with `fp8` as FP8 numbers and a scale [rows, 1] for each row.
    """
    out, scale = _like(x, x.shape, fp8)
    width = x.shape[-1]
    _norm_rows[(x.numel() // width,)](
        x, more, weight, eps, out, scale, width,
        HAS_MORE=more is not None, ROUND=fp8, PADDED=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return out, scale


@triton.jit
def _gated(both_at, row, columns, width):
    begin = 2 * row.to(tl.int64) * width
    inside = columns < width
    kind = both_at.dtype.element_ty
    gate = tl.load(both_at + begin + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both_at + begin + width + columns, mask=inside, other=0.0).to(tl.float32)
    return ((gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32) * up).to(kind)


@triton.jit
def _gate_rows(both_at, out_at, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    made = _gated(both_at, row, columns, width)
    tl.store(out_at + row.to(tl.int64) * width + columns, made, mask=columns < width)


@triton.jit
def _gate_and_round(both_at, out_at, scale_at, width, BLOCK: tl.constexpr):
    """One program for a row, which it goes through twice: the largest number must be known first."""
    row = tl.program_id(0)
    most = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, width, BLOCK):
        most = tl.maximum(most, tl.abs(_gated(both_at, row, begin + tl.arange(0, BLOCK), width).to(tl.float32)))
    scale = _scale(most)
    tl.store(scale_at + row, scale)
    for begin in range(0, width, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        made = _gated(both_at, row, columns, width).to(tl.float32) / scale
        here = out_at + row.to(tl.int64) * width + columns
        tl.store(here, made.to(out_at.dtype.element_ty), mask=columns < width)


def gate_rows(both: Tensor, fp8: bool) -> tuple[Tensor, Tensor | None]:
    """silu(first half) * second half of each row [..., 2 * width]; comes back as from `norm_rows`."""
    width = both.shape[-1] // 2
    out, scale = _like(both, (*both.shape[:-1], width), fp8)
    rows = out.numel() // width
    if fp8:
        _gate_and_round[(rows,)](both, out, scale, width, BLOCK=_GATE, num_warps=8)
    else:
        _gate_rows[rows, triton.cdiv(width, _GATE)](both, out, width, BLOCK=_GATE)
    return out, scale


@triton.jit
def _round_rows(x_at, out_at, scale_at, width, PADDED: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, PADDED)
    here = row.to(tl.int64) * width + columns
    x = tl.load(x_at + here, mask=columns < width, other=0.0).to(tl.float32)
    scale = _scale(x)
    tl.store(scale_at + row, scale)
    tl.store(out_at + here, (x / scale).to(out_at.dtype.element_ty), mask=columns < width)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows x [..., width] as FP8 numbers and a scale [rows, 1] for each."""
    out, scale = _like(x, x.shape, True)
    width = x.shape[-1]
    _round_rows[(x.numel() // width,)](x, out, scale, width, PADDED=triton.next_power_of_2(width), num_warps=8)
    return out, scale


@triton.jit
def _fill_four_bits(
    codes_at, table_at, scale_at, shift_at, out_at, pairs, group, HAS_SHIFT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Bytes of two codes each, from all rows one behind the other; a group never ends within a byte."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = pair < pairs
    both = tl.load(codes_at + pair, mask=real, other=0).to(tl.int32)
    scale = tl.load(scale_at + pair // group, mask=real, other=0.0).to(tl.float32)
    first = tl.load(table_at + (both & 15)) * scale
    second = tl.load(table_at + (both >> 4)) * scale
    if HAS_SHIFT:
        shift = tl.load(shift_at + pair // group, mask=real, other=0.0).to(tl.float32)
        first += shift
        second += shift
    place = tl.program_id(0) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    made = tl.reshape(tl.join(first, second), [2 * BLOCK])
    tl.store(out_at + place, made.to(out_at.dtype.element_ty), mask=place < 2 * pairs)


def fill_four_bits(codes: Tensor, table: Tensor, scale: Tensor, shift: Tensor | None, out: Tensor) -> None:
    """Weights of four bits into `out` [outputs, inputs]; the parts are those of `packed.FourBits`."""
    pairs = codes.numel()
    _fill_four_bits[(triton.cdiv(pairs, _PAIRS),)](
        codes, table, scale, shift, out, pairs, pairs // scale.numel(), HAS_SHIFT=shift is not None, BLOCK=_PAIRS
    )


def _like(x: Tensor, shape: tuple[int, ...], fp8: bool) -> tuple[Tensor, Tensor | None]:
    """Room for rows of `shape` and, in FP8, for their scales."""
    out = torch.empty(shape, device=x.device, dtype=torch.float8_e4m3fn if fp8 else x.dtype)
    return out, torch.empty(out.numel() // shape[-1], 1, device=x.device) if fp8 else None


@triton.jit
def _attend_part(
    q_at, keys_at, values_at, valid_at, index_at, part_at, most_at, sum_at, start, slot, scale, slots, valid_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    SPLITS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    split = tl.program_id(1)
    length = slot + tl.load(index_at) + 1 - start
    piece = tl.cdiv(tl.cdiv(length, SPLITS), KEYS) * KEYS
    begin = split * piece
    end = tl.minimum(begin + piece, length)
    # The query heads that share these keys fill a matrix of 16 rows, the fewest that the tensor cores take.
    rows = tl.arange(0, 16)
    heads = kv_head * GROUP + rows
    columns = tl.arange(0, PADDED)
    mine = (rows < GROUP)[:, None] & (columns < WIDTH)[None, :]
    at_q = (sample * HEADS + heads)[:, None] * WIDTH + columns[None, :]
    q = tl.load(q_at + at_q, mask=mine, other=0.0)
    most = tl.full([16], -1e30, tl.float32)
    total = tl.zeros([16], tl.float32)
    made = tl.zeros([16, PADDED], tl.float32)
    for first in range(begin, end, KEYS):
        tokens = first + tl.arange(0, KEYS)
        there = start + tokens
        seen = (tokens < end) & (tl.load(valid_at + sample * valid_stride + there, mask=tokens < end, other=0) != 0)
        rows_at = ((sample * slots + there).to(tl.int64) * KV_HEADS + kv_head)[:, None] * WIDTH + columns[None, :]
        inside = seen[:, None] & (columns < WIDTH)[None, :]
        k = tl.load(keys_at + rows_at, mask=inside, other=0.0)
        v = tl.load(values_at + rows_at, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, -1e30)
        higher = tl.maximum(most, tl.max(scores, 1))
        chances = tl.where(seen[None, :], tl.exp2(scores - higher[:, None]), 0.0)
        shrink = tl.exp2(most - higher)
        total = total * shrink + tl.sum(chances, 1)
        made = made * shrink[:, None] + tl.dot(chances.to(v.dtype), v, input_precision="ieee")
        most = higher
    part = (sample * HEADS + heads) * SPLITS + split
    tl.store(part_at + part[:, None] * WIDTH + columns[None, :], made, mask=mine)
    tl.store(most_at + part, most, mask=rows < GROUP)
    tl.store(sum_at + part, total, mask=rows < GROUP)


@triton.jit
def _join_parts(
    part_at, most_at, sum_at, out_at, WIDTH: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    head = tl.program_id(0)
    splits = head * SPLITS + tl.arange(0, SPLITS)
    columns = tl.arange(0, PADDED)
    most = tl.load(most_at + splits)
    weight = tl.exp2(most - tl.max(most, 0))
    total = tl.sum(weight * tl.load(sum_at + splits), 0)
    inside = (columns < WIDTH)[None, :]
    parts = tl.load(part_at + splits[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0)
    made = tl.sum(parts * weight[:, None], 0) / total
    tl.store(out_at + head * WIDTH + columns, made.to(out_at.dtype.element_ty), mask=columns < WIDTH)


def attend_growing(
    q: Tensor, keys: Tensor, values: Tensor, valid: Tensor, start: int, slot: int, index: Tensor
) -> Tensor:
    """One token's attention, q [batch, heads, d], to the slots from `start` to `slot + index`: [batch, heads, d].

    Keys and values are [batch, slots, kv_heads, d], `valid` bool [batch, slots] is False at padding, `index` int64
    [1] lies on the device: the same call stays right while the context grows. The keys of a head are shared by
    several programs, whose sums are joined at the end.
    """
    (batch, heads, width), (slots, kv_heads) = q.shape, keys.shape[1:3]
    parts = torch.empty(batch, heads, _SPLITS, width, device=q.device)
    most, total = (torch.empty(batch, heads, _SPLITS, device=q.device) for _ in range(2))
    padded = max(16, triton.next_power_of_2(width))
    _attend_part[(batch * kv_heads, _SPLITS)](
        q, keys, values, valid, index, parts, most, total, start, slot, width**-0.5 * _LOG2E, slots, valid.stride(0),
        HEADS=heads, KV_HEADS=kv_heads, GROUP=heads // kv_heads, WIDTH=width, PADDED=padded, SPLITS=_SPLITS, KEYS=_KEYS,
    )  # fmt: skip
    out = torch.empty_like(q)
    _join_parts[(batch * heads,)](parts, most, total, out, WIDTH=width, PADDED=padded, SPLITS=_SPLITS)
    return out
