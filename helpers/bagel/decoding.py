"""Writing text after a context, token by token."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from .checks import finite_number
from .context import Context
from .model import Bagel
from .recorded import recorded
from .stepping import TokenStep
from .text import TextCodec

# Tokens that a card may write behind an end that the processor has not seen yet.
AHEAD = 4


def sampling_processors(temperature: float, top_p: float) -> LogitsProcessorList:
    """The filters of sampled text.

    Raises ValueError for values outside temperature > 0, 0 < top_p <= 1, TypeError for what is no number.
    """
    if finite_number("temperature", temperature) <= 0:
        raise ValueError(f"temperature {temperature} must be above 0; for the likeliest token use do_sample=False.")
    if not 0 < finite_number("top_p", top_p) <= 1:
        raise ValueError(f"top_p {top_p} must lie in (0, 1].")
    processors = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    return processors


@torch.inference_mode()
def write_text(
    model: Bagel,
    context: Context,
    codec: TextCodec,
    max_new_tokens: int,
    processors: LogitsProcessorList | None = None,
    generators: list[torch.Generator] | None = None,
) -> list[list[int]]:
    """New token ids of each sample, without start and end tokens; the context is left as it was.

    Greedy, or sampled where CPU `generators` are given, one a sample: each gives a number for every token that may
    come. Every sample stops at its own end token, at `max_new_tokens` or where the model's context is full. Raises
    ValueError when it is full before the first.
    `processors` are `transformers` logits processors that look at the newest token and the scores alone.
    The official limit counts the start token's forward too: it equals `max_new_tokens` + 1.
    """
    mark = context.mark()
    limit = min(max_new_tokens, max(context.room, 1))
    text = _Text(codec, context.batch, limit, processors, _numbers(generators, limit), model.device)
    try:
        if model.language_model.model.kernels is None:
            _append(text, model, context)
        else:
            _replay(text, TokenStep(model, context, limit))
    finally:
        context.rewind(mark)
    return [_until(row, codec.end) for row in text.tokens.T.tolist()]


class _Text:
    """What a batch has written, all of it on the device; `numbers` [limit, batch] make it sampled."""

    def __init__(
        self,
        codec: TextCodec,
        batch: int,
        limit: int,
        processors: LogitsProcessorList | None,
        numbers: Tensor | None,
        device: torch.device,
    ):
        self.end, self.limit, self.processors = codec.end, limit, processors
        self.numbers = None if numbers is None else numbers.to(device)
        self.ids = torch.full((batch,), codec.start, device=device)  # read next
        self.open = torch.ones(batch, dtype=torch.bool, device=device)
        self.ended = torch.zeros((), dtype=torch.bool, device=device)  # whether no sample is open
        self.index = torch.zeros(1, dtype=torch.long, device=device)  # of the next token
        self.tokens = torch.full((limit, batch), codec.end, device=device)

    def take(self, logits: Tensor) -> None:
        """The next token of each sample, chosen by its logits [batch, vocab_size]; an ended one stays at its end."""
        if self.processors:
            logits = self.processors(self.ids[:, None], logits)
        token = logits.argmax(-1) if self.numbers is None else _draw(logits, self.numbers.index_select(0, self.index))
        self.open &= token != self.end
        self.ended.copy_(~self.open.any())
        self.ids.copy_(torch.where(self.open, token, self.end))
        self.tokens.index_copy_(0, self.index, self.ids[None])
        self.index += 1


def _append(text: _Text, model: Bagel, context: Context) -> None:
    """Token by token on any device: the context grows, and the processor looks at every token."""
    for _ in range(text.limit):
        text.take(model.append_token(context, text.ids))
        if text.ended:
            break


def _replay(text: _Text, step: TokenStep) -> None:
    """On a card the first token's work is recorded and replayed for the others, without waiting for any of them."""

    def write() -> None:
        text.take(step.logits(text.ids, text.index))

    write()
    if text.limit == 1:
        return
    again, ended = (recorded(write), _Ended(text.ended)) if text.ids.is_cuda else (write, lambda: bool(text.ended))
    for _ in range(text.limit - 1):
        if ended():
            break
        again()


class _Ended:
    """Whether a flag on the card was set AHEAD questions ago; asking never leaves the card without work."""

    def __init__(self, flag: Tensor):
        self.flag = flag
        self.asked: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def __call__(self) -> bool:
        seen, event = torch.empty((), dtype=torch.bool, pin_memory=True), torch.cuda.Event()
        seen.copy_(self.flag, non_blocking=True)
        event.record()
        self.asked.append((seen, event))
        if len(self.asked) <= AHEAD:
            return False
        seen, event = self.asked.popleft()
        event.synchronize()
        return bool(seen)


def _numbers(generators: list[torch.Generator] | None, limit: int) -> Tensor | None:
    """Random numbers [limit, batch] for sampling: from the CPU, so that devices agree."""
    if generators is None:
        return None
    return torch.stack([torch.rand(limit, generator=generator) for generator in generators], dim=1)


def _draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """One token a sample by inverse transform; numbers [1, batch] in [0, 1)."""
    chances = logits.softmax(-1).cumsum(-1)
    # The last sum may round below 1: scale by it, so that no number falls behind the last token.
    return torch.searchsorted(chances, (numbers.T * chances[:, -1:]), right=True)[:, 0]


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
