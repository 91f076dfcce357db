"""What the device can do at most, measured now: multiply large matrices, copy memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Side of the square matrices and bytes of the copy: large enough that starting the work does not count.
_MATRIX = {"cuda": 8192, "cpu": 1024}
_COPY = {"cuda": 1 << 30, "cpu": 1 << 27}
# At least so many tries, and tries for so many seconds: a card that slept has to reach its clock, and a processor that
# others use as well has a quiet moment.
_TRIES, _SECONDS = 5, 0.5
_LONG = 4.0


@dataclass(frozen=True)
class Limits:
    """A device's rates, each a second: `matmul` floating-point operations, `copy` bytes read and written.

    `dtype`: of the matrices. `sustained`: operations over seconds without a pause, when a card is warm and at the limit
    of its power; None on a processor. `fp8`: operations of a product in 8 bits with a scale for each row and column;
    None where it was not asked for or the device has none.
    """

    device: str
    dtype: str
    matmul: float
    copy: float
    sustained: float | None = None
    fp8: float | None = None


@torch.inference_mode()
def limits(device: torch.device, dtype: torch.dtype, fp8: bool = False) -> Limits:
    """The best rates of many tries; `fp8` asks for those of an 8-bit product as well."""
    side, size = _MATRIX[device.type], _COPY[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return Limits(
        str(device),
        str(dtype).removeprefix("torch."),
        matmul=2 * side**3 / _fastest(device, lambda: left @ right),
        copy=2 * size / _fastest(device, lambda: target.copy_(source)),
        sustained=2 * side**3 / _mean(device, lambda: left @ right) if device.type == "cuda" else None,
        fp8=_fp8(device) if fp8 and device.type == "cuda" else None,
    )


def wait(device: torch.device) -> None:
    """Return when the device has done what it was given; a processor always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fp8(device: torch.device) -> float | None:
    side = _MATRIX["cuda"]
    left, right = (torch.randn(side, side, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    rows, columns = torch.ones(side, 1, device=device), torch.ones(1, side, device=device)

    def product() -> torch.Tensor:
        return torch._scaled_mm(left, right.t(), rows, columns, out_dtype=torch.bfloat16, use_fast_accum=True)

    try:
        return 2 * side**3 / _fastest(device, product)
    except RuntimeError:  # a card that is too old for it
        return None


def _mean(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds of one of many tries that follow each other for _LONG seconds, of which the first half warms up."""
    for _ in range(2):
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < _LONG / 2:
            for _ in range(20):
                work()
            wait(device)
            count += 20
        mean = (time.perf_counter() - start) / count
    return mean


def _fastest(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds of the fastest try, after one that does not count."""
    seconds = []
    work()
    wait(device)
    while len(seconds) < _TRIES or sum(seconds) < _SECONDS:
        start = time.perf_counter()
        work()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
