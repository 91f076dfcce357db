"""Weights in fewer bits: what rounding may cost, what the libraries of the formats' names make, and their kernel."""

import pytest
import torch

from helpers.bagel.packed import PACKERS, FourBits, Int8, Room

CPU = torch.device("cpu")


@pytest.fixture
def room():
    return Room(CPU, torch.float32, None)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def weight(request):
    """Rows that differ in size by a factor of 1,000, one of them nothing but zeros."""
    made = torch.randn(96, 384, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 96)[:, None]
    made[7] = 0
    return made.to(request.param)


def test_int8_is_off_by_half_a_step_at_most(weight, room):
    step = weight.float().abs().amax(1, keepdim=True) / 127.5
    assert ((Int8.of(weight, room).whole() - weight.float()).abs() <= 0.5001 * step).all()


def test_int4_is_off_by_half_a_step_of_its_group(weight, room):
    """And by what rounding the scale and the shift to bfloat16 moves the outermost of 16 steps."""
    groups = weight.float().view(96, 3, 128)
    step = (groups.amax(2) - groups.amin(2)) / 15
    error = (FourBits.int4(weight, room).whole().view(96, 3, 128) - groups).abs()
    largest = groups.abs().amax(2)
    assert (error <= (0.501 * step + largest * 2.0**-6)[:, :, None] + 1e-6).all()


def test_nf4_takes_the_nearest_of_its_values(weight, room):
    packed = FourBits.nf4(weight, room)
    groups = weight.float().view(96, 6, 64)
    scale = groups.abs().amax(2, keepdim=True).clamp(min=1e-12).bfloat16().float()
    nearest = (groups[..., None] - packed.table * scale[..., None]).abs().amin(-1)
    error = (packed.whole().view(96, 6, 64) - groups).abs()
    torch.testing.assert_close(error, nearest, rtol=0, atol=1e-6 * float(scale.max()))


@pytest.mark.parametrize("kind", PACKERS)
def test_what_is_whole_already_stays(kind, room):
    """A matrix of numbers that the format has comes back unchanged, whatever its rows' length allows as groups."""
    for inputs in (2, 48, 192):
        packed = PACKERS[kind](torch.randn(40, inputs), room)
        once = packed.whole().clone()
        # Not to the last bit: the largest number of a row is not the scale itself.
        torch.testing.assert_close(PACKERS[kind](once, room).whole(), once, rtol=0.02, atol=1e-6)


def test_packed_weights_take_the_bits_that_they_say(room):
    weight = torch.randn(256, 1024)
    sizes = {kind: 8 * PACKERS[kind](weight, room).nbytes / weight.numel() for kind in PACKERS}
    assert sizes == {"int8": 8 + 32 / 1024, "int4": 4 + 32 / 128, "nf4": 4 + 16 / 64}


def test_rows_that_cannot_be_paired_are_refused(room):
    with pytest.raises(ValueError, match="Rows of 5 weights.*int8"):
        FourBits.int4(torch.randn(4, 5), room)


def test_one_room_serves_matrices_of_all_sizes(room):
    small, large = (torch.randn(count, 64) for count in (16, 400))
    one, other = Int8.of(small, room), Int8.of(large, room)
    assert room.buffer.numel() == large.numel()
    torch.testing.assert_close(one.whole(), small, rtol=0, atol=0.02)
    torch.testing.assert_close(other.whole(), large, rtol=0, atol=0.02)
    assert one.whole().data_ptr() == other.whole().data_ptr() == room.buffer.data_ptr()


@pytest.mark.parametrize("kind", ["int4", "nf4"])
@pytest.mark.parametrize("inputs", [34, 384])
def test_the_kernel_makes_what_the_processor_makes(kind, inputs, room):
    kernels = pytest.importorskip("helpers.bagel.kernels", reason="Triton is not installed", exc_type=ImportError)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    packed = PACKERS[kind](torch.randn(70, inputs, device=device), Room(device, torch.float32, None))
    expected = packed.whole().clone()
    packed.room.kernels = kernels
    packed.room.buffer.fill_(7)
    torch.testing.assert_close(packed.whole(), expected, rtol=1e-6, atol=1e-6)


def test_int8_and_int4_are_those_of_torchao(weight, room):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from torchao.quantization.quant_primitives import (
        MappingType,
        _choose_qparams_affine_tinygemm,
        _quantize_affine_tinygemm,
    )

    layer = torch.nn.Linear(384, 96, bias=False, dtype=weight.dtype)
    layer.weight.data = weight.clone()
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    ours = Int8.of(weight, room)
    known = weight.float().abs().amax(1) > 0
    torch.testing.assert_close(ours.scale[known], layer.weight.scale.view(-1).float()[known], rtol=2**-8, atol=0)
    # It rounds the scales of bfloat16 weights to that type: some codes fall to the other side.
    apart = (ours.codes.int() - layer.weight.qdata.int()).abs()
    assert apart.max() <= 1 and apart.float().mean() < 0.1
    groups = (1, 128)
    scale, shift = _choose_qparams_affine_tinygemm(
        weight.float(), MappingType.ASYMMETRIC, groups, torch.int32, 0, 15, 1e-6,
        scale_dtype=torch.bfloat16, zero_point_dtype=torch.bfloat16,
    )  # fmt: skip
    codes = _quantize_affine_tinygemm(weight.float(), groups, scale, shift, torch.int32, 0, 15)
    ours = FourBits.int4(weight, room)
    assert torch.equal(ours.scale[known], scale[known]) and torch.equal(ours.shift[known], shift[known])
    found = torch.stack([ours.codes & 15, ours.codes >> 4], dim=-1).view(96, 384)
    assert (found[known] != codes[known]).float().mean() < 0.02


def test_nf4_is_that_of_bitsandbytes(weight, room):
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    codes, state = functional.quantize_4bit(weight.float(), blocksize=64, quant_type="nf4", compress_statistics=False)
    theirs = functional.dequantize_4bit(codes, state)
    # Their scales have 32 bits, so that a few weights fall to the other side.
    apart = (FourBits.nf4(weight, room).whole() - theirs).abs() > 2**-8 * theirs.abs() + 1e-6
    assert apart.float().mean() < 0.01
