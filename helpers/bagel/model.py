"""BAGEL itself: encoders, decoder and heads, with methods that append to a context or read beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import BagelConfig
from .context import Context
from .decoder import EXPERTS, Decoder
from .images import grid_rows, patchify
from .layers import KERNELS, MLPConnector, PositionTable, TimestepEmbedder
from .vision import VisionModel


class LanguageModel(nn.Module):
    """Decoder and vocabulary head."""

    def __init__(self, config: BagelConfig, experts: tuple[str, ...]):
        super().__init__()
        self.model = Decoder(config.decoder, experts)
        self.lm_head = nn.Linear(config.decoder.hidden_size, config.decoder.vocab_size, bias=False)


class Bagel(nn.Module):
    """The tensors of `ema.safetensors`.

    `image_markers` are the ids of vision_start and vision_end; `attention` names a kernel of `layers.KERNELS`. Unless
    it `draws`, what only the generation expert needs is left out.
    """

    def __init__(
        self, config: BagelConfig, image_markers: tuple[int, int], attention: str = "sdpa", draws: bool = True
    ):
        super().__init__()
        hidden = config.decoder.hidden_size
        self.config, self.draws = config, draws
        self.image_markers = image_markers
        self.kernel = KERNELS[attention]
        self.language_model = LanguageModel(config, EXPERTS if draws else EXPERTS[:1])
        self.vit_model = VisionModel(config.vision)
        self.connector = MLPConnector(config.vision.hidden_size, hidden)
        self.vit_pos_embed = PositionTable(config.vit_side, hidden)
        if draws:
            self.time_embedder = TimestepEmbedder(hidden)
            self.vae2llm = nn.Linear(config.latent_dim, hidden)
            self.llm2vae = nn.Linear(hidden, config.latent_dim)
            self.latent_pos_embed = PositionTable(config.latent_side, hidden)

    @property
    def device(self) -> torch.device:
        return self.language_model.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.model.norm.weight.dtype

    def new_context(self, batch: int, capacity: int, scratch: int) -> Context:
        """An empty context on the model's device; sizes in tokens a sample."""
        return Context.allocate(self.config.decoder, batch, capacity, scratch, self.device, self.dtype)

    # Embeddings: tokens [batch, n, hidden]

    def embed_ids(self, ids: Tensor) -> Tensor:
        return self.language_model.model.embed_tokens(ids)

    def embed_markers(self, batch: int) -> Tensor:
        """vision_start and vision_end: [batch, 2, hidden]."""
        # Rows by number: a tensor of ids would have to travel to the device every time.
        weight = self.language_model.model.embed_tokens.weight
        return torch.stack([weight[marker] for marker in self.image_markers]).expand(batch, -1, -1)

    def embed_vit(self, pixels: Tensor) -> Tensor:
        """Pixels [batch, 3, height, width], sides multiples of 14 -> ViT tokens."""
        rows, columns = (side // self.config.vision.patch_size for side in pixels.shape[-2:])
        places = grid_rows(rows, columns, self.config.vit_side, self.device)
        return self.connector(self.vit_model(pixels)) + self.vit_pos_embed(places)

    def embed_latents(self, tokens: Tensor, t: Tensor, places: Tensor) -> Tensor:
        """Latent tokens [batch, n, 64] at flow time t [batch] and rows `places` [n] of the position table."""
        time = self.time_embedder(t)[:, None]
        return self.vae2llm(tokens.to(self.dtype)) + time + self.latent_pos_embed(places)

    def latent_places(self, rows: int, columns: int) -> Tensor:
        """Rows of `latent_pos_embed` for a picture of rows x columns latent tokens."""
        return grid_rows(rows, columns, self.config.latent_side, self.device)

    # Appending to a context

    def append_text(self, context: Context, chunks: list[list[int]]) -> None:
        """One text chunk (start + ids + end) for each sample, causal, one rope position a token."""
        counts = [len(chunk) for chunk in chunks]
        width = max(counts)
        ids = torch.tensor([chunk + [0] * (width - len(chunk)) for chunk in chunks], device=self.device)
        attend = context.attend_appending(self.kernel, width, causal=True)
        self.language_model.model(self.embed_ids(ids), width, context.text_positions(width), attend)
        context.hide(counts, width)
        context.extend(width, counts, counts)

    def append_vit(self, context: Context, pixels: Tensor) -> None:
        """A picture for the understanding expert: pixels [batch, 3, height, width] after the ViT transform."""
        x = torch.cat([self.embed_markers(len(pixels)), self.embed_vit(pixels)], dim=1)
        self._append_block(context, x, x.shape[1])

    def append_latents(self, context: Context, latents: Tensor) -> None:
        """A clean picture for the generation expert: latents [batch, z, h, w], embedded at flow time 0."""
        patch = self.config.latent_patch_size
        places = self.latent_places(latents.shape[-2] // patch, latents.shape[-1] // patch)
        time = torch.zeros(len(latents), device=self.device)
        x = self.embed_latents(patchify(latents, patch), time, places)
        markers = self.embed_markers(len(latents))
        self._append_block(context, torch.cat([markers, x], dim=1), markers.shape[1])

    def _append_block(self, context: Context, x: Tensor, und_tokens: int) -> None:
        width = x.shape[1]
        attend = context.attend_appending(self.kernel, width, causal=False)
        self.language_model.model(x, und_tokens, context.block_positions(width), attend)
        context.extend(width, [width] * context.batch, 1)

    def append_token(self, context: Context, ids: Tensor) -> Tensor:
        """One text token for each sample, ids [batch] -> logits of the next one, float32 [batch, vocab_size]."""
        attend = context.attend_appending(self.kernel, 1, causal=True)
        x = self.language_model.model(self.embed_ids(ids[:, None]), 1, context.text_positions(1), attend)
        context.extend(1, [1] * context.batch, 1)
        return self.language_model.lm_head(self.language_model.model.norm(x[:, 0])).float()

    # Denoising beside a context

    def velocity(self, hidden: Tensor) -> Tensor:
        """Hidden states of latent tokens -> velocity, data to noise, float32 [batch, n, 64]."""
        return self.llm2vae(self.language_model.model.norm_moe_gen(hidden)).float()
