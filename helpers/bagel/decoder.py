"""Mixture of Transformers: one decoder, two complete sets of weights, one shared attention.

Tokens come sorted: first those of the understanding expert (text, ViT tokens, image markers), then those of the
generation expert (latents). Inside an image block all tokens share a position and see each other, so their order
carries no meaning, and sorting them makes routing two slices instead of gathers.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import DecoderConfig
from .fused import run_layers
from .layers import RMSNorm, finite, linears, rotary_table, rotate

# What a layer asks for: (layer index, q, k, v) -> attended values [batch, n, heads, head_dim].
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class FeedForward(nn.Module):
    """Gated feed-forward (SwiGLU)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        together, down = self.over_one_input()
        gate, up = linears(x, together)
        return linears(finite(F.silu(gate) * up), down)[0]

    def over_one_input(self) -> list[list[nn.Linear]]:
        """Layers by their input: those of one group may be computed as one."""
        return [[self.gate_proj, self.up_proj], [self.down_proj]]


# What the names of each expert's weights end in: understanding, generation.
EXPERTS = ("", "_moe_gen")


class SelfAttention(nn.Module):
    """The projections of the experts."""

    def __init__(self, config: DecoderConfig, experts: tuple[str, ...]):
        super().__init__()
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.head_dim, self.experts = config.head_dim, experts
        for suffix in experts:
            self.add_module(f"q_proj{suffix}", nn.Linear(width, width))
            self.add_module(f"k_proj{suffix}", nn.Linear(width, kv_width))
            self.add_module(f"v_proj{suffix}", nn.Linear(width, kv_width))
            self.add_module(f"o_proj{suffix}", nn.Linear(width, width, bias=False))
            self.add_module(f"q_norm{suffix}", RMSNorm(config.head_dim, config.rms_norm_eps))
            self.add_module(f"k_norm{suffix}", RMSNorm(config.head_dim, config.rms_norm_eps))

    def project(self, x: Tensor, suffix: str, precise: bool) -> tuple[Tensor, Tensor, Tensor]:
        """x [batch, n, hidden] -> q [batch, n, heads, d] and k [batch, n, kv_heads, d], normalised, and v."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in linears(x, self._projections(suffix)))
        if precise:
            q, k = q.float(), k.float()
        return getattr(self, f"q_norm{suffix}")(q), getattr(self, f"k_norm{suffix}")(k), v

    def norms(self, suffix: str) -> tuple[Tensor, Tensor, float]:
        """Weights of q's and k's norm, epsilon."""
        q_norm, k_norm = (getattr(self, f"{name}_norm{suffix}") for name in "qk")
        return q_norm.weight, k_norm.weight, q_norm.eps

    def out(self, attended: Tensor, suffix: str) -> Tensor:
        """Attended values [batch, n, heads * d] -> [batch, n, hidden]."""
        return linears(attended, [getattr(self, f"o_proj{suffix}")])[0]

    def over_one_input(self) -> list[list[nn.Linear]]:
        """Layers by their input, for each expert: those of one group may be computed as one."""
        return [
            group
            for suffix in self.experts
            for group in (self._projections(suffix), [getattr(self, f"o_proj{suffix}")])
        ]

    def _projections(self, suffix: str) -> list[nn.Linear]:
        return [getattr(self, f"{name}_proj{suffix}") for name in ("q", "k", "v")]


class DecoderLayer(nn.Module):
    """Norm, attention, norm, feed-forward, each with the weights of the token's expert."""

    def __init__(self, config: DecoderConfig, experts: tuple[str, ...]):
        super().__init__()
        self.self_attn = SelfAttention(config, experts)
        for suffix in experts:
            self.add_module(f"mlp{suffix}", FeedForward(config.hidden_size, config.intermediate_size))
            self.add_module(f"input_layernorm{suffix}", RMSNorm(config.hidden_size, config.rms_norm_eps))
            self.add_module(f"post_attention_layernorm{suffix}", RMSNorm(config.hidden_size, config.rms_norm_eps))

    def project(self, x: Tensor, und_tokens: int, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [batch, n, hidden] -> rotated q and k, and v, of all tokens.

        In a pass with latents q and k stay float32 through norm and rotation, as the model was trained.
        """
        precise = und_tokens < x.shape[1]
        parts = [
            self.self_attn.project(getattr(self, f"input_layernorm{suffix}")(part), suffix, precise)
            for suffix, part in _experts(x, und_tokens)
        ]
        q, k, v = (_join(tensors) for tensors in zip(*parts, strict=True))
        return rotate(q, rope).to(v.dtype), rotate(k, rope).to(v.dtype), v

    def finish(self, x: Tensor, attended: Tensor, und_tokens: int) -> Tensor:
        """Attended values [batch, n, heads, d] -> the layer's output [batch, n, hidden]."""
        attended = attended.flatten(-2)
        parts = []
        for (suffix, part), (_, values) in zip(_experts(x, und_tokens), _experts(attended, und_tokens), strict=True):
            part = finite(part + self.self_attn.out(values, suffix))
            normed = getattr(self, f"post_attention_layernorm{suffix}")(part)
            parts.append(finite(part + getattr(self, f"mlp{suffix}")(normed)))
        return _join(parts)


class Decoder(nn.Module):
    """Embedding, layers and the final norm of each expert."""

    def __init__(self, config: DecoderConfig, experts: tuple[str, ...]):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, experts) for _ in range(config.num_hidden_layers))
        for suffix in experts:
            self.add_module(f"norm{suffix}", RMSNorm(config.hidden_size, config.rms_norm_eps))
        # The module `kernels`, where its kernels can run the layers: on the device that they will lie on.
        self.kernels: ModuleType | None = None
        self.warm: set[tuple[int, ...]] = set()  # shapes of passes whose kernels this process has used

    def forward(self, x: Tensor, und_tokens: int, positions: Tensor, *attends: Attend) -> Tensor:
        """Embedded tokens through all layers; the final norm is left to the caller.

        x [batch, n, hidden], the first `und_tokens` of them for the understanding expert; positions [batch, n].
        Several `attends` share the batch: equal parts of it, one behind the other, that differ in their contexts.
        """
        rope = rotary_table(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        if self.kernels is not None:
            return run_layers(self.layers, self.kernels, x, und_tokens, rope, attends)
        for index, layer in enumerate(self.layers):
            parts = zip(*(part.chunk(len(attends)) for part in layer.project(x, und_tokens, rope)), strict=True)
            attended = [attend(index, *part) for attend, part in zip(attends, parts, strict=True)]
            x = layer.finish(x, _join(attended, dim=0), und_tokens)
        return x


def _experts(x: Tensor, und_tokens: int) -> list[tuple[str, Tensor]]:
    """Non-empty slices of the tokens with the name suffix of their expert."""
    parts = zip(EXPERTS, (x[:, :und_tokens], x[:, und_tokens:]), strict=True)
    return [(suffix, part) for suffix, part in parts if part.shape[1]]


def _join(parts: list[Tensor] | tuple[Tensor, ...], dim: int = 1) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
