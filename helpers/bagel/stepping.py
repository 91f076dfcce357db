"""The next token's logits from buffers of fixed size: every token is the same work on the same memory.

So a card can record the work of one token once and replay it for the others (`decoding`), which costs the processor
nothing; only numbers on the device count up.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from .context import Context
from .decoder import DecoderLayer
from .layers import rotary_table
from .model import Bagel


@dataclass(frozen=True)
class GrowingSight:
    """As `context.Sight`, of one token that moves on: its slot is `slot + index`, `index` int64 [1] on the device."""

    kernels: ModuleType
    context: Context
    slot: int
    index: Tensor

    @property
    def keys(self) -> Tensor:
        return self.context.keys

    @property
    def values(self) -> Tensor:
        return self.context.values

    def look(self, layer: int, q: Tensor) -> Tensor:
        """Attended values of queries [batch, 1, heads, d] whose keys and values are in their slots."""
        keys, values, context = self.keys[layer], self.values[layer], self.context
        attend = self.kernels.attend_growing
        return attend(q[:, 0], keys, values, context.valid, context.start, self.slot, self.index)[:, None]


class TokenStep:
    """Reads token `index` behind a context of which `limit` tokens are still to come.

    The context's lengths stay as they are. Raises ValueError where it has no room for `limit` tokens.
    """

    def __init__(self, model: Bagel, context: Context, limit: int):
        self.model, self.context = model, context
        self.kernels = model.language_model.model.kernels
        self.slot = context.next_slot(limit)
        self.positions = context.text_positions(limit)
        decoder = model.config.decoder
        tables = rotary_table(self.positions[0], decoder.head_dim, decoder.rope_theta, model.dtype)
        self.rope = tuple(table[:, 0] for table in tables)  # [limit, head_dim]

    def logits(self, ids: Tensor, index: Tensor) -> Tensor:
        """Token ids [batch] -> logits of the next ones, float32 [batch, vocab_size]; `index` int64 [1]."""
        x = self.model.embed_ids(ids)  # [batch, hidden]
        sight = GrowingSight(self.kernels, self.context, self.slot, index)
        return (self._one(x[0], sight)[None] if len(x) == 1 else self._several(x[:, None], sight)).float()

    def _several(self, x: Tensor, sight: GrowingSight) -> Tensor:
        language = self.model.language_model
        x = language.model(x, 1, self.positions.index_select(1, sight.index), sight)
        return language.lm_head(language.model.norm(x[:, 0]))

    def _one(self, x: Tensor, sight: GrowingSight) -> Tensor:
        """One sample, x [hidden]: a few kernels a layer, each bound by reading its weights."""
        language = self.model.language_model
        for number, layer in enumerate(language.model.layers):
            x = self._layer(layer, number, x, sight)
        norm = language.model.norm
        return self.kernels.row_product(x, language.lm_head.weight, norm=norm.weight, eps=norm.eps)

    def _layer(self, layer: DecoderLayer, number: int, x: Tensor, sight: GrowingSight) -> Tensor:
        product, attention, mlp = self.kernels.row_product, layer.self_attn, layer.mlp
        norm = layer.input_layernorm
        row = product(x, *attention.q_proj.joined.for_a_row(), norm=norm.weight, eps=norm.eps)
        keys, values = sight.keys[number], sight.values[number]
        q = x.new_empty(1, 1, x.numel() // attention.head_dim, attention.head_dim)
        self.kernels.place_heads(
            row[None, None], None, attention.norms(""), self.rope, q, keys, values, self.slot, index=sight.index
        )
        x = product(sight.look(number, q).flatten(), *attention.o_proj.joined.for_a_row(), residual=x)
        norm = layer.post_attention_layernorm
        inner = product(x, *mlp.gate_proj.joined.for_a_row(), norm=norm.weight, eps=norm.eps, gated=True)
        return product(inner, *mlp.down_proj.joined.for_a_row(), residual=x)
