"""What a faster mode loses: its picture beside the exact one, made from the same text and noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..hub import RANDOM
from ..pipeline import ImageResult


@dataclass(frozen=True)
class Drawn:
    """A picture from a text, the mode that made it, its noise and its latent after the first and the last step.

    `noise`, `first` and `last` are float32 [tokens, 4 * channels], on the processor.
    """

    work: str
    weights: str
    step_cache: str | None
    picture: Image.Image
    noise: Tensor
    first: Tensor
    last: Tensor

    @classmethod
    def of(cls, work: str, weights: str, made: ImageResult, first_latent: Tensor) -> Drawn:
        """From a single result of `generate` and the latent [1, tokens, 4 * channels] that `on_step` heard first."""
        noise = torch.randn(made.latent.shape, generator=torch.Generator().manual_seed(made.seed))
        return cls(work, weights, made.settings["step_cache"], made.image, noise, first_latent[0].cpu(), made.latent)


@dataclass(frozen=True)
class Loss:
    """A faster mode's picture against the exact one of the format `against`.

    `psnr` in dB of the 8-bit pictures, None where they are the same. Relative errors of the velocity that the steps
    follow, guidance included, as the length of the difference by the length of the exact one: `first_velocity` at the
    first step, where both start from the same noise; `mean_velocity` over the whole path, where each follows its own.
    """

    work: str
    weights: str
    against: str
    psnr: float | None
    first_velocity: float
    mean_velocity: float


def losses(drawn: Sequence[Drawn]) -> list[Loss]:
    """Every picture against the first that was made without a step cache; all of one size, text, seed and schedule.

    A velocity is what the steps took away from the noise: of one step v * dt, of all of them the mean of v.
    """
    exact = next((one for one in drawn if one.step_cache is None), None)
    return [_loss(one, exact) for one in drawn if one is not exact] if exact else []


def _loss(drawn: Drawn, exact: Drawn) -> Loss:
    return Loss(
        drawn.work,
        drawn.weights,
        exact.weights,
        psnr(drawn.picture, exact.picture),
        first_velocity=_relative(drawn.first, exact.first, exact.noise),
        mean_velocity=_relative(drawn.last, exact.last, exact.noise),
    )


def psnr(picture: Image.Image, exact: Image.Image) -> float | None:
    """Peak signal-to-noise ratio in dB of two 8-bit pictures of one size; None where they are the same."""
    one, other = (np.asarray(each, dtype=np.float64) for each in (picture, exact))
    error = np.square(one - other).mean()
    return None if error == 0 else 10 * math.log10(255**2 / error)


def remark(model: str) -> str:
    """What the losses of one picture can say about a model of this name."""
    if model in RANDOM:
        return "The weights are random: these losses say nothing about the quality with the real ones."
    return "One picture of one text and seed: how large such a loss can be, no average."


def _relative(latent: Tensor, exact: Tensor, noise: Tensor) -> float:
    return ((latent - exact).norm() / (noise - exact).norm()).item()
