"""One growing context of texts and pictures, and the guidance branches that go with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessorList

from .autoencoder import Autoencoder
from .config import BagelConfig
from .context import Context
from .decoding import write_text
from .flow import Branches, FlowSettings, denoise
from .images import fitted_size, resize, to_picture, to_pixels, unpatchify
from .model import Bagel
from .text import TextCodec


@dataclass(frozen=True)
class Parts:
    """A model that is ready to run; without an autoencoder it only reads."""

    model: Bagel
    autoencoder: Autoencoder | None
    codec: TextCodec

    @property
    def config(self) -> BagelConfig:
        return self.model.config


@dataclass(frozen=True)
class Plan:
    """What a session must have room for and how it treats pictures.

    `capacity`: tokens a sample, generated ones included; `block`: tokens of the largest image block (0: none is made).
    `image_branch`: keep the context that image guidance needs; `for_drawing`: pictures enter as VAE and ViT blocks,
    else as ViT blocks alone; `posterior`: "sample" (official) or "mean"; `encoders`: "both", or for an ablation one
    of "vae" and "vit" (the other's block is left out of the pictures for drawing).
    """

    batch: int
    capacity: int
    block: int
    image_branch: bool
    for_drawing: bool
    posterior: str
    encoders: str


class Session:
    """A batch of equally structured sequences that grow part by part. Lives for one call of a verb.

    `generators`: one CPU generator a sample; context pictures and noise draw from them in the order they come.
    """

    def __init__(self, parts: Parts, plan: Plan, generators: list[torch.Generator]):
        self.parts, self.plan, self.generators = parts, plan, generators
        self.conditional = parts.model.new_context(plan.batch, plan.capacity, plan.block)
        self.texts_only = parts.model.new_context(plan.batch, plan.capacity, plan.block) if plan.image_branch else None
        self.before_last_text = self.conditional.mark()
        self.branches_differ = False

    @torch.inference_mode()
    def append_text(self, texts: list[str], system: bool = False) -> None:
        """An input text for each sample. A `system` prompt stays in the text-guidance branch as well."""
        if not system:
            self.before_last_text = self.conditional.mark()
        self._append(self.conditional, texts)
        if self.texts_only is not None:
            self._append(self.texts_only, texts)
        if system:
            self.before_last_text = self.conditional.mark()

    @torch.inference_mode()
    def append_written(self, texts: list[str]) -> None:
        """A text that the model wrote: it joins the conditional branch alone and counts as no input text."""
        self._append(self.conditional, texts)
        self.branches_differ = True

    def _append(self, context: Context, texts: list[str]) -> None:
        self.parts.model.append_text(context, [self.parts.codec.encode(text) for text in texts])

    @torch.inference_mode()
    def append_pictures(self, pictures: list[Image.Image]) -> None:
        """An RGB picture for each sample, as a VAE and a ViT block, or as a ViT block alone.

        Raises ValueError when the pictures of the batch differ in size after resizing.
        """
        config, model = self.parts.config, self.parts.model
        pictures = [resize(picture, config.vae_transform) for picture in pictures]
        _check_sizes({(picture.height, picture.width) for picture in pictures})
        if self.plan.for_drawing and self.plan.encoders != "vit":
            model.append_latents(self.conditional, self._encode(torch.stack([to_pixels(p) for p in pictures])))
        elif self.plan.for_drawing:
            self._skip_block()
        if self.plan.encoders != "vae":
            pixels = torch.stack([to_pixels(resize(picture, config.vit_transform)) for picture in pictures])
            model.append_vit(self.conditional, pixels.to(model.device))
        else:
            self._skip_block()
        self.before_last_text = self.conditional.mark()
        self.branches_differ = True

    def _skip_block(self) -> None:
        """A block that is left out keeps its rope position, as in training with dropped conditions."""
        self.conditional.extend(0, [0] * self.plan.batch, 1)

    def _encode(self, pixels: Tensor) -> Tensor:
        config = self.parts.config.autoencoder
        height, width = (side // config.downsample for side in pixels.shape[-2:])
        noise = None
        if self.plan.posterior == "sample":
            shape = (1, config.z_channels, height, width)
            noise = torch.cat([torch.randn(shape, generator=g) for g in self.generators]).to(self.parts.model.device)
        return self.parts.autoencoder.encode(pixels.to(self.parts.model.device), noise)

    def write(
        self,
        max_new_tokens: int,
        processors: LogitsProcessorList | None = None,
        generators: list[torch.Generator] | None = None,
    ) -> list[list[int]]:
        """Token ids that each sample writes next; nothing is appended."""
        return write_text(self.parts.model, self.conditional, self.parts.codec, max_new_tokens, processors, generators)

    @torch.inference_mode()
    def draw(
        self,
        settings: FlowSettings,
        size: tuple[int, int],
        on_step: Callable[[int, float, Tensor], None] | None = None,
    ) -> tuple[list[Image.Image], Tensor]:
        """Pictures of `size` (height, width) and their latent tokens float32 [batch, n, 64]; nothing is appended."""
        config = self.parts.config
        grid = size[0] // config.latent_stride, size[1] // config.latent_stride
        shape = (grid[0] * grid[1], config.latent_dim)
        noise = torch.stack([torch.randn(shape, generator=g) for g in self.generators])
        latent = denoise(self.parts.model, noise, grid, self._branches(), settings, on_step)
        pixels = self.parts.autoencoder.decode(unpatchify(latent, *grid, config.latent_patch_size))
        return [to_picture(picture) for picture in pixels], latent

    def _branches(self) -> Branches:
        """Where neither a picture nor a written text was appended, the image branch equals the conditional one."""
        image = self.texts_only if self.branches_differ else None
        return Branches(self.conditional, self.conditional.at(self.before_last_text), image)


def block_tokens(config: BagelConfig, size: tuple[int, int], for_drawing: bool) -> int:
    """Context tokens of a picture of this (height, width) before resizing, markers included."""
    height, width = fitted_size(*size, config.vae_transform)
    patch = config.vision.patch_size
    vit_height, vit_width = fitted_size(height, width, config.vit_transform)
    tokens = (vit_height // patch) * (vit_width // patch) + 2
    return tokens + latent_block(config, (height, width)) if for_drawing else tokens


def latent_block(config: BagelConfig, size: tuple[int, int]) -> int:
    """Tokens of a latent block of this (height, width), markers included."""
    return (size[0] // config.latent_stride) * (size[1] // config.latent_stride) + 2


def _check_sizes(sizes: set[tuple[int, int]]) -> None:
    if len(sizes) > 1:
        raise ValueError(
            f"The pictures of one batch have sizes {sorted(sizes)} (height, width) after resizing: "
            "give pictures of one size, or call once for each size."
        )
