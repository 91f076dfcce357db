"""The works that are measured: pictures, edits, answers, the autoencoder, at the sizes of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import psutil
import torch
from PIL import Image, ImageDraw

from ..bagel.session import block_tokens
from ..display import progress
from ..pipeline import BagelPipeline, ImageResult, OnStep, TextResult
from .floors import decoding, edited_picture, encoding, looking, picture_from_text, text_pass, token_bytes
from .loss import Drawn
from .measuring import Row, failed, measure
from .rates import Limits

BATCH, TOKENS = 8, 128


@dataclass(frozen=True)
class Asked:
    """What is asked of a model: the texts, timesteps and seed of its pictures, and how many runs are measured."""

    prompt: str
    question: str
    instruction: str
    num_timesteps: int
    seed: int
    runs: int

    def __post_init__(self):
        if self.num_timesteps < 3:
            raise ValueError(f"num_timesteps {self.num_timesteps} must be at least 3: the split needs two steps.")
        if self.runs < 1:
            raise ValueError(f"runs {self.runs} must be at least 1: the first call is not among them.")


@dataclass(frozen=True)
class Job:
    """A work: `call(on_step)` does it, `floor(what it gave back)` are the least seconds that it can take.

    `compared`: its picture is one for `losses`. `beyond`: its row counts from the end of the one before, which does
    the same up to the first token.
    """

    work: str
    call: Callable[[OnStep], Any]
    floor: Callable[[Any], float]
    compared: bool = False
    beyond: bool = False


class Bench:
    """Measures a loaded model; an error in one work is kept in its row, and the others go on.

    `weights`: the format that it was loaded in. `drawn`: pictures that `rows` has made, for `losses`.
    """

    def __init__(self, bagel: BagelPipeline, weights: str, limit: Limits, asked: Asked):
        self.bagel, self.weights, self.limit, self.asked = bagel, weights, limit, asked
        self.config = bagel.config
        self.before = psutil.Process().memory_info().rss
        self.drawn: list[Drawn] = []

    def rows(self) -> Iterator[Row]:
        """Each row as soon as it is measured."""
        last = None
        for job in self.jobs():
            row = self._row(job)
            last = after_first(row, last) if job.beyond else row
            yield last

    def watched(self) -> list[Row]:
        """All rows, with a progress bar."""
        found = []
        with progress(len(self.jobs()), "works") as step:
            for row in self.rows():
                found.append(row)
                step()
        return found

    def jobs(self) -> list[Job]:
        """All works: pictures at the native square and at one half as wide, then the rest."""
        side, stride = self.config.native_side, self.config.latent_stride
        half = side // 2 // stride * stride
        return [
            self._drawing(side),
            self._drawing(side, step_cache="taylorseer"),
            self._drawing(half),
            self._drawing(half, batch=BATCH),
            self._edit(side),
            *self._answers(),
            self._autoencoder("encode", side),
            self._autoencoder("decode", side),
        ]

    def _row(self, job: Job) -> Row:
        try:
            row, last = measure(job.work, self.weights, job.call, self.asked.runs, self.bagel.model.device, self.before)
            if job.compared:
                self.drawn.append(Drawn.of(job.work, self.weights, last.result, last.first_latent))
            first = row.seconds if isinstance(last.result, TextResult) else None
            floor = job.floor(last.result)
            return replace(row, count=count_of(last.result), first_token_seconds=first, floor_seconds=floor)
        except Exception as error:  # whatever it is, the other rows are worth having
            return failed(job.work, self.weights, error)

    def _drawing(self, side: int, batch: int = 1, step_cache: str | None = None) -> Job:
        asked, words = self.asked, self._words(self.asked.prompt)
        prompt = asked.prompt if batch == 1 else [asked.prompt] * batch
        settings = {"num_timesteps": asked.num_timesteps, "step_cache": step_cache}

        def floor(made: ImageResult | list[ImageResult]) -> float:
            one = made if batch == 1 else made[0]
            return picture_from_text(self.config, one.settings, words).times(batch).seconds(self.limit)

        return Job(
            f"text-to-image {side}x{side}" + ", step cache" * bool(step_cache) + f", batch of {batch}" * (batch > 1),
            lambda on_step: self.bagel.generate(prompt, side, side, asked.seed, on_step=on_step, **settings),
            floor,
            compared=side == self.config.native_side,
        )

    def _edit(self, side: int) -> Job:
        asked, words, picture = self.asked, self._words(self.asked.instruction), scene(side)
        settings = {"seed": asked.seed, "num_timesteps": asked.num_timesteps}
        return Job(
            f"edit {side}x{side}",
            lambda on_step: self.bagel.edit(picture, asked.instruction, on_step=on_step, **settings),
            lambda made: edited_picture(self.config, made.settings, words).seconds(self.limit),
        )

    def _answers(self) -> list[Job]:
        """A question about the largest square picture that the ViT sees: the first token, and those after it."""
        side, question = self.config.vit_transform.max_size, self.asked.question
        picture, words = scene(side), self._words(question)
        context = block_tokens(self.config, (side, side), for_drawing=False) + words

        def answer(tokens: int, _on_step: OnStep) -> TextResult:
            return self.bagel.understand(picture, question, max_new_tokens=tokens)

        def reading(tokens: range) -> float:
            """Each token is written after a start marker and the tokens before it."""
            read = (token_bytes(self.bagel, self.weights, context + 1 + token) for token in tokens)
            return sum(read) / self.limit.copy

        def first(_answer: TextResult) -> float:
            work = looking(self.config, (side, side)) + text_pass(self.config, words, context - words)
            return work.seconds(self.limit) + reading(range(1))

        return [
            Job(f"first token after a {side}x{side} picture", partial(answer, 1), first),
            Job(
                f"the tokens after it, up to {TOKENS}",
                partial(answer, TOKENS),
                lambda answer: reading(range(1, len(answer.token_ids))),
                beyond=True,
            ),
        ]

    def _autoencoder(self, name: str, side: int) -> Job:
        config = self.config.autoencoder
        pixels = (1, config.in_channels, side, side)
        latents = (1, config.z_channels, side // config.downsample, side // config.downsample)
        shape, work = {"encode": (pixels, encoding), "decode": (latents, decoding)}[name]

        @torch.inference_mode()
        def call(_on_step: OnStep) -> None:
            getattr(self.bagel.autoencoder, name)(torch.rand(shape, device=self.bagel.model.device))

        floor = partial(work, config, (side, side))
        return Job(f"autoencoder, {name} {side}x{side}", call, lambda _: floor().seconds(self.limit))

    def _words(self, text: str) -> int:
        return len(self.bagel.codec.encode(text))


def count_of(result: Any) -> int:
    """How many pictures or tokens a call gave back; 1 where it is neither a batch nor a text."""
    if isinstance(result, TextResult):
        return len(result.token_ids)
    return len(result) if isinstance(result, list) else 1


def after_first(answer: Row, first: Row) -> Row:
    """The row of a whole answer -> that of its tokens after the first, which took `first`."""
    if answer.error:
        return answer
    if first.seconds is None:
        return failed(answer.work, answer.weights, ValueError("the first token was not measured, so neither are these"))
    count, started = answer.count - 1, first.seconds
    if count < 1 or answer.seconds <= started:
        return Row(answer.work, answer.weights, max(count, 0), first_token_seconds=started)
    return replace(
        answer,
        count=count,
        seconds=answer.seconds - started,
        runs=tuple(seconds - started for seconds in answer.runs),
        first_seconds=answer.first_seconds - started,
        tokens_per_second=count / (answer.seconds - started),
        first_token_seconds=started,
    )


def scene(side: int) -> Image.Image:
    """A red circle and a blue square on white, `side` pixels wide: something to ask about and to change."""
    picture = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(picture)
    pen.ellipse((side // 8, side // 8, side // 2, side // 2), "red")
    pen.rectangle((5 * side // 8, 5 * side // 8, 7 * side // 8, 7 * side // 8), "blue")
    return picture
