"""Muon, with all matrices of one shape updated at once.

The same arithmetic as `torch.optim.Muon` with adjust_lr_fn="match_rms_adamw" and no weight decay, which takes one
matrix after another: with a hundred small ones that cost a fifth of a training step. Source: arXiv 2502.16982.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a quintic that pushes all singular values towards 1
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Steps of momentum, made orthogonal. A convolution counts as the matrix [channels out, everything else].

    Raises ValueError for a parameter of fewer than two axes.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})
        shapes = {tuple(matrix.shape) for matrix in self._all()}
        wrong = [shape for shape in shapes if len(shape) < 2]
        if wrong:
            raise ValueError(f"Muon takes matrices; a parameter has the shape {wrong[0]}: give it to AdamW.")
        self.kinds = [[m for m in self._all() if tuple(m.shape) == shape] for shape in sorted(shapes)]
        self.momenta = [torch.zeros_like(torch.stack(kind)) for kind in self.kinds]

    def _all(self) -> list[Tensor]:
        return [matrix for group in self.param_groups for matrix in group["params"]]

    @torch.no_grad()
    def step(self) -> None:
        lr, momentum = self.param_groups[0]["lr"], self.param_groups[0]["momentum"]
        for kind, buffer in zip(self.kinds, self.momenta, strict=True):
            gradient = torch.stack([matrix.grad for matrix in kind])
            buffer.lerp_(gradient, 1 - momentum)
            flat = gradient.lerp(buffer, momentum).flatten(2)
            update = orthogonal(flat).to(buffer.dtype).view_as(buffer)
            # Scaled so that an element moves about as far as AdamW at the same rate would move it.
            scale = 0.2 * max(flat.shape[1:]) ** 0.5
            torch._foreach_add_(kind, list(update.unbind()), alpha=-lr * scale)


def orthogonal(x: Tensor) -> Tensor:
    """The nearest matrices whose singular values are near 1, bfloat16 [count, rows, columns]."""
    a, b, c = NEWTON_SCHULZ
    wide = x.shape[1] <= x.shape[2]
    x = x.bfloat16() if wide else x.bfloat16().mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT
