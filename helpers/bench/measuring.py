"""Seconds, where they went, and the most memory of a call: one row for each work."""

from __future__ import annotations

import gc
import re
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from ..choices import choose
from ..hub import RANDOM
from ..pipeline import BagelPipeline, OnStep, load_bagel
from .rates import wait

MEMORY = {
    "cuda": "peak of the card's memory that PyTorch held, weights included",
    "cpu": "peak of the process beyond what it held before the first work, weights not included",
}
Mark = float | torch.cuda.Event


@dataclass(frozen=True)
class Row:
    """One measured work; times in seconds, memory in bytes (see MEMORY), None where it has no meaning.

    `weights`: their format. `count`: pictures or tokens that one call makes. `runs`: the seconds of every call after
    the first; `seconds` and the split in `prefill`, `denoise` and `decode` are those of the median one (of an even
    number the faster of the middle two). `first_seconds`: of the first call, apart, since it warms up and compiles.
    `tokens_per_second`: of a text's tokens after the first; `first_token_seconds`: of a call that stops at the first.
    `peak_reserved`: what PyTorch took from the card for it. `floor_seconds`: computed, see `floors`.
    `error`: why there is nothing else.
    """

    work: str
    weights: str
    count: int = 1
    seconds: float | None = None
    runs: tuple[float, ...] = ()
    first_seconds: float | None = None
    prefill: float | None = None
    denoise: float | None = None
    decode: float | None = None
    tokens_per_second: float | None = None
    first_token_seconds: float | None = None
    peak_allocated: int | None = None
    peak_reserved: int | None = None
    floor_seconds: float | None = None
    error: str | None = None

    @property
    def share(self) -> float | None:
        """The floor as a part of the measured time: 1 would mean that only a faster device helps."""
        return self.floor_seconds / self.seconds if self.seconds and self.floor_seconds is not None else None

    def values(self) -> dict[str, Any]:
        """The fields and `share`, as JSON has them."""
        return {**asdict(self), "share": self.share}


@dataclass(frozen=True)
class Call:
    """One timed call: `split` in prefill, denoise and decode, what it gave back, the latent after the first step."""

    seconds: float
    split: tuple[float | None, float | None, float | None]
    result: Any
    first_latent: Tensor | None


def load(model: str, weights: str, device: str) -> tuple[BagelPipeline, Row]:
    """A loaded model, and the row of loading it; `weights` and `device` may be "auto". Errors: those of `load_bagel`.

    It is loaded once, so a folder's seconds depend on what the operating system still holds of its files.
    """
    choices = choose(device, weights, "auto")
    torch.zeros(1, device=choices.device)  # starts a card, which is no part of loading
    with Memory(choices.device, psutil.Process().memory_info().rss) as memory:
        start = time.perf_counter()
        bagel = load_bagel(model, choices.weights, device)
        wait(choices.device)
        seconds = time.perf_counter() - start
    work = "making random weights" if model in RANDOM else "loading"
    peaks = {"peak_allocated": memory.allocated, "peak_reserved": memory.reserved}
    return bagel, Row(work, choices.weights, seconds=seconds, runs=(seconds,), **peaks)


def measure(
    work: str,
    weights: str,
    call: Callable[[OnStep], Any],
    runs: int,
    device: torch.device,
    before: int,
) -> tuple[Row, Call]:
    """The row of a work that `call(on_step)` does, and its last run; `before`: bytes that the process held, see Memory.

    The memory is that of the runs; what compiling takes in the first call is left out.
    """
    _free(device)
    first = timed(call, device).seconds
    with Memory(device, before) as memory:
        calls = [timed(call, device) for _ in range(runs)]
    middle = sorted(calls, key=lambda one: one.seconds)[(runs - 1) // 2]
    prefill, denoise, decode = middle.split
    row = Row(
        work=work,
        weights=weights,
        seconds=middle.seconds,
        runs=tuple(one.seconds for one in calls),
        first_seconds=first,
        prefill=prefill,
        denoise=denoise,
        decode=decode,
        peak_allocated=memory.allocated,
        peak_reserved=memory.reserved,
    )
    return row, calls[-1]


def timed(call: Callable[[OnStep], Any], device: torch.device) -> Call:
    """One call from a device that waits to a device that waits again."""
    clock = Clock(device)
    wait(device)
    start = time.perf_counter()
    result = call(clock)
    clock.mark()
    wait(device)
    seconds = time.perf_counter() - start
    return Call(seconds, clock.split(seconds), result, clock.first_latent)


def failed(work: str, weights: str, error: Exception) -> Row:
    """The row of a work that ended in an error: its first line, without the folders of this machine."""
    line = (str(error).strip().splitlines() or [""])[0]
    line = re.sub(r"(?<!\w)/(?:[^\s/'\"]+/)+", "", line)
    return Row(work, weights, error=f"{type(error).__name__}: {line[:300]}")


class Clock:
    """Hears of every step of a picture, as its `on_step`, and says afterwards where the time went.

    On a card a mark is an event in the card's own queue: to wait for the card at every step would slow it down. What
    lies between two marks is a step. Before the first mark lie the prefill and the first step, which is taken to be as
    long as the second: both are guided, and a step cache computes both.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[Mark] = []
        self.first_latent: Tensor | None = None

    def __call__(self, step: int, _t: float, latent: Tensor) -> None:
        self.mark()
        if step == 0:
            self.first_latent = latent.clone()

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def split(self, seconds: float) -> tuple[float | None, float | None, float | None]:
        """(prefill, denoise, decode) of a call of `seconds` whose end was marked; None each below two steps.

        Prefill is what the others leave; where a step happened to take longer than the first, that is nothing.
        """
        *steps, end = self.marks
        if len(steps) < 2:
            return None, None, None
        denoise = _between(steps[0], steps[-1]) + _between(steps[0], steps[1])
        decode = _between(steps[-1], end)
        return max(0.0, seconds - denoise - decode), denoise, decode


class Memory:
    """Measures a block's memory as MEMORY says; `allocated` and `reserved` bytes are set at its end.

    `before`: what the process held, in bytes; it is left out on a processor, where `reserved` has no meaning.
    """

    def __init__(self, device: torch.device, before: int):
        self.device, self.before = device, before
        self.allocated: int = 0
        self.reserved: int | None = None
        self._stop = threading.Event()
        self._process = psutil.Process()

    def __enter__(self) -> Memory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.allocated = torch.cuda.max_memory_allocated(self.device)
            self.reserved = torch.cuda.max_memory_reserved(self.device)
        else:
            self._stop.set()
            self._watcher.join()

    def _watch(self) -> None:
        """The operating system keeps no peak that can be reset, so look often; a shorter peak is missed."""
        while not self._stop.wait(0.002):
            self.allocated = max(self.allocated, self._process.memory_info().rss - self.before)


def _between(earlier: Mark, later: Mark) -> float:
    """Seconds; a card must have passed both marks."""
    if isinstance(earlier, float):
        return later - earlier
    return earlier.elapsed_time(later) / 1000


def _free(device: torch.device) -> None:
    """Give back what an earlier work left, so that it does not count as this one's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
