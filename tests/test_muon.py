"""Muon over stacked matrices against PyTorch's, which takes them one by one."""

import pytest
import torch

from helpers.tiny.muon import Muon, orthogonal

SHAPES = [(12, 8), (8, 12), (8, 8), (12, 8), (8, 8)]


def matrices():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


def test_steps_are_those_of_the_library():
    ours, theirs = matrices(), matrices()
    optimizers = (
        Muon(ours, lr=0.1),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, start in zip(ours, theirs, matrices(), strict=True):
        assert (one - start).abs().max() > 0.1
        # bfloat16 inside: sums in another order differ by its rounding
        torch.testing.assert_close(one, other, atol=0.02, rtol=0)


def test_the_rate_is_read_at_every_step():
    (one,) = [torch.eye(4).requires_grad_()]
    optimizer = Muon([one], lr=0.1)
    optimizer.param_groups[0]["lr"] = 0.0
    one.grad = torch.ones(4, 4)
    optimizer.step()
    torch.testing.assert_close(one, torch.eye(4))


def test_a_convolution_is_the_matrix_of_its_outputs():
    start = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(2))
    one, flat = start.clone().requires_grad_(), start.flatten(1).clone().requires_grad_()
    for weight in (one, flat):
        weight.grad = start.reshape(weight.shape).sin()
        Muon([weight], lr=0.1).step()
    assert torch.equal(one.flatten(1), flat)
    assert not torch.equal(one, start)


def test_singular_values_come_near_one():
    values = torch.linalg.svdvals(
        orthogonal(torch.randn(3, 10, 20, generator=torch.Generator().manual_seed(0))).float()
    )
    assert values.min() > 0.5 and values.max() < 1.4


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match="AdamW"):
        Muon([torch.zeros(3, requires_grad=True)], lr=0.1)
