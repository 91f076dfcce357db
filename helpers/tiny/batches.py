"""Training batches: what worker processes make (texts as ids, scenes as small tables), and the tasks' mixture."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..bagel.text import THINK_TO_ANSWER, THINK_TO_DRAW, TextCodec
from .clips import NEXT_FRAME, clip_prompt, clip_table, random_clip
from .packing import Segment
from .tasks import Picture, Text, sample
from .world import scene_table

TEXT_DROP, VAE_DROP, VIT_DROP = 0.1, 0.15, 0.3  # chances that a condition is hidden, for guidance
GIVEN_FRAMES, PREDICTED_FRAMES, PROMPTED_FRAMES = 3, 10, 8


@dataclass(frozen=True)
class Task:
    """One kind of sample: how many a step, how they are made, and whether a think prompt stands in front."""

    name: str
    batch: int
    system: str | None = None

    @property
    def is_clip(self) -> bool:
        return self.name.startswith("frames")

    @property
    def given(self) -> int:
        """Frames of a clip that come without a prompt."""
        return 0 if self.name == "frames_prompt" else GIVEN_FRAMES

    @property
    def frames(self) -> int:
        """All frames of a clip."""
        return PROMPTED_FRAMES if self.name == "frames_prompt" else GIVEN_FRAMES + PREDICTED_FRAMES


# A step's mixture. Reasoning prompts come equally often with and without a written plan.
MIXTURE = (
    Task("generate", 480),
    Task("reason", 96, THINK_TO_DRAW),
    Task("reason_plain", 96),
    Task("edit", 320),
    Task("edit_turns", 32),
    Task("understand", 160),
    Task("understand_think", 32, THINK_TO_ANSWER),
    Task("understand_two", 32),
    Task("story", 48),
    Task("frames", 32),
    Task("frames_prompt", 24),
)


@dataclass
class TaskBatch:
    """One task's samples: `ids[i]` int64 [batch, width] of the i-th text, `counts` [batch, texts], picture tables."""

    ids: list[Tensor]
    counts: Tensor
    tables: Tensor  # scenes [batch, pictures, 4, 10], or clips [batch, 2, 11]

    def to(self, device: torch.device) -> TaskBatch:
        move = lambda x: x.to(device, non_blocking=True)  # noqa: E731
        return TaskBatch([move(ids) for ids in self.ids], move(self.counts), move(self.tables))

    def copy_(self, other: TaskBatch) -> None:
        """Overwrite in place with a batch of the same shapes."""
        for place, ids in zip(self.ids, other.ids, strict=True):
            place.copy_(ids, non_blocking=True)
        self.counts.copy_(other.counts, non_blocking=True)
        self.tables.copy_(other.tables, non_blocking=True)

    def pin_memory(self) -> TaskBatch:
        return TaskBatch([ids.pin_memory() for ids in self.ids], self.counts.pin_memory(), self.tables.pin_memory())


def make_sample(task: Task, rng: Random) -> tuple[list[Text | Picture], object]:
    """Parts in order, and for clips the clip that all pictures belong to."""
    if not task.is_clip:
        parts = sample(task.name, rng)
        return ([Text(task.system), *parts] if task.system else parts), None
    clip = random_clip(rng, task.frames, prompted=not task.given)
    text = Text(NEXT_FRAME if task.given else clip_prompt(clip))
    parts = [Picture(clip)] * task.given
    for index in range(task.given, task.frames):
        parts += [text, Picture(clip, target=True, kept=index + 1 < task.frames)]
    return parts, clip


def segments_of(task: Task, widths: list[int], latent_tokens: int, vit_tokens: int) -> list[Segment]:
    """The layout of a task's samples; `widths`: tokens that its texts may take, start and end included."""
    parts, _ = make_sample(task, Random(0))
    draws = any(isinstance(part, Picture) and part.target for part in parts)
    segments, texts, pictures = [], 0, 0
    for part in parts:
        if isinstance(part, Text):
            segments.append(_text_segment(task, part, texts, widths[texts], draws, segments))
            texts += 1
            continue
        if part.target:
            segments.append(Segment("noised", pictures, latent_tokens, target=True))
        if part.kept:
            if draws:
                segments.append(Segment("vae", pictures, latent_tokens, drop=VAE_DROP))
            # A description that follows needs the picture: there the ViT block always stays.
            drop = VIT_DROP if draws and task.name != "story" else 0.0
            segments.append(Segment("vit", pictures, vit_tokens, drop=drop))
        pictures += 1
    return segments


def _text_segment(task: Task, part: Text, index: int, width: int, draws: bool, before: list[Segment]) -> Segment:
    if part.target and draws and before and before[-1].kind == "text":
        # A thought is hidden with its prompt: the text-guidance branch has neither.
        return Segment("text", index, width, target=True, follows=len(before) - 1)
    condition = draws and not part.target and part.text != task.system
    return Segment("text", index, width, target=part.target, drop=TEXT_DROP if condition else 0.0)


class StepBatches(Dataset):
    """Item i holds the batches of training step i, made from (seed, i) alone: runs can stop and go on anywhere."""

    def __init__(
        self, codec: TextCodec, mixture: tuple[Task, ...], widths: dict[str, list[int]], steps: int, seed: int
    ):
        self.codec, self.mixture, self.widths, self.steps, self.seed = codec, mixture, widths, steps, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[TaskBatch]:
        return [self._task_batch(task, Random(f"{self.seed} {step} {task.name}")) for task in self.mixture]

    def _task_batch(self, task: Task, rng: Random) -> TaskBatch:
        rows, pictures, limits = [], [], self.widths[task.name]
        while len(rows) < task.batch:
            made = [make_sample(task, rng) for _ in range(task.batch - len(rows))]
            texts = [[part.text for part in parts if isinstance(part, Text)] for parts, _ in made]
            ids = iter(encode_all(self.codec, [text for row in texts for text in row]))
            for row, (parts, clip) in zip(texts, made, strict=True):
                chunks = [next(ids) for _ in row]
                # The few texts longer than the layout's width are left out.
                if all(len(chunk) <= width for chunk, width in zip(chunks, limits, strict=True)):
                    rows.append(chunks)
                    pictures.append(clip or [part.scene for part in parts if isinstance(part, Picture)])
        return TaskBatch(
            ids=[_padded(column, width) for column, width in zip(zip(*rows, strict=True), limits, strict=True)],
            counts=torch.tensor([[len(chunk) for chunk in row] for row in rows]),
            tables=torch.from_numpy(_tables(task, pictures)),
        )


def _tables(task: Task, pictures: list) -> np.ndarray:
    if task.is_clip:
        return clip_table(pictures)
    flat = scene_table([scene for scenes in pictures for scene in scenes])
    return flat.reshape(len(pictures), -1, *flat.shape[1:])


def _padded(rows: tuple[list[int], ...], width: int) -> Tensor:
    table = np.zeros((len(rows), width), np.int64)
    for line, ids in zip(table, rows, strict=True):
        line[: len(ids)] = ids
    return torch.from_numpy(table)


def encode_all(codec: TextCodec, texts: list[str]) -> list[list[int]]:
    """Chunks of many texts at once."""
    return [[codec.start, *ids, codec.end] for ids in codec.tokenizer(texts, add_special_tokens=False)["input_ids"]]


def text_widths(codec: TextCodec, mixture: tuple[Task, ...], samples: int = 400) -> dict[str, list[int]]:
    """For each task the width of each text: nearly the longest seen, in whole eights, so that little is left out."""
    widths = {}
    for task in mixture:
        rows = []
        for index in range(samples):
            parts, _ = make_sample(task, Random(f"widths {index}"))
            rows.append([len(ids) for ids in encode_all(codec, [p.text for p in parts if isinstance(p, Text)])])
        longest = np.quantile(np.array(rows), 0.995, axis=0)
        widths[task.name] = [int(-(-length // 8) * 8) for length in longest]
    return widths
