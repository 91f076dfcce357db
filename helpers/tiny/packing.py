"""How training samples become one packed sequence: layouts of segments, their rope positions and who sees whom.

All samples of a step share one pass through the decoder's layers, so that there are few, large kernels; attention
alone is done task by task, since samples do not see each other. Source: BAGEL.md section 10 (paper, section 2.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

HIDDEN_BIAS = -30000.0  # finite, so that a padding token that may see nothing yields numbers, not NaN


@dataclass(frozen=True)
class Segment:
    """A stretch of one sample's sequence.

    `kind`: "text", "vit" (a clean picture for understanding), "vae" (a clean picture as latents) or "noised" (the
    picture to be made). `source`: which of the sample's texts or pictures. `tokens`: without the image markers.
    `drop`: chance of being hidden for guidance; `follows`: shares the draw of this earlier segment instead.
    """

    kind: str
    source: int
    tokens: int
    target: bool = False
    drop: float = 0.0
    follows: int | None = None

    @property
    def und_tokens(self) -> int:
        """Tokens that go through the understanding expert: all of a text or ViT block, the markers of the others."""
        return {"text": self.tokens, "vit": self.tokens + 2}.get(self.kind, 2)

    @property
    def gen_tokens(self) -> int:
        return self.tokens if self.kind in ("vae", "noised") else 0


class Layout:
    """The sequence that all samples of one task share; within a sample the understanding tokens come first."""

    def __init__(self, segments: list[Segment], device: torch.device):
        self.segments = segments
        self.und_tokens = sum(segment.und_tokens for segment in segments)
        self.gen_tokens = sum(segment.gen_tokens for segment in segments)
        sizes = [getattr(s, part) for part in ("und_tokens", "gen_tokens") for s in segments]
        pieces = [(i % len(segments), n) for i, n in enumerate(sizes) if n]
        self.segment = torch.cat([torch.full((n,), i) for i, n in pieces]).to(device)  # of each token
        self.step = torch.cat([torch.arange(n) for _, n in pieces]).to(device)  # within its piece
        kinds = [segment.kind for segment in segments]
        self.is_text = torch.tensor([kind == "text" for kind in kinds], device=device)
        self.is_noised = torch.tensor([kind == "noised" for kind in kinds], device=device)
        self.drop = torch.tensor([segment.drop for segment in segments], device=device)
        self.base = self._base()

    def starts(self, part: str) -> list[int]:
        """Where each segment's und_tokens (or gen_tokens) begin among the sample's und (or gen) tokens."""
        return [0, *accumulate(getattr(segment, part) for segment in self.segments)][:-1]

    def _base(self) -> Tensor:
        """Who sees whom if nothing is dropped or padded: bool [tokens, tokens], query by key."""
        q, k = self.segment[:, None], self.segment[None, :]
        earlier = (k < q) & ~self.is_noised[k]
        within = (k == q) & (~self.is_text[q] | (self.step[None, :] <= self.step[:, None]))
        return earlier | within

    def draw_dropped(self, batch: int, generator: torch.Generator) -> Tensor:
        """Which segments are hidden: bool [batch, segments]."""
        dropped = torch.rand(batch, len(self.segments), generator=generator, device=self.drop.device) < self.drop
        for index, segment in enumerate(self.segments):
            if segment.follows is not None:
                dropped[:, index] = dropped[:, segment.follows]
        return dropped

    def positions(self, counts: Tensor, dropped: Tensor) -> Tensor:
        """Rope positions int64 [batch, tokens]; `counts` [batch, segments]: real tokens of each segment.

        A text takes a position for each token, none when dropped; an image block takes one even when dropped; a
        noised block takes none, its clean copy stands at the same place.
        """
        advance = torch.where(self.is_text, counts * ~dropped, (~self.is_noised).long())
        start = advance.cumsum(1) - advance
        return start[:, self.segment] + torch.where(self.is_text[self.segment], self.step, 0)

    def bias(self, counts: Tensor, dropped: Tensor, dtype: torch.dtype) -> Tensor:
        """Additive attention bias [batch, 1, tokens, tokens]."""
        real = (self.step < counts[:, self.segment]) | ~self.is_text[self.segment]
        seen = self.base & (real & ~dropped[:, self.segment])[:, None, :]
        return torch.where(seen, 0.0, HIDDEN_BIAS).to(dtype)[:, None]
