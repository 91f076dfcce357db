"""All layers of the decoder through kernels: the same numbers as `decoder` writes them, in far less time.

Between the matrix products, which the library does, each kernel does all that can be done with what it has read. The
tokens of the two experts lie apart, so nothing is sliced or joined between layers; sums of residuals are done in
place.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Joined, RMSNorm, scaled_product


def run_layers(
    layers: nn.ModuleList,
    kernels: ModuleType,
    x: Tensor,
    und_tokens: int,
    rope: tuple[Tensor, Tensor],
    sights: Sequence,
) -> Tensor:
    """Tokens x [batch, n, hidden] through all layers, the first `und_tokens` through the understanding expert.

    `kernels`: the module; `rope`: cosines and sines [batch, n, 1, head_dim]; `sights`: as `context.Sight`, for equal
    parts of the batch.
    """
    spans = (("", 0, und_tokens), ("_moe_gen", und_tokens, x.shape[1]))
    parts = [_Part(kernels, x, rope, *span) for span in spans if span[1] < span[2]]
    share = len(x) // len(sights)
    for index, layer in enumerate(layers):
        for part in parts:
            part.project(layer)
        for number, sight in enumerate(sights):
            samples = slice(number * share, (number + 1) * share)
            q = x.new_empty(share, x.shape[1], x.shape[2] // layer.self_attn.head_dim, layer.self_attn.head_dim)
            for part in parts:
                part.place(layer, index, samples, q, sight)
            attended = sight.look(index, q).flatten(-2)
            for part in parts:
                part.attended[samples] = attended[:, part.first : part.last]
        for part in parts:
            part.finish(layer)
    return torch.cat([part.end() for part in parts], dim=1)


class _Part:
    """The tokens of one expert: `x` [batch, n, hidden] is their own, and `more` is still to be added to it."""

    def __init__(self, kernels: ModuleType, x: Tensor, rope: tuple[Tensor, Tensor], suffix: str, first: int, last: int):
        self.kernels, self.suffix, self.first, self.last = kernels, suffix, first, last
        self.x = x[:, first:last].clone()
        self.rope = tuple(table[:, first:last, 0] for table in rope)
        self.more: Tensor | None = None
        self.attended = torch.empty_like(self.x)

    def project(self, layer: nn.Module) -> None:
        """Merged q, k and v of all tokens; in FP8 without their bias."""
        self.joined = self._of(layer.self_attn, "q_proj").joined
        self.rows = self._product(self._normed(self._of(layer, "input_layernorm"), self.joined), self.joined)

    def place(self, layer: nn.Module, index: int, samples: slice, q: Tensor, sight) -> None:
        """The queries of some samples into q [samples, tokens, heads, d], keys and values to their slots."""
        bias = None if self.joined.scale is None else self.joined.bias
        self.kernels.place_heads(
            self.rows[samples], bias, layer.self_attn.norms(self.suffix), tuple(table[samples] for table in self.rope),
            q, sight.keys[index], sight.values[index], sight.slot, self.first, sight.index,
        )  # fmt: skip

    def finish(self, layer: nn.Module) -> None:
        """From attended values to the layer's end."""
        joined = self._of(layer.self_attn, "o_proj").joined
        rows = (self.attended, None) if joined.scale is None else self.kernels.round_rows(self.attended)
        self._add(rows, joined)
        mlp = self._of(layer, "mlp")
        joined = mlp.gate_proj.joined
        both = self._product(self._normed(self._of(layer, "post_attention_layernorm"), joined), joined)
        joined = mlp.down_proj.joined
        self._add(self.kernels.gate_rows(both, joined.scale is not None), joined)

    def end(self) -> Tensor:
        """The tokens after the last layer."""
        return self.x if self.more is None else self.x + self.more

    def _of(self, module: nn.Module, name: str) -> nn.Module:
        return getattr(module, f"{name}{self.suffix}")

    def _normed(self, norm: RMSNorm, joined: Joined) -> tuple[Tensor, Tensor | None]:
        more, self.more = self.more, None
        return self.kernels.norm_rows(self.x, norm.weight, norm.eps, more, joined.scale is not None)

    def _product(self, rows: tuple[Tensor, Tensor | None], joined: Joined) -> Tensor:
        values, scale = rows
        if joined.scale is None:
            return F.linear(values, joined.matrix(), joined.bias)
        made = scaled_product(values.view(-1, values.shape[-1]), scale, joined, self.x.dtype)
        return made.view(*values.shape[:-1], -1)

    def _add(self, rows: tuple[Tensor, Tensor | None], joined: Joined) -> None:
        """Add a product to x: within the product itself, or, where the library cannot, together with the next norm."""
        if joined.scale is None:
            values = rows[0]
            self.x.view(-1, self.x.shape[-1]).addmm_(values.view(-1, values.shape[-1]), joined.matrix().T)
        else:
            self.more = self._product(rows, joined)
