"""Small parts that several modules share: norms, rotary positions, attention, embeddings of time and place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .packed import Int8, Packed, Room


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32, rounded to the input's type before the weight is applied (Qwen2)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        precise = x.float()
        normed = precise * torch.rsqrt(precise.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class Joined(NamedTuple):
    """Weights [outputs, inputs] of layers over one input, one behind the other, and their biases.

    `scale` float32 [outputs]: the weights are FP8 numbers, to be multiplied by it.
    """

    weight: Tensor | Packed
    bias: Tensor | None
    scale: Tensor | None = None

    def matrix(self) -> Tensor:
        """The weights as they are multiplied; packed ones lie in their room, until others are made whole there."""
        return self.weight.whole() if isinstance(self.weight, Packed) else self.weight

    def for_a_row(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Weight, bias and scale of the product of a single row, whose time is that of reading the weights."""
        if isinstance(self.weight, Int8):
            return self.weight.codes, self.bias, self.weight.scale
        return self.matrix(), self.bias, self.scale


def linears(x: Tensor, layers: list[nn.Linear]) -> tuple[Tensor, ...]:
    """What each of the layers makes of x: as one product where `join` has laid their weights out for it."""
    joined = getattr(layers[0], "joined", None)
    if joined is None:
        return tuple(finite(layer(x)) for layer in layers)
    made = F.linear(x, joined.matrix(), joined.bias) if joined.scale is None else _fp8_product(x, joined)
    return finite(made).split([layer.out_features for layer in layers], dim=-1) if len(layers) > 1 else (made,)


def join(layers: list[nn.Linear], device: torch.device, dtype: torch.dtype) -> None:
    """Give layers over one input new storage, in which their weights lie one behind the other; it is not filled.

    Every layer keeps its name and its own weight, a view of the whole. Not for training, and no `.to` afterwards.
    """
    count = sum(layer.out_features for layer in layers)
    weight = torch.empty(count, layers[0].in_features, device=device, dtype=dtype)
    bias = None if layers[0].bias is None else torch.empty(count, device=device, dtype=dtype)
    _share(layers, Joined(weight, bias))


def round_to_fp8(layers: list[nn.Linear]) -> None:
    """Round joined weights to FP8 (e4m3), each row scaled so that its largest weight is the format's largest."""
    weight, bias, _ = layers[0].joined
    scale = weight.abs().amax(1).float().clamp(min=1e-12) / _FP8_MOST
    _share(layers, Joined((weight.float() / scale[:, None]).to(torch.float8_e4m3fn), bias, scale))


def pack(layers: list[nn.Linear], packer: Callable[[Tensor, Room], Packed], room: Room) -> None:
    """Replace joined weights by packed ones; the layers have none of their own any more."""
    weight, bias, _ = layers[0].joined
    _share(layers, Joined(packer(weight, room), bias))


def replace_by_packed(layers: list[nn.Linear], weight: Packed, device: torch.device, dtype: torch.dtype) -> None:
    """Give layers over one input a packed weight, and new biases, not filled, where they have any."""
    bias = None if layers[0].bias is None else torch.empty(weight.shape[0], device=device, dtype=dtype)
    _share(layers, Joined(weight, bias))


def _share(layers: list[nn.Linear], joined: Joined) -> None:
    """Every layer's weight and bias become views of the joined ones."""
    layers[0].joined = joined
    sizes = [layer.out_features for layer in layers]
    for layer in layers:
        layer.weight = None  # packed weights have no views
    weight = None if isinstance(joined.weight, Packed) else joined.weight
    for name, whole in (("weight", weight), ("bias", joined.bias)):
        for layer, part in zip(layers, [] if whole is None else whole.split(sizes), strict=False):
            setattr(layer, name, nn.Parameter(part, requires_grad=False))


_FP8_MOST = torch.finfo(torch.float8_e4m3fn).max


def finite(x: Tensor) -> Tensor:
    """Keep what float16 cannot hold at its largest number, in place: infinities would soon be no numbers at all.

    The model was trained in bfloat16, which reaches a great deal further.
    """
    return x.clamp_(-_FP16_MOST, _FP16_MOST) if x.dtype == torch.float16 else x


_FP16_MOST = torch.finfo(torch.float16).max


def _fp8_product(x: Tensor, joined: Joined) -> Tensor:
    """x [..., inputs] times FP8 weights; every row of x is scaled and rounded to FP8 as well, if it is not alone.

    A card multiplies the rounded numbers, a processor computes the same product in float32. The time of a single row
    is that of reading the weights, so rounding it would gain nothing.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) == 1:
        weight = joined.weight.float() * joined.scale[:, None]
        return F.linear(x, weight.to(x.dtype), joined.bias)
    scale = rows.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / _FP8_MOST
    made = scaled_product((rows.float() / scale).to(torch.float8_e4m3fn), scale, joined, x.dtype)
    made = made if joined.bias is None else made + joined.bias
    return made.view(*x.shape[:-1], -1)


def scaled_product(rows: Tensor, scale: Tensor, joined: Joined, dtype: torch.dtype) -> Tensor:
    """FP8 rows [n, inputs] with scales [n, 1] times FP8 weights, without bias: [n, outputs] of this type."""
    if rows.is_cuda:
        # Sums of 14 bits instead of 23 are far finer than the numbers that are summed.
        return torch._scaled_mm(rows, joined.weight.T, scale, joined.scale[None], out_dtype=dtype, use_fast_accum=True)
    return (rows.float() @ joined.weight.float().T * scale * joined.scale).to(dtype)


def rotary_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [..., 1, head_dim], for integer positions [...]; rounded to the activations' type."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None].float() * (1.0 / theta**exponents)
    angles = torch.cat([angles, angles], dim=-1)[..., None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions in Qwen2's half-and-half layout; x [..., heads, head_dim]."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


# An attention kernel: (q [batch, n, heads, d], k and v [batch, m, kv_heads, d], causal, valid) -> [batch, n, heads, d].
# `causal` aligns the last query with the last key; `valid` bool [batch, m] hides padding keys.
AttentionKernel = Callable[[Tensor, Tensor, Tensor, bool, Tensor | None], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, valid: Tensor | None = None) -> Tensor:
    """PyTorch's own attention: runs on every device."""
    mask = _mask(q.shape[1], k.shape[1], causal, valid, q.device)
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [batch, heads, tokens, d]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)


def cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, valid: Tensor | None = None) -> Tensor:
    """PyTorch's attention with the cuDNN backend where it applies: the fastest one on Hopper."""
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
        return sdpa(q, k, v, causal, valid)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, valid: Tensor | None = None) -> Tensor:
    """The flash-attn package; ragged batches go to `sdpa`, since flash-attn takes no padding mask."""
    from flash_attn import flash_attn_func

    if valid is not None:
        return sdpa(q, k, v, causal, valid)
    return flash_attn_func(q, k, v, causal=causal)


KERNELS: dict[str, AttentionKernel] = {"sdpa": sdpa, "cudnn": cudnn, "flash_attn": flash_attn}


def _mask(n: int, m: int, causal: bool, valid: Tensor | None, device: torch.device) -> Tensor | None:
    """Which key each query may see, bool, broadcastable to [batch, heads, n, m]; None where it sees all."""
    mask = None
    if causal and n > 1:
        mask = torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n)
    if valid is not None:
        keys = valid[:, None, None, :]
        mask = keys if mask is None else mask & keys
    return mask


class TimestepEmbedder(nn.Module):
    """Flow time in [0, 1] -> a vector: 128 cosines and 128 sines, then linear, SiLU, linear."""

    def __init__(self, hidden_size: int, frequencies: int = 128):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(
            nn.Linear(2 * frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        """[...] -> [..., hidden_size]"""
        steps = torch.arange(self.frequencies, device=t.device, dtype=torch.float32)
        angles = t.float()[..., None] * torch.exp(-math.log(10000.0) / self.frequencies * steps)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class PositionTable(nn.Module):
    """A stored table of side * side vectors, one for each place of a square grid."""

    def __init__(self, side: int, hidden_size: int):
        super().__init__()
        self.side = side
        self.pos_embed = nn.Parameter(torch.zeros(side * side, hidden_size), requires_grad=False)

    def forward(self, rows: Tensor) -> Tensor:
        return self.pos_embed[rows]


def sine_cosine_table(side: int, hidden_size: int) -> Tensor:
    """The table a new checkpoint starts with, float32 [side * side, hidden_size].

    First half of the channels for the column, second for the row; in each, sines then cosines.
    """
    quarter = hidden_size // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, hidden / 2]
    column = waves[None, :, :].expand(side, side, -1)
    row = waves[:, None, :].expand(side, side, -1)
    return torch.cat([column, row], dim=-1).reshape(side * side, hidden_size).float()


class MLPConnector(nn.Module):
    """ViT features -> decoder width: linear, tanh-GELU, linear."""

    def __init__(self, input_size: int, output_size: int):
        super().__init__()
        self.fc1 = nn.Linear(input_size, output_size)
        self.fc2 = nn.Linear(output_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
