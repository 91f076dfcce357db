"""Not enough memory: said before the weights are loaded, and explained where a verb runs out of it."""

from __future__ import annotations

import gc
import re
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch

from .hardware import main_memory

Result = TypeVar("Result")


def check_room(needed: int, weights: str, device: torch.device) -> None:
    """Raise MemoryError when `needed` bytes are not free: what was needed, what is free, who holds it, what to do."""
    if device.type == "cuda":
        cure = "end the process that holds the card (nvidia-smi), or choose a smaller weight format or another card"
    else:
        cure = "close other programs, or use weights='bf16'" if weights == "fp32" else "close other programs"
    if needed > _sizes(device)[0]:
        raise MemoryError(
            f"The weights need {needed / 1e9:.1f} GB as {weights} on {device}; {_in_words(device)}: {cure}."
        )


def explained(work: Callable[[], Result], device: torch.device) -> Result:
    """What `work` returns, done with `device` as the current card; memory that it left unused there goes back.

    Raises MemoryError, with the sizes and the cure, where PyTorch ran out of memory. It is raised without the error
    that it explains, whose traceback would keep the tensors of the call alive.
    """
    try:
        with current(device):
            made = work()
        _give_back(device)  # what recorded work took, nothing else can use
        return made
    except RuntimeError as error:
        wanted = _wanted(error)
        if wanted is None:
            raise
    gc.collect()
    _give_back(device)
    raise MemoryError(
        f"This call ran out of memory on {device} when it asked for {wanted} more; now that it has ended, "
        f"{_in_words(device)}: ask for a smaller picture (height, width), fewer samples at once or fewer new tokens, "
        "or end other processes."
    )


def current(device: torch.device) -> AbstractContextManager:
    """Within it, kernels that are started without naming a card run on this one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _give_back(device: torch.device) -> None:
    """Return the card's memory that PyTorch keeps without using it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _wanted(error: RuntimeError) -> str | None:
    """The size that PyTorch asked for in vain; None for an error of another kind."""
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        return None
    size = re.search(r"tried to allocate ([\d.]+ ?\w+)", str(error), re.IGNORECASE)
    return size.group(1) if size else "an unknown amount"


def _sizes(device: torch.device) -> tuple[int, int]:
    """Bytes that are free, and in all."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    total, free = main_memory()
    return free, total


def _in_words(device: torch.device) -> str:
    """How much is free of how much and, on a card, who holds the rest."""
    free, total = _sizes(device)
    holders = _card_processes() if device.type == "cuda" else ""
    return f"{free / 1e9:.1f} of {total / 1e9:.1f} GB are free{holders}"


def _card_processes() -> str:
    """What nvidia-smi knows about who holds the cards' memory; empty where it says nothing."""
    command = ["nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip().splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f" (held by: {'; '.join(lines)})" if lines else ""
