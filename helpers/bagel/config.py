"""The sizes of a BAGEL model, read from the JSON files of an official checkpoint folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DecoderConfig:
    """Qwen2-style decoder with two experts; names as in `llm_config.json`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int

    def __post_init__(self):
        _divides("num_attention_heads", self.num_attention_heads, "hidden_size", self.hidden_size)
        _divides("num_key_value_heads", self.num_key_value_heads, "num_attention_heads", self.num_attention_heads)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP2-style encoder; `num_hidden_layers` is the number really used (one less than the file says)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    patch_size: int
    layer_norm_eps: float
    num_positions: int

    def __post_init__(self):
        _divides("num_attention_heads", self.num_attention_heads, "hidden_size", self.hidden_size)


@dataclass(frozen=True)
class AutoencoderConfig:
    """FLUX-style autoencoder; names as in `config.json` under `vae_config`."""

    in_channels: int
    out_ch: int
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    scale_factor: float
    shift_factor: float

    def __post_init__(self):
        _divides("the 32 groups of its GroupNorm", 32, "ch", self.ch)

    @property
    def downsample(self) -> int:
        """Picture pixels per latent pixel."""
        return 2 ** (len(self.ch_mult) - 1)


@dataclass(frozen=True)
class ResizeRule:
    """Limits of one picture transform, in pixels."""

    max_size: int
    min_size: int
    stride: int


@dataclass(frozen=True)
class BagelConfig:
    """Everything that decides a tensor's shape or a picture's size."""

    decoder: DecoderConfig
    vision: VisionConfig
    autoencoder: AutoencoderConfig
    latent_patch_size: int
    latent_side: int  # rows and columns of `latent_pos_embed`
    vit_side: int  # rows and columns of `vit_pos_embed`
    vae_transform: ResizeRule
    vit_transform: ResizeRule

    @property
    def latent_stride(self) -> int:
        """Picture pixels per latent token, along one side."""
        return self.latent_patch_size * self.autoencoder.downsample

    @property
    def latent_dim(self) -> int:
        """Numbers in one latent token."""
        return self.latent_patch_size**2 * self.autoencoder.z_channels

    @property
    def native_side(self) -> int:
        """Side in pixels of the largest square picture the model has positions for."""
        return self.latent_side * self.latent_stride


# What `config.json` may leave out: FLUX's autoencoder and the transforms of the released model.
_FLUX = {
    "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_channels": 16,
    "scale_factor": 0.3611, "shift_factor": 0.1159,
}  # fmt: skip
_VAE_TRANSFORM = {"max_size": 1024, "min_size": 512, "stride": 16}
_VIT_TRANSFORM = {"max_size": 980, "min_size": 224, "stride": 14}


def read_config(folder: Path | str, shapes: dict[str, tuple[int, ...]]) -> BagelConfig:
    """The configuration of a checkpoint folder.

    `shapes` (tensor name -> shape, from `ema.safetensors`) settles the sides of the position tables, because
    the published `config.json` states a wrong `max_latent_size`. `config.json` itself may be missing.
    Raises FileNotFoundError or ValueError naming the file and the key at fault.
    """
    folder = Path(folder)
    bagel = _read(folder / "config.json") if (folder / "config.json").exists() else {}
    return BagelConfig(
        decoder=_decoder(_read(folder / "llm_config.json"), folder),
        vision=_vision(_read(folder / "vit_config.json"), shapes, folder),
        autoencoder=autoencoder_config(bagel.get("vae_config") or {}),
        latent_patch_size=bagel.get("latent_patch_size", 2),
        latent_side=_side(shapes, "latent_pos_embed.pos_embed"),
        vit_side=_side(shapes, "vit_pos_embed.pos_embed"),
        vae_transform=_rule(bagel.get("vae_transform"), _VAE_TRANSFORM),
        vit_transform=_rule(bagel.get("vit_transform"), _VIT_TRANSFORM),
    )


def autoencoder_config(values: dict) -> AutoencoderConfig:
    """`vae_config` of `config.json`, completed with FLUX's values."""
    known = {name: values.get(name, default) for name, default in _FLUX.items()}
    return AutoencoderConfig(**{**known, "ch_mult": tuple(known["ch_mult"])})


def _rule(given: dict | None, standard: dict) -> ResizeRule:
    return ResizeRule(**{name: (given or {}).get(name, value) for name, value in standard.items()})


def _decoder(values: dict, folder: Path) -> DecoderConfig:
    # `rope_theta` stands at the top level in published files; transformers 5 writes it under `rope_parameters`.
    theta = values.get("rope_theta") or (values.get("rope_parameters") or {}).get("rope_theta")
    values = {**values, "rope_theta": theta}
    return DecoderConfig(**_pick(values, DecoderConfig, folder / "llm_config.json"))


def _vision(values: dict, shapes: dict, folder: Path) -> VisionConfig:
    file = folder / "vit_config.json"
    positions = _shape(shapes, "vit_model.vision_model.embeddings.position_embedding.weight")[0]
    values = {"num_channels": 3, "layer_norm_eps": 1e-6, **values, "num_positions": positions}
    picked = _pick(values, VisionConfig, file)
    # The official code drops the last layer of the file's count, so the weights hold one less.
    return VisionConfig(**{**picked, "num_hidden_layers": picked["num_hidden_layers"] - 1})


def _pick(values: dict, cls: type, file: Path) -> dict:
    names = list(cls.__dataclass_fields__)
    missing = [name for name in names if values.get(name) is None]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}: take the file from the official repository again.")
    for name in names:
        if isinstance(values[name], bool) or not isinstance(values[name], (int, float)) or values[name] <= 0:
            raise ValueError(f"{file}: {name} is {values[name]!r}, but must be a number above 0: fetch the file again.")
    return {name: values[name] for name in names}


def _read(file: Path) -> dict:
    if not file.exists():
        raise FileNotFoundError(
            f"{file} is missing. A BAGEL folder holds ema.safetensors, ae.safetensors, llm_config.json, "
            "vit_config.json, config.json and the tokenizer's files; notebook 01 shows how to fetch them."
        )
    try:
        values = json.loads(file.read_text(encoding="utf8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no valid JSON ({error}): fetch it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds {type(values).__name__} instead of names and values: fetch it again.")
    return values


def _shape(shapes: dict, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"ema.safetensors has no tensor {name}: this is not a BAGEL checkpoint.")
    return tuple(shapes[name])


def _side(shapes: dict, name: str) -> int:
    rows = _shape(shapes, name)[0]
    side = round(rows**0.5)
    if side * side != rows:
        raise ValueError(f"{name} has {rows} rows, which is no square: the file is damaged.")
    return side


def _divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    if value % divisor:
        raise ValueError(f"{name} {value} must be divisible by {divisor_name} ({divisor}).")


# The released model, BAGEL-7B-MoT.
RELEASED = BagelConfig(
    decoder=DecoderConfig(3584, 18944, 28, 28, 4, 152064, 1e6, 1e-6, 32768),
    vision=VisionConfig(1152, 4304, 26, 16, 3, 14, 1e-6, 4900),
    autoencoder=AutoencoderConfig(3, 3, 128, (1, 2, 4, 4), 2, 16, 0.3611, 0.1159),
    latent_patch_size=2,
    latent_side=64,
    vit_side=70,
    vae_transform=ResizeRule(1024, 512, 16),
    vit_transform=ResizeRule(980, 224, 14),
)
