"""Writing text after a context, token by token."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from .checks import finite_number
from .context import Context
from .model import Bagel
from .text import TextCodec


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

    Greedy, or sampled where CPU `generators` are given, one a sample. Every sample stops at its own end token, at
    `max_new_tokens` or where the model's context is full. Raises ValueError when it is full before the first.
    `processors` are `transformers` logits processors.
    The official limit counts the start token's forward too: it equals `max_new_tokens` + 1.
    """
    mark = context.mark()
    ids = torch.full((context.batch, 1), codec.start, device=model.device)
    open_samples = torch.ones(context.batch, dtype=torch.bool, device=model.device)
    try:
        for _ in range(min(max_new_tokens, max(context.room, 1))):
            logits = model.append_token(context, ids[:, -1])
            if processors:
                logits = processors(ids, logits)
            token = logits.argmax(-1) if generators is None else _draw(logits, generators)
            open_samples &= token != codec.end
            ids = torch.cat([ids, torch.where(open_samples, token, codec.end)[:, None]], dim=1)
            if not open_samples.any():
                break
    finally:
        context.rewind(mark)
    return [_until(row, codec.end) for row in ids[:, 1:].tolist()]


def _draw(logits: Tensor, generators: list[torch.Generator]) -> Tensor:
    """One token a sample by inverse transform: the random number comes from the CPU, so that devices agree."""
    chances = logits.softmax(-1).cumsum(-1)
    numbers = torch.cat([torch.rand(1, generator=g) for g in generators]).to(logits.device)
    # The last sum may round below 1: scale by it, so that no number falls behind the last token.
    return torch.searchsorted(chances, (numbers[:, None] * chances[:, -1:]), right=True)[:, 0]


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
