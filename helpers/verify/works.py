"""What both sides do: pictures, texts, settings and noise, one case for each work.

A case is written as in `tests/reference/cases.json`, and its name says what it is:

    vit_*      {"image"}                                  the ViT after its transform alone
    vae_*      {"image"}                                  the autoencoder, there and back
    prefill_*  {"inputs"}                                 pictures and texts read into a context; the last is a text
    und_*      {"inputs", "think", "max_length"}          greedy text; the official count, start token included
    others     {"inputs", "seed", "options"[, "posterior"]}   a picture; options by their official names

An input "img:scene" is the picture called scene. Posteriors are their means unless "posterior" says "sample".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..bagel.checks import whole_number
from ..bagel.config import BagelConfig
from ..bagel.images import fitted_size
from ..bench.works import scene
from ..workbook import repository
from .official import kind

QUESTION = "Describe the picture in detail."
PROMPT = "a photo of a red circle and a blue square"
INSTRUCTION = "make the background gray"
GUIDED = {"cfg_text_scale": 4.0, "timestep_shift": 3.0, "cfg_renorm_min": 0.0}
DRAW = {**GUIDED, "cfg_img_scale": 1.0, "cfg_interval": [0.4, 1.0], "cfg_renorm_type": "global"}
EDIT = {**GUIDED, "cfg_img_scale": 2.0, "cfg_interval": [0.0, 1.0], "cfg_renorm_type": "text_channel"}


@dataclass(frozen=True)
class Works:
    """Cases by name, and the pictures that they speak of."""

    cases: dict[str, dict]
    pictures: dict[str, Image.Image]

    def picture(self, part: str) -> Image.Image:
        return self.pictures[part.removeprefix("img:")]

    def inputs(self, case: dict) -> list:
        """The case's inputs, pictures as pictures."""
        return [self.picture(part) if part.startswith("img:") else part for part in case["inputs"]]


@dataclass(frozen=True)
class Sizes:
    """How large the works are: timesteps and longest side of pictures, tokens of a text.

    Raises TypeError or ValueError for numbers without meaning.
    """

    num_timesteps: int
    size: int
    max_new_tokens: int

    def __post_init__(self):
        for name, least in (("num_timesteps", 2), ("size", 16), ("max_new_tokens", 1)):
            whole_number(name, getattr(self, name), least)


def drawn_works(config: BagelConfig, sizes: Sizes) -> Works:
    """The works for any checkpoint: a drawn picture is looked at, encoded, asked about and changed, one is made.

    Raises ValueError for a size that the model does not have.
    """
    side, stride = sizes.size, config.latent_stride
    if side % stride or side > config.native_side:
        raise ValueError(f"size {side} must be a multiple of {stride}, at most {config.native_side} for this model.")
    height = max(stride, 3 * side // 4 // stride * stride)  # so that rows taken for columns are found
    steps = {"num_timesteps": sizes.num_timesteps}
    asked = {"inputs": ["img:scene", QUESTION]}
    return Works(
        cases={
            "vit_scene": {"image": "scene"},
            "vae_scene": {"image": "scene"},
            "prefill_scene": asked,
            "und_scene": {**asked, "think": False, "max_length": sizes.max_new_tokens + 1},
            "draw": {"inputs": [PROMPT], "seed": 1, "options": {**DRAW, **steps, "image_shapes": [height, side]}},
            "edit": {"inputs": ["img:scene", INSTRUCTION], "seed": 2, "options": {**EDIT, **steps}},
        },
        pictures={"scene": grained(scene(side).crop((0, 0, side, height)))},
    )


def grained(picture: Image.Image) -> Image.Image:
    """A flat drawing with light that falls off to one side and the grain of a photograph."""
    values = np.asarray(picture) * 0.75
    light = np.linspace(0, 48, picture.width)[None, :, None]
    grain = np.random.default_rng(0).integers(0, 16, values.shape)
    return Image.fromarray((values + light + grain).astype(np.uint8))


def reference_works() -> Works:
    """The cases of `tests/reference`, whose vectors the official code made on a small random checkpoint."""
    folder = reference_folder()
    cases = json.loads((folder / "cases.json").read_text(encoding="utf8"))
    cases = {name: dict(case) for name, case in cases.items() if name[0] != "_" and name != "schedule"}
    for name, case in cases.items():
        if name.endswith("sampled_posterior"):
            case["posterior"] = "sample"
    pictures = {}
    for name in ("photo", "tall", "alpha", "big"):
        with Image.open(folder / f"{name}.png") as picture:
            pictures[name] = picture.copy()
    return Works(cases, pictures)


def reference_folder() -> Path:
    return repository() / "tests" / "reference"


def noise_of(works: Works, name: str, config: BagelConfig) -> Tensor:
    """The initial noise of a drawn case, float32 [tokens, 4 * channels]: the next numbers of its seed's generator.

    Sampled posteriors draw first from the same generator, one a picture.
    """
    case = works.cases[name]
    generator = torch.Generator().manual_seed(case["seed"])
    size = case["options"].get("image_shapes", [config.native_side] * 2)
    channels, downsample = config.autoencoder.z_channels, config.autoencoder.downsample
    for part in works.inputs(case):
        if isinstance(part, str):
            continue
        size = fitted_size(part.height, part.width, config.vae_transform)
        if case.get("posterior") == "sample":
            torch.randn(1, channels, size[0] // downsample, size[1] // downsample, generator=generator)
    tokens = size[0] // config.latent_stride * (size[1] // config.latent_stride)
    return torch.randn(tokens, config.latent_dim, generator=generator)


def noises(works: Works, config: BagelConfig) -> dict[str, Tensor]:
    """The noise of every drawn case, named CASE.noise."""
    return {f"{name}.noise": noise_of(works, name, config) for name in works.cases if kind(name) == "draw"}
