"""Writing a checkpoint folder in the official layout."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..bagel.config import BagelConfig

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")


def write_checkpoint(
    folder: Path, model: dict[str, Tensor], autoencoder: dict[str, Tensor], config: BagelConfig, tokenizer: Path
) -> None:
    """Weights in bfloat16, three JSON files as the official code reads them, and the tokenizer of another folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in (("ema", model), ("ae", autoencoder)):
        stored = {key: tensor.detach().to("cpu", torch.bfloat16).contiguous() for key, tensor in tensors.items()}
        save_file(stored, folder / f"{name}.safetensors", metadata={"format": "pt"})
    for name, values in config_files(config).items():
        (folder / name).write_text(json.dumps(values, indent=1) + "\n")
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)


def config_files(config: BagelConfig) -> dict[str, dict]:
    """`llm_config.json`, `vit_config.json` and `config.json` of a configuration."""
    decoder, vision = asdict(config.decoder), asdict(config.vision)
    positions = vision.pop("num_positions")
    side = round(positions**0.5)
    autoencoder = asdict(config.autoencoder)
    return {
        "llm_config.json": {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **decoder, "hidden_act": "silu",
            "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        },
        # One layer more than there are weights, as in the official file.
        "vit_config.json": {
            "model_type": "siglip_vision_model", **vision, "num_hidden_layers": vision["num_hidden_layers"] + 1,
            "image_size": side * vision["patch_size"], "hidden_act": "gelu_pytorch_tanh",
        },
        "config.json": {
            "architectures": ["BagelForConditionalGeneration"], "model_type": "bagel", "visual_gen": True,
            "visual_und": True, "vae_config": {**autoencoder, "downsample": config.autoencoder.downsample},
            "latent_patch_size": config.latent_patch_size, "max_latent_size": config.latent_side,
            "vit_max_num_patch_per_side": config.vit_side, "connector_act": "gelu_pytorch_tanh",
            "interpolate_pos": False, "timestep_shift": 1.0, "vae_transform": asdict(config.vae_transform),
            "vit_transform": asdict(config.vit_transform),
        },
    }  # fmt: skip
