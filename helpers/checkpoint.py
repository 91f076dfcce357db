"""A folder on disk -> a model on a device, in the weight format asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .bagel.autoencoder import Autoencoder
from .bagel.config import BagelConfig, read_config
from .bagel.layers import KERNELS, join
from .bagel.model import Bagel
from .bagel.session import Parts
from .bagel.text import TextCodec
from .memory import check_room

MODEL_FILE, AUTOENCODER_FILE = "ema.safetensors", "ae.safetensors"
WEIGHTS = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Choices:
    """Where and how a checkpoint is loaded, and why."""

    device: torch.device
    weights: str
    attention: str
    reason: str


def load(folder: Path | str, choices: Choices) -> Parts:
    """The model, autoencoder and text codec of an official BAGEL folder, each tensor read straight to the device.

    Raises FileNotFoundError for a missing file, ValueError for damaged files, unexpected or missing tensors and
    wrong shapes, MemoryError when the weights do not fit.
    """
    folder = Path(folder)
    config = read_config(folder, tensor_shapes(folder / MODEL_FILE))
    codec = TextCodec(_tokenizer(folder))
    model, autoencoder = _empty_modules(config, codec, choices)
    fill(model, folder / MODEL_FILE, choices.device, WEIGHTS[choices.weights])
    fill(autoencoder, folder / AUTOENCODER_FILE, choices.device, torch.float32)
    return _ready(model, autoencoder, codec)


def load_random(config: BagelConfig, tokenizer: Path, choices: Choices) -> Parts:
    """A model of these sizes with random weights, made on the device: for measuring, not for use.

    `tokenizer` is a folder with tokenizer files of at most the configuration's vocabulary. Raises MemoryError when
    the weights do not fit.
    """
    codec = TextCodec(_tokenizer(tokenizer))
    model, autoencoder = _empty_modules(config, codec, choices)
    fill_randomly(model, choices.device, WEIGHTS[choices.weights])
    fill_randomly(autoencoder, choices.device, torch.float32)
    return _ready(model, autoencoder, codec)


def _empty_modules(config: BagelConfig, codec: TextCodec, choices: Choices) -> tuple[Bagel, Autoencoder]:
    """Modules without storage. Raises MemoryError when their weights would not fit."""
    with torch.device("meta"):
        model = Bagel(config, codec.image_markers, choices.attention)
        autoencoder = Autoencoder(config.autoencoder)
    needed = _bytes(model, WEIGHTS[choices.weights]) + _bytes(autoencoder, torch.float32)
    check_room(needed, choices.weights, choices.device)
    return model, autoencoder


def _ready(model: Bagel, autoencoder: Autoencoder, codec: TextCodec) -> Parts:
    if model.device.type == "cpu":
        # The tiny autoencoder's convolutions take up to a quarter less time there with channels last.
        autoencoder.to(memory_format=torch.channels_last)
    return Parts(model.eval(), autoencoder.eval(), codec)


def choose(device: str, weights: str, attention: str) -> Choices:
    """Turn "auto" into what this machine does best. Raises ValueError for unknown or impossible wishes."""
    chosen = _device(device)
    reasons = []
    if weights == "auto":
        weights, why = _weights(chosen)
        reasons.append(f"{weights} because {why}")
    elif weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r} must be one of auto, {', '.join(WEIGHTS)}.")
    if attention == "auto":
        attention, why = _attention(chosen)
        reasons.append(f"{attention} because {why}")
    elif attention not in KERNELS:
        raise ValueError(f"attention {attention!r} must be one of auto, {', '.join(KERNELS)}.")
    _check_attention(attention, chosen, weights)
    return Choices(chosen, weights, attention, "; ".join(reasons) or "as asked")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {name!r} must be 'auto', 'cpu', 'cuda' or 'cuda:N'.") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} must be 'auto', 'cpu', 'cuda' or 'cuda:N'.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} was asked for, but PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
            "cards here: use device='auto' or 'cpu', or install a CUDA build of PyTorch (notebook 00 says which)."
        )
    return device


def _weights(device: torch.device) -> tuple[str, str]:
    if device.type == "cpu":
        return "fp32", "CPUs compute in float32 fastest"
    if torch.cuda.get_device_capability(device)[0] >= 8:
        return "bf16", "the model was trained in bfloat16 and this card computes in it"
    return "fp32", "this card has no bfloat16 arithmetic (compute capability below 8.0)"


def _attention(device: torch.device) -> tuple[str, str]:
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9:
        return "cudnn", "cuDNN's attention is the fastest on Hopper"
    return "sdpa", "PyTorch's own attention runs on every device"


def _check_attention(attention: str, device: torch.device, weights: str) -> None:
    if attention == "sdpa":
        return
    if device.type == "cpu":
        raise ValueError(f"attention {attention!r} needs a CUDA card; on the CPU use 'sdpa'.")
    if attention == "flash_attn":
        if WEIGHTS[weights] != torch.bfloat16:
            raise ValueError(f"attention 'flash_attn' computes in 16 bits, not with weights={weights!r}: use 'sdpa'.")
        try:
            import flash_attn  # noqa: F401 - only whether it can be imported
        except ImportError as error:
            raise ImportError(
                "attention 'flash_attn' needs the flash-attn package: pip install '.[flash]' or conda-forge's prebuilt "
                "flash-attn; attention='sdpa' needs nothing and computes the same."
            ) from error


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, from the header alone. Raises FileNotFoundError or ValueError."""
    with _open(file) as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def fill(module: nn.Module, file: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Replace the parameters of a module built on the meta device by those of a safetensors file.

    Raises ValueError naming the tensors that are missing, unexpected or of another shape.
    """
    _compare(file, tensor_shapes(file), {name: tuple(t.shape) for name, t in module.state_dict().items()})
    allocate(module, device, dtype)
    with _open(file, device) as tensors:
        for name, weight in module.state_dict().items():
            weight.copy_(tensors.get_tensor(name))


def fill_randomly(module: nn.Module, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
    """Give a module built on the meta device random weights that keep activations of one size through its layers.

    Matrices and convolutions are normal with variance 1 / inputs, norms one, biases zero.
    """
    allocate(module, device, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for name, weight in module.state_dict().items():
        if weight.ndim > 1:
            weight.normal_(std=weight[0].numel() ** -0.5, generator=generator)
        else:
            weight.fill_(float(not name.endswith("bias")))


def allocate(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give a module built on the meta device storage, not filled: once, where each weight shall stay."""
    for part in module.modules():
        for layers in part.over_one_input() if hasattr(part, "over_one_input") else ():
            join(layers, device, dtype)
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            if weight.is_meta:
                storage = torch.empty(weight.shape, device=device, dtype=dtype)
                setattr(part, name, nn.Parameter(storage, requires_grad=False))


def _compare(file: Path, found: dict, wanted: dict) -> None:
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {list(found[name])} instead of {list(wanted[name])}"
            for name in sorted(wanted.keys() & found.keys())
            if found[name] != wanted[name]
        ],
    }
    lines = [f"{len(names)} {what}: {_some(names)}" for what, names in problems.items() if names]
    if lines:
        raise ValueError(
            f"{file} does not fit the configuration beside it. Tensors {'; '.join(lines)}. "
            "Use weights and JSON files of the same BAGEL checkpoint."
        )


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _open(file: Path, device: torch.device | str = "cpu"):
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: a BAGEL folder holds {MODEL_FILE} and {AUTOENCODER_FILE}; notebook 01 shows how to "
            "fetch them."
        )
    try:
        return safe_open(file, "pt", device=str(device))
    except SafetensorError as error:
        raise ValueError(
            f"{file} ({file.stat().st_size:,} bytes) cannot be read ({error}): it is truncated or damaged; fetch it "
            "again and compare its size with the official one."
        ) from error


def _tokenizer(folder: Path):
    from transformers import Qwen2Tokenizer

    # Without its words the tokenizer would still load, and turn every text into nothing.
    words = ("tokenizer.json",) if (folder / "tokenizer.json").exists() else ("vocab.json", "merges.txt")
    for name in ("tokenizer_config.json", *words):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: fetch the tokenizer's files again.")
    try:
        return Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more precise for a damaged file
        raise ValueError(
            f"The tokenizer's files in {folder} cannot be read ({error}): fetch tokenizer_config.json and "
            f"{' and '.join(words)} again."
        ) from error


def _bytes(module: nn.Module, dtype: torch.dtype) -> int:
    return sum(p.numel() for p in module.parameters()) * dtype.itemsize
