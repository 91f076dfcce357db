"""The kernels that write text, against the plain modules: on a card, or in Triton's interpreter on the CPU."""

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from helpers import load_bagel
from helpers.bagel import decoding
from helpers.bagel.images import open_picture
from helpers.bagel.layers import RMSNorm, rotary_table, rotate
from helpers.bagel.stepping import TokenStep

pytest.importorskip("triton", reason="Triton is not installed: it comes with CUDA builds of torch")
from helpers.bagel import kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# NumPy, which the interpreter computes with, has no bfloat16.
TYPES = [torch.float32, torch.bfloat16 if DEVICE.type == "cuda" else torch.float16]
FOLDER = ROOT / "tests" / "reference"


@pytest.fixture(autouse=True)
def fewer_programs(monkeypatch):
    """The interpreter runs one program after the other: larger blocks of rows, so that there are few."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(kernels, "_ROWS", 64)
        monkeypatch.setattr(kernels, "_COLUMNS", 64)
        monkeypatch.setattr(kernels, "_SPLITS", 4)


def random(*shape, kind=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, kind)


def close(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.fixture(params=TYPES, ids=str)
def kind(request):
    return request.param


def normed(x):
    """x through a norm with uneven weights, the norm's weights, its epsilon."""
    norm = RMSNorm(len(x), 1e-3)
    norm.weight.data = random(len(x), kind=x.dtype).abs()
    return norm(x), norm.weight, norm.eps


def test_a_row_times_a_weight(kind):
    x, weight, bias, residual = (random(*shape, kind=kind) for shape in ((200,), (130, 200), (130,), (130,)))
    weight = weight / 200**0.5
    expected, norm, eps = normed(x)
    close(kernels.row_product(x, weight), F.linear(x, weight))
    close(kernels.row_product(x, weight, bias, norm=norm, eps=eps), F.linear(expected, weight, bias))
    close(kernels.row_product(x, weight, residual=residual), residual + F.linear(x, weight))


def test_a_gated_row(kind):
    x, weight = random(96, kind=kind), random(2 * 70, 96, kind=kind) / 96**0.5
    expected, norm, eps = normed(x)
    gate, up = F.linear(expected, weight).split(70)
    close(kernels.row_product(x, weight, norm=norm, eps=eps, gated=True), F.silu(gate) * up)


@pytest.mark.parametrize("gated", [False, True])
def test_a_row_times_a_weight_in_fp8(kind, gated):
    x, scale = random(96, kind=kind), random(140).abs() + 0.1
    weight = random(140, 96).to(torch.float8_e4m3fn)
    plain = (weight.float() * scale[:, None]).to(kind)
    found = kernels.row_product(x, weight, scale=scale, gated=gated)
    tolerance = 1e-5 if kind == torch.float32 else 2e-2  # the plain weight is rounded
    expected = kernels.row_product(x, plain, gated=gated)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def fp8_rows(rows):
    """What rounding rows to FP8 gives: numbers and scales."""
    scale = rows.float().abs().amax(-1, keepdim=True) / 448
    return (rows.float() / scale).to(torch.float8_e4m3fn).float() * scale


def close_in_fp8(rounded, expected):
    """Up to one step of FP8. The interpreter loses the carry where a number is rounded up to a power of two."""
    rows, scale = rounded
    found, expected = rows.flatten(0, -2).float() * scale, fp8_rows(expected.flatten(0, -2))
    off = (found - expected).abs() > 0.13 * expected.abs() + 1e-3
    assert off.float().mean() <= (0.05 if DEVICE.type == "cpu" else 0)


@pytest.mark.parametrize("more", [False, True])
def test_norms_of_rows(kind, more):
    x, added, weight = (random(*shape, kind=kind) for shape in ((2, 3, 200), (2, 3, 200), (200,)))
    before = x + added if more else x.clone()
    norm = RMSNorm(200, 1e-3)
    norm.weight.data = weight
    made, scale = kernels.norm_rows(x, weight, 1e-3, added if more else None, False)
    close(made, norm(before))
    assert scale is None and torch.equal(x, before)
    close_in_fp8(kernels.norm_rows(x, weight, 1e-3, None, True), norm(before))


def test_gated_rows(kind, monkeypatch):
    monkeypatch.setattr(kernels, "_GATE", 128)  # several programs a row
    both = random(2, 3, 400, kind=kind)
    expected = F.silu(both[..., :200]) * both[..., 200:]
    close(kernels.gate_rows(both, False)[0], expected)
    close_in_fp8(kernels.gate_rows(both, True), expected)


def test_rounded_rows(kind):
    x = random(2, 5, 72, kind=kind) * torch.logspace(-2, 2, 5, device=DEVICE, dtype=kind)[:, None]
    close_in_fp8(kernels.round_rows(x), x)


@pytest.mark.parametrize("bias", [False, True])
def test_heads_are_normed_rotated_and_placed(kind, bias):
    """Tokens 2 to 4 of five: their queries among the others', their keys and values in their slots, and no others."""
    heads, kv_heads, width = 6, 2, 24
    rows, added = random(2, 3, (heads + 2 * kv_heads) * width, kind=kind), random(heads * width + 2 * 2 * 24, kind=kind)
    q_norm, k_norm = (RMSNorm(width, 1e-3) for _ in range(2))
    q_norm.weight.data, k_norm.weight.data = random(24, kind=kind), random(1, 24, kind=kind)[0] + 1
    positions = torch.tensor([[4, 5, 6], [9, 9, 9]], device=DEVICE)
    rope = rotary_table(positions, width, 100.0, kind)
    q, keys, values = (torch.full(shape, 7.0, device=DEVICE, dtype=kind) for shape in (
        (2, 5, heads, width), (2, 12, kv_heads, width), (2, 12, kv_heads, width)))  # fmt: skip
    kernels.place_heads(
        rows, added if bias else None, (q_norm.weight, k_norm.weight, 1e-3), tuple(table[:, :, 0] for table in rope),
        q, keys, values, 4, 2,
    )  # fmt: skip
    parts = (rows + added if bias else rows).unflatten(-1, (-1, width)).split([heads, kv_heads, kv_heads], dim=2)
    close(q[:, 2:], rotate(q_norm(parts[0]).float(), rope).to(kind))
    close(keys[:, 6:9], rotate(k_norm(parts[1]).float(), rope).to(kind))
    close(values[:, 6:9], parts[2])
    assert (q[:, :2] == 7).all() and (keys[:, :6] == 7).all() and (values[:, 9:] == 7).all()


@pytest.mark.parametrize("length", [1, 5, 64, 300])
def test_attention_to_a_growing_context(kind, length):
    """Seven query heads a key head, a head width that is no power of two, and padding in one sample."""
    start, slot = 9, 11
    q, keys, values = (random(*shape, kind=kind) for shape in ((2, 14, 24), (2, 340, 2, 24), (2, 340, 2, 24)))
    valid = torch.ones(2, 340, dtype=torch.bool, device=DEVICE)
    valid[1, 10 : 10 + length // 2] = False
    index = torch.tensor([length - (slot - start) - 1 if length > 2 else 0], device=DEVICE)
    read = slice(start, slot + int(index) + 1)
    expected = F.scaled_dot_product_attention(
        q[:, :, None], keys[:, read].transpose(1, 2), values[:, read].transpose(1, 2), valid[:, None, None, read],
        enable_gqa=True,
    )[:, :, 0]  # fmt: skip
    close(kernels.attend_growing(q, keys, values, valid, start, slot, index), expected)


@pytest.fixture(scope="module")
def bagel():
    bagel = load_bagel(FOLDER / "checkpoint", weights="fp32", device=str(DEVICE), attention="sdpa")
    bagel.model.language_model.model.kernels = None
    return bagel


@pytest.fixture(params=["fp32", "int8", "nf4"])
def any_bagel(request, bagel):
    """With packed weights too, made whole without kernels."""
    if request.param == "fp32":
        return bagel
    packed = load_bagel(FOLDER / "checkpoint", weights=request.param, device=str(DEVICE), attention="sdpa")
    packed.model.language_model.model.kernels = None
    return packed


@pytest.mark.parametrize("texts", [["the red cat"], ["one", "three small words"]])
def test_the_logits_of_a_step_are_those_of_the_layers(any_bagel, monkeypatch, texts):
    """One sample takes the kernels of single rows, several those of many; a shorter text is padded."""
    bagel = any_bagel
    model, codec = bagel.model, bagel.codec
    decoder = model.language_model.model
    context = model.new_context(len(texts), 40, 0)
    with torch.inference_mode():
        model.append_text(context, [codec.encode(text) for text in texts])
        mark, index = context.mark(), torch.zeros(1, dtype=torch.long, device=DEVICE)
        monkeypatch.setattr(decoder, "kernels", kernels)
        step = TokenStep(model, context, 3)
        for token in (codec.start, 5, 7):
            ids = torch.full((len(texts),), token, device=DEVICE)
            decoder.kernels = kernels
            found = step.logits(ids, index)
            decoder.kernels = None
            index += 1
            keys = context.keys[:, :, : context.length + 1].clone()
            expected = model.append_token(context, ids)
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * expected.abs().max().item())
            torch.testing.assert_close(keys, context.keys[:, :, : context.length])
        context.rewind(mark)
        with pytest.raises(ValueError, match="larger capacity"):
            TokenStep(model, context, 60)


def test_pictures_are_the_same_with_and_without_kernels(bagel, monkeypatch):
    """A batch whose prompts differ in length, both guidances, pictures and texts in the context."""
    ask = {"num_timesteps": 4, "seed": 3, "cfg_interval": (0.5, 1.0)}
    picture = open_picture(FOLDER / "tall.png").resize((32, 64))
    calls = (
        lambda: bagel.generate(["the red cat", "one"], height=32, width=64, **ask)[1].latent,
        lambda: bagel.edit(picture, "make it blue", **ask).latent,
    )
    expected = [call() for call in calls]
    monkeypatch.setattr(bagel.model.language_model.model, "kernels", kernels)
    for call, latent in zip(calls, expected, strict=True):
        torch.testing.assert_close(call(), latent, rtol=0, atol=2e-4 * latent.abs().max().item())


@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "temperature": 2.0, "top_p": 0.9, "seed": 3}])
def test_texts_are_the_same_with_and_without_kernels(bagel, monkeypatch, sampled):
    picture = open_picture(FOLDER / "tall.png")
    ask = {"question": ["What is it?", "Where?"], "max_new_tokens": 4, **sampled}
    expected = [answer.token_ids for answer in bagel.understand(picture, **ask)]
    monkeypatch.setattr(bagel.model.language_model.model, "kernels", kernels)
    assert [answer.token_ids for answer in bagel.understand(picture, **ask)] == expected


def test_a_text_ends_where_every_sample_has_ended(bagel, monkeypatch):
    """The first token that differs from the one before is made the end: what follows it is not written."""
    picture, ask = open_picture(FOLDER / "tall.png"), {"question": "What is it?", "max_new_tokens": 9}
    long = bagel.understand(picture, **ask).token_ids
    last = next(place for place, token in enumerate(long) if token != long[0])
    steps, take = [], decoding._Text.take

    def taking(text, logits):
        text.end = long[last]
        steps.append(take(text, logits))

    monkeypatch.setattr(decoding._Text, "take", taking)
    monkeypatch.setattr(bagel.model.language_model.model, "kernels", kernels)
    found = bagel.understand(picture, **ask).token_ids
    assert found[: last + 1] == long[: last + 1]
    assert len(steps) <= last + 1 < 9
    # A card has written on until the processor saw the end.
    assert set(found[last + 1 :]) <= {long[last]} and len(found) <= last + 1 + decoding.AHEAD
