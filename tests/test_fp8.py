"""Weights in FP8: what rounding may cost, and that both ways to multiply mean the same product."""

import pytest
import torch
from torch import nn

from helpers.bagel.layers import join, linears, round_to_fp8

CPU, WIDTH = torch.device("cpu"), 64


@pytest.fixture
def layers():
    """Three layers with biases, joined; their rows differ in size by a factor of 10,000."""
    torch.manual_seed(0)
    made = [nn.Linear(WIDTH, count) for count in (48, 16, 16)]
    join(made, CPU, torch.float32)
    for layer in made:
        with torch.no_grad():
            layer.weight.copy_(torch.randn(layer.weight.shape) * torch.logspace(-2, 2, len(layer.weight))[:, None])
            layer.bias.normal_()
    return made


def plain(layers):
    """The weights as float32 numbers."""
    joined = layers[0].joined
    return joined.weight.float() * joined.scale[:, None]


def test_every_weight_keeps_four_significant_bits_of_its_row(layers):
    before = layers[0].joined.weight.clone()
    round_to_fp8(layers)
    error = (plain(layers) - before).abs()
    # Three stored bits: half a unit of the last is 1/16. The smallest numbers of a row have a fixed step.
    limit = torch.maximum(before.abs() / 16, layers[0].joined.scale[:, None] * 2.0**-10)
    assert (error <= limit * 1.001).all()
    assert torch.equal(layers[0].joined.weight.float().abs().amax(1), torch.full((80,), 448.0))


def test_the_layers_share_the_rounded_weights(layers):
    round_to_fp8(layers)
    whole = layers[0].joined.weight
    assert {layer.weight.untyped_storage().data_ptr() for layer in layers} == {whole.untyped_storage().data_ptr()}
    assert [layer.weight.dtype for layer in layers] == [torch.float8_e4m3fn] * 3
    assert torch.equal(torch.cat([layer.weight.float() for layer in layers]), whole.float())


def test_a_row_alone_is_not_rounded(layers):
    round_to_fp8(layers)
    x = torch.randn(1, 1, WIDTH)
    expected = x @ plain(layers).T + layers[0].joined.bias
    torch.testing.assert_close(torch.cat(linears(x, layers), dim=-1), expected)


def test_several_rows_are_rounded_each_with_its_own_scale(layers):
    """Rows that FP8 holds exactly, up to a scale of each, lose nothing."""
    round_to_fp8(layers)
    sizes = torch.tensor([1e-4, 1.0, 300.0])
    exact = torch.randint(-8, 9, (3, WIDTH)).float()
    exact[:, 0] = 448  # the row's largest number sets the scale
    x = (exact * sizes[:, None])[None]
    expected = x @ plain(layers).T + layers[0].joined.bias
    found = torch.cat(linears(x, layers), dim=-1)
    assert found.shape == (1, 3, 80)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    noisy = torch.randn(1, 3, WIDTH)
    assert not torch.allclose(torch.cat(linears(noisy, layers), dim=-1), noisy @ plain(layers).T, rtol=1e-4)


def test_rounding_costs_a_few_percent_of_a_product(layers):
    x = torch.randn(1, 50, WIDTH)
    before = torch.cat(linears(x, layers), dim=-1)
    round_to_fp8(layers)
    after = torch.cat(linears(x, layers), dim=-1)
    error = (after - before).norm(dim=1) / before.norm(dim=1)  # of each output
    assert error.max() < 0.08
