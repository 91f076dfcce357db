"""What a model has read so far: keys and values in buffers of fixed size, and a length.

    slots:   [ scratch | token 0, token 1, ...            | free ]
                       ^ start                  ^ start + length

Appending writes behind the last token and never moves what is there. A picture being denoised writes its keys into
the scratch slots directly in front of the first token, so that it reads "itself and the context" as one slice; and
since full attention does not care about order, it reads "itself and a *prefix* of the context" as one slice too.
That is how the text-guidance branch shares the conditional branch's buffers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .config import DecoderConfig
from .layers import AttentionKernel


def check_length(tokens: int, limit: int) -> None:
    """Raise ValueError when a sequence of `tokens` is longer than the model's `limit`."""
    if tokens > limit:
        raise ValueError(
            f"The context would hold {tokens} tokens; the model was built for {limit}: "
            "give fewer or smaller pictures, or a shorter text."
        )


@dataclass(frozen=True)
class Mark:
    """A place in a context: slots used, and for each sample its tokens and next rope position."""

    length: int
    tokens: tuple[int, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Sight:
    """An `Attend`: new tokens' keys and values go to the slots from `slot` on, their queries look at [begin, end).

    `valid` bool [batch, end - begin] is False at padding, None where there is none.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor | None
    kernel: AttentionKernel
    slot: int
    begin: int
    end: int
    causal: bool
    index = None  # the slots do not depend on numbers on the device

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        write = slice(self.slot, self.slot + k.shape[1])
        self.keys[layer][:, write], self.values[layer][:, write] = k, v
        return self.look(layer, q)

    def look(self, layer: int, q: Tensor) -> Tensor:
        """Attended values of queries whose keys and values are in their slots."""
        keys, values = (slots[layer][:, self.begin : self.end] for slots in (self.keys, self.values))
        return self.kernel(q, keys, values, self.causal, self.valid)


@dataclass
class Context:
    """Keys and values [layers, batch, slots, kv_heads, head_dim] of a batch of equally structured sequences.

    Shorter texts of a batch are padded; `valid` [batch, slots] is False at the padding.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor
    start: int
    limit: int
    length: int = 0
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ragged: bool = False

    @classmethod
    def allocate(
        cls, config: DecoderConfig, batch: int, capacity: int, scratch: int, device: torch.device, dtype: torch.dtype
    ) -> Context:
        """An empty context for `capacity` tokens a sample, beside a block of at most `scratch` tokens."""
        slots = scratch + capacity
        shape = (config.num_hidden_layers, batch, slots, config.num_key_value_heads, config.head_dim)
        return cls(
            keys=torch.empty(shape, device=device, dtype=dtype),
            values=torch.empty(shape, device=device, dtype=dtype),
            valid=torch.ones(batch, slots, device=device, dtype=torch.bool),
            start=scratch,
            limit=config.max_position_embeddings,
            tokens=[0] * batch,
            positions=[0] * batch,
        )

    @property
    def batch(self) -> int:
        return len(self.tokens)

    @property
    def room(self) -> int:
        """Tokens that the model's limit leaves to the longest sample."""
        return self.limit - max(self.tokens)

    def mark(self) -> Mark:
        return Mark(self.length, tuple(self.tokens), tuple(self.positions))

    def at(self, mark: Mark) -> Context:
        """The context as it stood at `mark`, sharing these buffers: to be read beside, not to be appended to."""
        return replace(self, length=mark.length, tokens=list(mark.tokens), positions=list(mark.positions))

    def rewind(self, mark: Mark) -> None:
        """Forget what was appended after `mark`."""
        self.length, self.tokens, self.positions = mark.length, list(mark.tokens), list(mark.positions)
        self.valid[:, self.start + self.length :] = True

    def text_positions(self, count: int) -> Tensor:
        """Rope positions of the next `count` text tokens: int64 [batch, count]."""
        steps = torch.arange(count, device=self.keys.device)
        return self._positions()[:, None] + steps

    def block_positions(self, count: int) -> Tensor:
        """Rope positions of the next image block's `count` tokens, all the same: int64 [batch, count]."""
        return self._positions()[:, None].expand(-1, count)

    def _positions(self) -> Tensor:
        return torch.tensor(self.positions, device=self.keys.device)

    def attend_appending(self, kernel: AttentionKernel, count: int, causal: bool) -> Sight:
        """Attention of `count` new tokens to the context and themselves; their keys and values are written behind it.

        The caller calls `extend` once the tokens have gone through all layers.
        Raises ValueError when the tokens do not fit.
        """
        begin = self.next_slot(count)
        return self._sight(kernel, begin, self.start, begin + count, causal)

    def attend_beside(self, kernel: AttentionKernel, count: int) -> Sight:
        """Full attention of `count` tokens to the context and themselves; the context stays as it is.

        Raises ValueError when the scratch slots are too few or the context has used up the model's positions.
        """
        begin, end = self.start - count, self.start + self.length
        if begin < 0:
            raise ValueError(f"A block of {count} tokens needs that many scratch slots; the context has {self.start}.")
        if max(self.positions) >= self.limit:
            raise ValueError(f"The context ends at position {max(self.positions)}; the model ends at {self.limit}.")
        return self._sight(kernel, begin, begin, end, causal=False)

    def _sight(self, kernel: AttentionKernel, slot: int, begin: int, end: int, causal: bool) -> Sight:
        valid = self.valid[:, begin:end] if self.ragged else None
        return Sight(self.keys, self.values, valid, kernel, slot, begin, end, causal)

    def next_slot(self, count: int) -> int:
        """The slot of the next token. Raises ValueError where `count` tokens do not fit."""
        begin = self.start + self.length
        self._check(count, begin + count)
        return begin

    def hide(self, counts: list[int], width: int) -> None:
        """Mark the padding of the next `width` tokens, of which sample i really has `counts[i]`."""
        if min(counts) == width:
            return
        steps = torch.arange(width, device=self.keys.device)
        begin = self.start + self.length
        self.valid[:, begin : begin + width] = steps < torch.tensor(counts, device=self.keys.device)[:, None]
        self.ragged = True

    def extend(self, width: int, counts: list[int], positions: int | list[int]) -> None:
        """Count `width` appended slots: `counts[i]` real tokens and `positions` rope positions for sample i."""
        steps = [positions] * self.batch if isinstance(positions, int) else positions
        self.length += width
        self.tokens = [old + new for old, new in zip(self.tokens, counts, strict=True)]
        self.positions = [old + new for old, new in zip(self.positions, steps, strict=True)]

    def _check(self, count: int, end: int) -> None:
        check_length(max(self.tokens) + count, self.limit)
        if end > self.keys.shape[2]:
            raise ValueError(
                f"{count} tokens do not fit behind {self.length} in a context of {self.keys.shape[2] - self.start}: "
                "plan a larger capacity."
            )
