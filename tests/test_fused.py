"""The fused layers with their kernels written out in torch: all that they do but the kernels themselves."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from helpers import load_bagel
from helpers.bagel.images import open_picture
from helpers.bagel.layers import rotate

FOLDER = ROOT / "tests" / "reference"


def round_rows(x):
    rows = x.flatten(0, -2)
    scale = rows.float().abs().amax(1, keepdim=True) / 448
    return (rows.float() / scale).to(torch.float8_e4m3fn).view(x.shape), scale


def norm(x, weight, eps):
    return weight * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def norm_rows(x, weight, eps, more, fp8):
    if more is not None:
        x += more
    made = norm(x, weight, eps)
    return round_rows(made) if fp8 else (made, None)


def gate_rows(both, fp8):
    gate, up = both.chunk(2, dim=-1)
    made = F.silu(gate) * up
    return round_rows(made) if fp8 else (made, None)


def place_heads(rows, bias, norms, rope, q, keys, values, slot, first=0, index=None):
    kv_heads, width = keys.shape[2:]
    heads = (rows if bias is None else rows + bias).unflatten(-1, (-1, width))
    q_norm, k_norm, eps = norms
    rope = tuple(table[:, :, None] for table in rope)
    tokens, slots = slice(first, first + rows.shape[1]), slice(slot + first, slot + first + rows.shape[1])
    q[:, tokens] = rotate(norm(heads[:, :, : -2 * kv_heads], q_norm, eps), rope)
    keys[:, slots] = rotate(norm(heads[:, :, -2 * kv_heads : -kv_heads], k_norm, eps), rope)
    values[:, slots] = heads[:, :, -kv_heads:]


WRITTEN_OUT = SimpleNamespace(round_rows=round_rows, norm_rows=norm_rows, gate_rows=gate_rows, place_heads=place_heads)


@pytest.mark.parametrize(("weights", "tolerance"), [("fp32", 1e-5), ("fp8", 1e-3), ("int8", 1e-5), ("int4", 1e-5)])
def test_pictures_are_those_of_the_plain_layers(monkeypatch, weights, tolerance):
    """A batch whose prompts differ in length, both guidances, pictures and texts in the context, a step cache."""
    bagel = load_bagel(FOLDER / "checkpoint", weights=weights, device="cpu", attention="sdpa")
    decoder, picture = bagel.model.language_model.model, open_picture(FOLDER / "tall.png").resize((32, 64))
    ask = {"num_timesteps": 8, "seed": 3, "cfg_interval": (0.5, 1.0)}
    calls = (
        lambda: bagel.generate(["the red cat", "one"], height=32, width=64, **ask)[1].latent,
        lambda: bagel.generate("the red cat", height=64, width=64, step_cache="taylorseer", **ask).latent,
        lambda: bagel.edit(picture, "make it blue", **ask).latent,
    )
    for call in calls:
        decoder.kernels = None
        expected = call()
        decoder.kernels = WRITTEN_OUT
        assert (call() - expected).norm() <= tolerance * expected.norm()
