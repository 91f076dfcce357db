"""Watch the model at work: which expert takes each token, where words look, how noise becomes a picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .bagel.images import fitted_size, open_picture, to_picture, unpatchify
from .bagel.layers import AttentionKernel
from .display import Table, table


@dataclass
class Pass:
    """One pass through the decoder, as its first sample saw it; guidance branches that go together are a pass each.

    `understanding` and `generation`: tokens that took each expert; `first` and `last`: their rope positions;
    `keys`: tokens that they could attend to, themselves included; `layers`: for a text pass, the attention of
    each layer, mean over its heads, float32 [tokens, keys].
    """

    understanding: int
    generation: int
    first: int
    last: int
    keys: int = 0
    layers: list[Tensor] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """What went through: "text" (causal), "ViT tokens" or "latents"."""
        return "latents" if self.generation else "text" if self.layers else "ViT tokens"


@contextmanager
def watching(bagel) -> Iterator[list[Pass]]:
    """Within it, every pass of the model of `bagel` (a BagelPipeline) is noted in the list that comes out.

    Results stay the same; the model is as before when the block ends, also by an error. Only text passes keep their
    attention: that of pictures would fill the memory.
    """
    model, kernel, decoder = bagel.model, bagel.model.kernel, bagel.model.language_model.model
    watcher, kernels = _Watcher(kernel), decoder.kernels
    hook = decoder.register_forward_pre_hook(watcher.enter)
    # Recorded work of a card would not pass here again: the layers run as they are written.
    model.kernel, decoder.kernels = watcher.attend, None
    try:
        yield watcher.passes
    finally:
        hook.remove()
        model.kernel, decoder.kernels = kernel, kernels


class _Watcher:
    """Notes what enters the decoder, and looks on as its layers attend."""

    def __init__(self, kernel: AttentionKernel):
        self.kernel = kernel
        self.passes: list[Pass] = []
        # Of the forward under way: its passes by their first row, the rows' rope positions, rows that attended.
        self.of_row: dict[int, Pass] = {}
        self.experts, self.places, self.attended = (0, 0), [], 0

    def enter(self, _decoder, inputs) -> None:
        x, understanding, positions, *_ = inputs
        self.of_row, self.places, self.attended = {}, positions.tolist(), 0
        self.experts = understanding, x.shape[1] - understanding

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False, valid: Tensor | None = None) -> Tensor:
        # In every layer each branch attends once, in order.
        row = self.attended % len(self.places)
        self.attended += len(q)
        if row not in self.of_row:
            self.of_row[row] = Pass(*self.experts, self.places[row][0], self.places[row][-1])
            self.passes.append(self.of_row[row])
        one = self.of_row[row]
        one.keys = k.shape[1]
        if causal:
            one.layers.append(_weights(q[0], k[0]))
        return self.kernel(q, k, v, causal, valid)


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """Causal softmax of q [n, heads, d] over k [m, kv_heads, d], mean over heads: float32 [n, m], CPU."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("nhd,mhd->hnm", q.float(), k.float()) / q.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(len(k) - len(q) + 1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1).mean(0).cpu()


def routing(passes: list[Pass]) -> list[tuple[Pass, int]]:
    """The different passes in order of their first appearance, each with how often it ran."""
    counts: dict[tuple, int] = {}
    firsts: dict[tuple, Pass] = {}
    for one in passes:
        key = (one.kind, one.understanding, one.generation, one.first, one.last, one.keys)
        firsts.setdefault(key, one)
        counts[key] = counts.get(key, 0) + 1
    return [(firsts[key], count) for key, count in counts.items()]


def routing_table(passes: list[Pass]) -> Table:
    """What `routing` found, in numbers: tokens for each expert, rope positions, tokens in sight, times."""
    header = ("pass", "understanding expert", "generation expert", "rope positions", "tokens in sight", "times")
    return table(header, [_row(one, count) for one, count in routing(passes)])


def _row(one: Pass, count: int) -> tuple:
    places = f"{one.first}" if one.first == one.last else f"{one.first} to {one.last}"
    return one.kind, one.understanding, one.generation, places, one.keys, count


@dataclass(frozen=True)
class Looks:
    """Where each token of a question and of its answer looked in the picture.

    `words`: the tokens as text; `maps`: attention on each ViT patch, mean over the heads, float32 [layers, words,
    rows, columns]; a map's sum is the part of its token's attention that the picture got. `answer`: how many of the
    last words were fed while the answer was written.
    """

    picture: Image.Image
    words: list[str]
    maps: Tensor
    answer: int

    def share(self) -> Tensor:
        """The part of the attention that went to the picture, float32 [layers, words]."""
        return self.maps.sum((-2, -1))

    def brightest(self, layer: int, word: int) -> tuple[float, float]:
        """Middle (x, y) of the patch that got most of a word's attention, in parts of the picture's sides."""
        _, _, rows, columns = self.maps.shape
        row, column = divmod(int(self.maps[layer, word].argmax()), columns)
        return (column + 0.5) / columns, (row + 0.5) / rows


def look_at(bagel, picture: Image.Image | Path | str, question: str, max_new_tokens: int = 8) -> Looks:
    """Ask about one picture and keep where each token looked. Errors: as `BagelPipeline.understand` raises them.

    A token looks while it is being fed, so the answer's part begins with the start token, which chooses its first
    word. A last word at the limit of `max_new_tokens` was never fed and has no map.
    """
    picture, codec = open_picture(picture), bagel.codec
    with watching(bagel) as passes:
        ids = bagel.understand(picture, question, max_new_tokens=max_new_tokens).token_ids
    seen, *texts = passes
    rows, columns = _patches(bagel.config, picture)
    patches = slice(seen.understanding - rows * columns, seen.understanding)  # behind the markers
    by_layer = zip(*(one.layers for one in texts), strict=True)
    layers = [torch.cat([part[:, patches] for part in layer]) for layer in by_layer]
    fed = [*codec.encode(question), codec.start, *ids][: layers[0].shape[0]]
    words = [codec.tokenizer.decode([one]) for one in fed]
    maps = torch.stack(layers).unflatten(-1, (rows, columns))
    return Looks(picture, words, maps, len(fed) - len(codec.encode(question)))


def _patches(config, picture: Image.Image) -> tuple[int, int]:
    """Rows and columns of the ViT's patches of a picture."""
    height, width = fitted_size(picture.height, picture.width, config.vae_transform)
    height, width = fitted_size(height, width, config.vit_transform)
    return height // config.vision.patch_size, width // config.vision.patch_size


class DenoisingPath:
    """Keeps the latents of a picture in the making (of a batch, the first): pass it as `on_step`.

    `times`: flow time after each step, from near 1 (noise) to 0; `latents`: float32 [tokens, 4 * channels] each.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.latents: list[Tensor] = []

    def __call__(self, step: int, t: float, latent: Tensor) -> None:
        self.times.append(t)
        self.latents.append(latent[0].float())

    def pictures(self, bagel, size: tuple[int, int], steps: list[int]) -> list[Image.Image]:
        """The latents after each of `steps` (from 0), decoded; `size` (height, width) in pixels, as they were drawn.

        Raises IndexError for a step that was not made.
        """
        return _decoded(bagel, [self.latents[step] for step in steps], size)

    def guesses(self, bagel, size: tuple[int, int], steps: list[int]) -> list[Image.Image]:
        """The picture that a straight continuation of each of `steps` (from 1) would end in; `size` as in `pictures`.

        The flow is trained on straight lines x_t = (1 - t) x_0 + t noise: velocities point at whole pictures.
        Raises ValueError for a step below 1, which has no velocity before it, IndexError for one that was not made.
        """
        ends = []
        for step in steps:
            if step < 1:
                raise ValueError(f"step {step} must be at least 1: a guess continues the way from the step before.")
            before, after = self.latents[step - 1], self.latents[step]
            velocity = (before - after) / (self.times[step - 1] - self.times[step])
            ends.append(after - self.times[step] * velocity)
        return _decoded(bagel, ends, size)


@torch.inference_mode()
def _decoded(bagel, latents: list[Tensor], size: tuple[int, int]) -> list[Image.Image]:
    config = bagel.config
    grid = size[0] // config.latent_stride, size[1] // config.latent_stride
    # One by one: a path's pictures at full size would not fit together into a card that just fits the model.
    planes = [unpatchify(latent[None], *grid, config.latent_patch_size) for latent in latents]
    return [to_picture(bagel.autoencoder.decode(plane)[0]) for plane in planes]
