"""The understanding encoder: a SigLIP2-style ViT over patches of 14 x 14 pixels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .config import VisionConfig
from .images import grid_rows, patchify


class _Attention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            self.add_module(name, nn.Linear(config.hidden_size, config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [batch, heads, patches, d]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class _MLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class _Layer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = _Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = _MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Embeddings(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        # Stored as a matrix over flattened patches (row, column, channel), not as a convolution.
        self.patch_embedding = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding(config.num_positions, config.hidden_size)


class _Encoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))


class _Transformer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class VisionModel(nn.Module):
    """Pixels -> one feature vector a patch; every patch of a picture sees every other."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.side = round(config.num_positions**0.5)
        self.vision_model = _Transformer(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """[batch, 3, height, width] in [-1, 1], sides multiples of the patch size -> [batch, patches, hidden]."""
        parts = self.vision_model
        patches = patchify(pixels, self.patch_size).to(parts.embeddings.patch_embedding.weight.dtype)
        rows, columns = (side // self.patch_size for side in pixels.shape[-2:])
        places = grid_rows(rows, columns, self.side, pixels.device)
        x = parts.embeddings.patch_embedding(patches) + parts.embeddings.position_embedding(places)
        for layer in parts.encoder.layers:
            x = layer(x)
        return parts.post_layernorm(x)
