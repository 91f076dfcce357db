"""What "auto" means on this machine: device, weight format, attention, kernels; and why."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache

import torch

from .bagel.layers import KERNELS
from .bagel.packed import PACKERS
from .memory import current

# Weight formats and, for each kind of device, the type that activations have with them.
WEIGHTS = {
    "bf16": {"cpu": torch.bfloat16, "cuda": torch.bfloat16},
    "fp16": {"cpu": torch.float16, "cuda": torch.float16},
    "fp32": {"cpu": torch.float32, "cuda": torch.float32},
    **dict.fromkeys(("fp8", *PACKERS, "df11", "gguf"), {"cpu": torch.float32, "cuda": torch.bfloat16}),
}
# Formats that weights must have in their folder already.
BROUGHT = ("df11", "gguf")
EXPERTS = ("all", "understanding")
# The attention of a 1024x1024 picture of the released model beside its prompt: tokens, keys, heads, key heads, width.
_MEASURED = (4098, 4162, 28, 4, 128)


@dataclass(frozen=True)
class Choices:
    """Where and how a checkpoint is loaded, and why.

    `experts`: "all", or "understanding" without what only drawing needs. `kernels`: the decoder's layers run through
    `bagel.kernels`.
    """

    device: torch.device
    weights: str
    attention: str
    experts: str
    kernels: bool
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations."""
        return _activations(self.weights, self.device)


def choose(device: str, weights: str, attention: str, experts: str = "all") -> Choices:
    """Turn "auto" into what this machine does best. Raises ValueError for unknown or impossible wishes."""
    if experts not in EXPERTS:
        raise ValueError(f"experts {experts!r} must be one of {', '.join(EXPERTS)}.")
    chosen = _device(device)
    reasons = []
    if weights == "auto":
        weights, why = _weights(chosen)
        reasons.append(f"{weights} because {why}")
    _check_weights(weights, chosen)
    if attention == "auto":
        attention, why = _attention(chosen, _activations(weights, chosen))
        reasons.append(f"{attention} because {why}")
    _check_attention(attention, chosen, _activations(weights, chosen))
    lacking = _lacking_for_kernels(chosen, _activations(weights, chosen))
    if weights == "df11" and lacking:
        reasons.append(f"DFloat11 is unpacked while loading, because {lacking}")
    if chosen.type == "cuda":
        slower = f"plain layers, slower, because {lacking}"
        reasons.append(slower if lacking else "own kernels, which the first calls compile for some seconds")
    return Choices(chosen, weights, attention, experts, not lacking, "; ".join(reasons) or "as asked")


def _activations(weights: str, device: torch.device) -> torch.dtype:
    """The type of activations; cards without bfloat16 arithmetic take float16 for packed weights."""
    if weights in PACKERS and device.type == "cuda" and _capability(device) < (8, 0):
        return torch.float16
    return WEIGHTS[weights][device.type]


def _lacking_for_kernels(device: torch.device, dtype: torch.dtype) -> str:
    """Why `bagel.kernels` cannot run there; empty where they can."""
    if device.type != "cuda":
        return "there is no card"
    if dtype == torch.float16:
        return "they do not keep float16 from overflowing"
    if _capability(device) < (8, 0):
        return f"this card's compute capability is {'.'.join(map(str, _capability(device)))}, below 8.0"
    return "" if _has_triton() else "Triton is not installed"


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


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
    if _capability(device)[0] >= 8:
        return "bf16", "the model was trained in bfloat16 and this card computes in it"
    return "fp16", "this card has no bfloat16 arithmetic (compute capability below 8.0)"


def _check_weights(weights: str, device: torch.device) -> None:
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r} must be one of auto, {', '.join(WEIGHTS)}.")
    if weights == "fp8" and device.type == "cuda" and _capability(device) < (8, 9):
        raise ValueError(
            f"weights 'fp8' needs a card of compute capability 8.9 or higher, this one has "
            f"{'.'.join(map(str, _capability(device)))}: use 'bf16'."
        )


def _attention(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    if device.type == "cpu":
        return "sdpa", "PyTorch's own attention runs on every device"
    with current(device):
        times = attention_times(device, dtype)
    told = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in times.items())
    return min(times, key=times.get), f"it was the fastest here ({told})"


@cache
def attention_times(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of one attention of a large picture, by each kernel that runs on this card; measured once."""
    tokens, keys, heads, kv_heads, width = _MEASURED
    shapes = (1, tokens, heads, width), (1, keys, kv_heads, width), (1, keys, kv_heads, width)
    inputs = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    times = {}
    for name, kernel in KERNELS.items():
        try:
            times[name] = _seconds(lambda kernel=kernel: kernel(*inputs))
        except (RuntimeError, ImportError):  # a kernel that this card, type or installation does not have
            continue
    return times


def _seconds(work) -> float:
    """Of the fastest of five calls on the current card, after one that does not count."""
    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times[1:])


def _check_attention(attention: str, device: torch.device, dtype: torch.dtype) -> None:
    if attention not in KERNELS:
        raise ValueError(f"attention {attention!r} must be one of auto, {', '.join(KERNELS)}.")
    if attention == "sdpa":
        return
    if device.type == "cpu":
        raise ValueError(f"attention {attention!r} needs a CUDA card; on the CPU use 'sdpa'.")
    if attention == "flash_attn":
        if dtype == torch.float32:
            raise ValueError("attention 'flash_attn' computes in 16 bits, not with weights='fp32': use 'sdpa'.")
        try:
            import flash_attn  # noqa: F401 - only whether it can be imported
        except ImportError as error:
            raise ImportError(
                "attention 'flash_attn' needs the flash-attn package: pip install '.[flash]' or conda-forge's prebuilt "
                "flash-attn; attention='sdpa' needs nothing and computes the same."
            ) from error
