"""The processes that train together, one a card."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


class Team:
    """Started by `torchrun`, which tells each process its number; without it, a team of one."""

    def __init__(self, device: str):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if self.size > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=5))

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def seed(self, seed: int) -> int:
        """A seed of its own for each process."""
        return seed * self.size + self.rank

    def average(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its mean over all processes."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [p.view(t.shape) for p, t in zip(parts, tensors, strict=True)])

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process: all get the same answer."""
        if self.size == 1:
            return flag
        told = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return bool(told.item())

    def wait(self) -> None:
        """Until all processes are here: what the first has written by then, all can read."""
        self.any(False)
