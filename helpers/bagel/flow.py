"""Making an image: rectified flow from noise to data, with two guidances and a step cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .checks import finite_number, whole_number
from .context import Context
from .model import Bagel
from .recorded import recorded

RENORMALISATIONS = ("global", "channel", "text_channel")
STEP_CACHES = (None, "taylorseer")


@dataclass(frozen=True)
class FlowSettings:
    """The official hyper-parameters of image sampling.

    Raises ValueError for values without meaning, TypeError for what is no number.
    """

    cfg_text_scale: float
    cfg_img_scale: float
    cfg_interval: tuple[float, float]
    timestep_shift: float
    num_timesteps: int
    cfg_renorm_min: float
    cfg_renorm_type: str
    step_cache: str | None

    def __post_init__(self):
        # Numbers of NumPy become Python's own: on the left of a product with a tensor they would take it over.
        for name in ("cfg_text_scale", "cfg_img_scale", "timestep_shift", "cfg_renorm_min"):
            object.__setattr__(self, name, finite_number(name, getattr(self, name)))
        object.__setattr__(self, "num_timesteps", whole_number("num_timesteps", self.num_timesteps))
        if self.num_timesteps < 2:
            raise ValueError(f"num_timesteps {self.num_timesteps} must be at least 2: N timesteps make N - 1 steps.")
        if self.timestep_shift <= 0:
            raise ValueError(f"timestep_shift {self.timestep_shift} must be above 0; 1 means no shift.")
        if self.cfg_renorm_type not in RENORMALISATIONS:
            raise ValueError(f"cfg_renorm_type {self.cfg_renorm_type!r} must be one of {', '.join(RENORMALISATIONS)}.")
        if not 0 <= self.cfg_renorm_min <= 1:
            raise ValueError(f"cfg_renorm_min {self.cfg_renorm_min} must lie in [0, 1].")
        if self.step_cache not in STEP_CACHES:
            raise ValueError(f"step_cache {self.step_cache!r} must be None or 'taylorseer'.")
        if not isinstance(self.cfg_interval, (tuple, list)) or len(self.cfg_interval) != 2:
            raise ValueError(f"cfg_interval {self.cfg_interval!r} must be two numbers (low, high), such as (0.4, 1.0).")
        low, high = (finite_number("cfg_interval's bound", bound) for bound in self.cfg_interval)
        if low > high:
            raise ValueError(f"cfg_interval {self.cfg_interval} must be (low, high), low <= high.")
        object.__setattr__(self, "cfg_interval", (low, high))

    @classmethod
    def among(cls, values: dict[str, Any]) -> FlowSettings:
        """The settings among `values` by name: the arguments of a verb, or the settings of a result."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    def guided(self, times: Tensor) -> list[bool]:
        """At which of the shifted timesteps guidance is active: low < t <= high, compared in float32."""
        low, high = (torch.tensor(bound, dtype=torch.float32) for bound in self.cfg_interval)
        inside = (times > low) & (times <= high)
        return (inside & (self.cfg_text_scale > 1)).tolist()


def timesteps(num_timesteps: int, shift: float) -> Tensor:
    """Shifted timesteps from 1 (noise) to 0 (data): float32 [num_timesteps]."""
    t = torch.linspace(1, 0, num_timesteps)
    return shift * t / (1 + (shift - 1) * t)


@dataclass
class Branches:
    """The contexts of one image: the full one, and those that lack the last text, or the images.

    `image` None means that it could not differ from the conditional one, so its velocity is not computed again.
    """

    conditional: Context
    text: Context | None
    image: Context | None


@torch.inference_mode()
def denoise(
    model: Bagel,
    noise: Tensor,
    grid: tuple[int, int],
    branches: Branches,
    settings: FlowSettings,
    on_step: Callable[[int, float, Tensor], None] | None = None,
) -> Tensor:
    """Latent tokens float32 [batch, rows * columns, 64] of the finished images, from `noise` of that shape.

    `grid` is (rows, columns) of latent tokens; `on_step(step, t, latent)` is called after every Euler step with the
    flow time reached. Source: BAGEL.md section 6 (paper, appendix; official `generate_image`).
    """
    times = timesteps(settings.num_timesteps, settings.timestep_shift)
    guided = settings.guided(times)
    places = model.latent_places(*grid)
    to_image, image = settings.cfg_img_scale > 1, branches.image
    if settings.step_cache and not guided[0] and image is None:
        # Branches count their own forwards: one that starts late forecasts at other steps than the conditional one.
        image = branches.conditional
    conditional, text, image = (
        None if context is None else _Branch(model, context, places, settings.step_cache)
        for context in (branches.conditional, branches.text, image if to_image else None)
    )
    x = noise.to(model.device, torch.float32)
    forwards = _Forwards(model, x)
    for step, (t, following) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
        if guided[step]:
            all_branches = [conditional, text, image] if image else [conditional, text]
            v, v_text, *of_image = _velocities(forwards, all_branches, x, t)
            v_image = (of_image[0] if image else v) if to_image else None
            v = guide(v, v_text, v_image, settings)
        else:
            (v,) = _velocities(forwards, [conditional], x, t)
        x = x - v * (t - following)
        if on_step is not None:
            on_step(step, following, x)
    return x


def guide(v: Tensor, v_text: Tensor, v_image: Tensor | None, settings: FlowSettings) -> Tensor:
    """Guided velocity from those of the branches, all float32 [batch, n, 64]; every sample on its own.

    `v_text` is the velocity without the last text, `v_image` without the images (None: no image guidance).
    """
    guided = v_text + settings.cfg_text_scale * (v - v_text)
    if settings.cfg_renorm_type == "text_channel":
        guided = _renormalise(guided, v, (-1,), settings.cfg_renorm_min)
        return _from_image(guided, v_image, settings.cfg_img_scale)
    guided = _from_image(guided, v_image, settings.cfg_img_scale)
    dims = (-2, -1) if settings.cfg_renorm_type == "global" else (-1,)
    return _renormalise(guided, v, dims, settings.cfg_renorm_min)


def _from_image(guided: Tensor, v_image: Tensor | None, scale: float) -> Tensor:
    return guided if v_image is None else v_image + scale * (guided - v_image)


def _renormalise(guided: Tensor, v: Tensor, dims: tuple[int, ...], minimum: float) -> Tensor:
    """Guidance may turn the velocity, not lengthen it."""
    factor = _norm(v, dims) / (_norm(guided, dims) + 1e-8)
    return guided * factor.clamp(minimum, 1.0)


def _norm(v: Tensor, dims: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(v, dim=dims, keepdim=True)


def _velocities(forwards: _Forwards, branches: list[_Branch], x: Tensor, t: float) -> list[Tensor]:
    """The velocity that each branch sees; those that are due go through the decoder as one batch."""
    due = [branch for branch in branches if branch.due]
    if due:
        for branch, hidden in zip(due, forwards(due, x, t), strict=True):
            branch.take(hidden)
    return [branch.velocity() for branch in branches]


class _Forwards:
    """The decoder's passes for one picture. On a card the same branches' pass is recorded once, then replayed."""

    def __init__(self, model: Bagel, x: Tensor):
        self.model = model
        self.x, self.t = x.clone(), torch.zeros(len(x), device=x.device)
        self.replays: dict[tuple[_Branch, ...], tuple[Callable[[], None], list[Tensor]]] = {}
        self.pool = torch.cuda.graph_pool_handle() if x.is_cuda else None

    def __call__(self, branches: list[_Branch], x: Tensor, t: float) -> tuple[Tensor, ...]:
        """Latent tokens [batch, n, 64] at flow time t -> for each branch the hidden states of those tokens.

        They are overwritten by the next call.
        """
        self.x.copy_(x)
        self.t.fill_(t)
        decoder, key = self.model.language_model.model, tuple(branches)
        if decoder.kernels is None or not x.is_cuda:
            return self._run(branches)
        shape = len(x), *(branch.sight.end - branch.sight.begin for branch in branches)
        if key not in self.replays:
            if shape not in decoder.warm or not self._room(branches):
                decoder.warm.add(shape)
                return self._run(branches)
            made: list[Tensor] = []
            self.replays[key] = recorded(lambda: made.extend(self._run(branches)), self.pool), made
        replay, made = self.replays[key]
        replay()
        return tuple(made)

    def _run(self, branches: list[_Branch]) -> tuple[Tensor, ...]:
        """Together the branches read the weights once. Only attention is each one's own: contexts differ in length."""
        model, samples = self.model, len(self.x)
        markers = model.embed_markers(samples)
        tokens = torch.cat([markers, model.embed_latents(self.x, self.t, branches[0].places)], dim=1)
        tokens = tokens.repeat(len(branches), 1, 1)
        positions = torch.cat([branch.positions for branch in branches])
        sights = [branch.sight for branch in branches]
        hidden = model.language_model.model(tokens, markers.shape[1], positions, *sights)
        return hidden[:, markers.shape[1] :].split(samples)

    def _room(self, branches: list[_Branch]) -> bool:
        """Whether the card has memory for a recorded pass, which keeps all that it works with beside the rest."""
        config = self.model.config.decoder
        rows = len(branches) * len(self.x) * branches[0].positions.shape[1]
        needed = rows * (3 * config.intermediate_size + 8 * config.hidden_size) * self.model.dtype.itemsize
        return torch.cuda.mem_get_info(self.x.device)[0] > needed


class _Branch:
    """One context's view of the image: hidden states beside it, computed or forecast, then the velocity."""

    def __init__(self, model: Bagel, context: Context, places: Tensor, step_cache: str | None):
        count = len(places) + 2  # with the two markers
        self.model, self.places = model, places
        self.positions = context.block_positions(count)
        self.sight = context.attend_beside(model.kernel, count)
        self.forecast = TaylorForecast() if step_cache else None
        self.newest: Tensor | None = None

    @property
    def due(self) -> bool:
        """Whether the next velocity needs hidden states from the decoder."""
        return self.forecast is None or self.forecast.due

    def take(self, hidden: Tensor) -> None:
        if self.forecast is None:
            self.newest = hidden
        else:
            self.forecast.take(hidden.float())

    def velocity(self) -> Tensor:
        hidden = self.newest if self.forecast is None else self.forecast.next().to(self.model.dtype)
        return self.model.velocity(hidden)


class TaylorForecast:
    """Takes the forwards 0 to 4, 7, 10, 13, ... of one branch and extrapolates the others.

    It keeps the newest hidden state and up to six finite differences in float32. The official code keeps these for
    every layer; as a forecast layer ignores its input, the last layer's are enough and give the same numbers.
    Source: TaylorSeer (arXiv 2503.06923), with BAGEL's interval of 3 and order 6.
    """

    FIRST, INTERVAL, ORDER = 4, 3, 6

    def __init__(self):
        self.index = 0  # of the next forward
        self.taken = 0  # the forward that was taken last
        self.factors: list[Tensor] = []

    @property
    def due(self) -> bool:
        """Whether the next forward is to be taken, not extrapolated."""
        return self.index <= self.FIRST or (self.index - self.FIRST) % self.INTERVAL == 0

    def take(self, newest: Tensor) -> None:
        """The hidden state of the next forward, which was due."""
        factors = [newest]
        if self.index >= self.FIRST:
            for old in self.factors[: self.ORDER]:
                factors.append((factors[-1] - old) / (self.index - self.taken))
        self.factors, self.taken = factors, self.index

    def next(self) -> Tensor:
        """The hidden state of the next forward: the one that was taken, or an extrapolation."""
        distance, self.index = self.index - self.taken, self.index + 1
        if not distance:
            return self.factors[0]
        return sum(factor * (distance**i / math.factorial(i)) for i, factor in enumerate(self.factors))
