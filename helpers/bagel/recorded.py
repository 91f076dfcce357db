"""Work on a card, recorded once and replayed: the processor starts it with one call instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F


def recorded(work: Callable[[], None], pool: tuple[int, int] | None = None) -> Callable[[], None]:
    """The kernels that `work` starts on the current card, as one CUDA graph: what comes back replays them.

    Recording runs nothing. `work` must have run before in this process, with tensors of the same shapes, and read and
    write the same memory every time. What it allocates lives as long as the graph; graphs of one `pool` (see
    `torch.cuda.graph_pool_handle`) share it, so the results of one are lost when another is replayed.
    """
    graph, stream = torch.cuda.CUDAGraph(), _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Not torch.cuda.graph: it waits for the card and gives back its cached memory first.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """The one stream that records, with the memory that the matrix library keeps for every stream.

    Taken while recording, that memory would hold on to a whole graph's.
    """
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        x = torch.zeros(16, 16, device=device, dtype=torch.float16)
        F.linear(x, x, x[0])
        x @ x
    return stream
