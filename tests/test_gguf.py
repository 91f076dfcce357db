"""GGUF files: every type means the numbers that the package gguf says, rounding costs what the type must cost, a folder
comes back from its file, and a file that is not what it should be is refused with a reason.
"""

import shutil
import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.bench.loss import Drawn, losses
from helpers.formats import gguf as files
from helpers.formats import gguf_blocks
from helpers.formats.gguf import open_gguf, write_gguf
from helpers.formats.gguf_blocks import FORMATS, Blocks, block_format, dequantise_blocks, packed_shape
from helpers.formats.gguf_rounding import TYPES, quantise
from helpers.hub import official_shapes
from helpers.pipeline import TINY, load_bagel
from helpers.tiny.questions import test_questions as make_questions
from helpers.tiny.world import draw, to_picture

CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
QUANTISED = [kind for kind in TYPES if kind not in ("F32", "F16", "BF16")]
# The sizes of a scale that float16 can have: zeros, the smallest, a usual one, the largest, infinity, no number.
SCALES = [0x0000, 0x8000, 0x0001, 0x8001, 0x0400, 0x2E66, 0xAE66, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00]
LAYER = "language_model.model.layers.0."


def random_blocks(kind: str, count: int = 400) -> np.ndarray:
    """[count, bytes]: every byte at random, then all bits 0, all 1, and extreme numbers wherever a scale may stand."""
    generator, size = np.random.default_rng(sum(kind.encode())), FORMATS[kind].bytes
    blocks = generator.integers(0, 256, (count, size), dtype=np.uint8)
    extreme = generator.integers(0, 256, (len(SCALES) ** 2, size), dtype=np.uint8)
    for row, (one, other) in enumerate((one, other) for one in SCALES for other in SCALES):
        # The scales lie at the first four bytes or at the last four.
        for start, scale in ((0, one), (2, other), (size - 4, one), (size - 2, other)):
            if 0 <= start <= size - 2:
                extreme[row, start : start + 2] = np.frombuffer(np.uint16(scale).tobytes(), np.uint8)
    return np.concatenate([blocks, extreme, np.zeros((1, size), np.uint8), np.full((1, size), 255, np.uint8)])


def reference(kind: str, blocks: np.ndarray) -> Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]).copy())


def packed(kind: str, blocks: np.ndarray) -> Blocks:
    return Blocks(kind, (len(blocks), FORMATS[kind].values), torch.from_numpy(blocks))


def assert_same(found: Tensor, expected: Tensor):
    """Bit for bit, the sign of a zero included; of what is no number, only that it is none."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    bits = BITS[found.dtype]
    assert torch.equal(found.nan_to_num().view(bits), expected.nan_to_num().view(bits))


# Blocks to numbers


@pytest.mark.parametrize("kind", FORMATS)
def test_blocks_have_the_size_that_the_package_says(kind):
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (FORMATS[kind].values, FORMATS[kind].bytes)


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("kind", FORMATS)
def test_numbers_are_those_of_the_package(kind, dtype):
    """In float32 bit for bit; other types are its numbers rounded once."""
    blocks = random_blocks(kind)
    assert_same(packed(kind, blocks).dequantise(dtype), reference(kind, blocks).to(dtype))


@CARD
@pytest.mark.parametrize("kind", FORMATS)
def test_numbers_on_a_card_are_those_of_the_package(kind):
    blocks = random_blocks(kind)
    found = packed(kind, blocks).to("cuda").dequantise()
    assert found.device.type == "cuda"
    assert_same(found.cpu(), reference(kind, blocks))


@pytest.mark.parametrize("kind", FORMATS)
def test_many_pieces_make_the_same(kind, monkeypatch):
    blocks = random_blocks(kind)
    whole = packed(kind, blocks).dequantise()
    monkeypatch.setattr(gguf_blocks, "PIECE", {"cpu": 3 * 256})
    assert_same(packed(kind, blocks).dequantise(), whole)


def test_one_graph_holds_all_of_a_type():
    """As `torch.compile` needs it to make one kernel; the graph is run as it is here."""
    compiled = torch.compile(dequantise_blocks, backend="eager", fullgraph=True)
    for kind, form in FORMATS.items():
        torch._dynamo.reset()
        blocks = random_blocks(kind, 4)
        found = torch.empty(len(blocks), form.values)
        compiled(torch.from_numpy(blocks), form, found)
        assert_same(found, reference(kind, blocks))


def test_numbers_go_into_a_part_of_a_larger_tensor():
    """As the weights of joined layers do; what lies around them stays."""
    joined = torch.zeros(10, 64, dtype=torch.bfloat16)
    made = quantise(torch.ones(4, 64), "Q8_0")
    made.dequantise_into(joined[3:7])
    assert torch.equal(joined[3:7], made.dequantise(torch.bfloat16))
    assert joined[:3].count_nonzero() == joined[7:].count_nonzero() == 0


def test_packed_tensors_are_joined_by_their_rows():
    one, other = torch.randn(3, 64), torch.randn(5, 64)
    parts = [quantise(each, "Q4_0").to("cpu") for each in (one, other)]
    joined = Blocks("Q4_0", (8, 64), torch.cat([part.blocks for part in parts]))
    assert torch.equal(joined.dequantise(), torch.cat([part.dequantise() for part in parts]))


def test_a_target_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \[2, 64\] does not fit into one of \[64, 2\]"):
        quantise(torch.ones(2, 64), "Q8_0").dequantise_into(torch.empty(64, 2))


def test_what_a_type_takes():
    assert packed_shape((3, 5, 512), "Q4_K") == (15, 288)
    assert packed_shape((7,), "F32") == (1, 28)
    with pytest.raises(ValueError, match=r"shape \[4, 192\] cannot be Q6_K: its rows must be multiples of 256"):
        packed_shape((4, 192), "Q6_K")
    with pytest.raises(ValueError, match=r"type IQ2_XXS cannot be read here: use a file of F32, F16, BF16, Q8_0, Q6_K"):
        block_format("IQ2_XXS")


# Numbers to blocks


@pytest.fixture
def numbers():
    """Rows whose sizes differ by a factor of 10,000; some of one sign, one of zeros, one with a single large number."""
    made = torch.randn(64, 768, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 64)[:, None]
    made[0:4], made[4:8] = made[0:4].abs() + 0.01, -made[4:8].abs() - 0.01
    made[8], made[9], made[9, 100] = 0, made[9] * 1e-3, 50.0
    return made


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_rounding_is_that_of_the_package(kind, numbers):
    expected = gguf.quants.quantize(numbers.numpy(), gguf.GGMLQuantizationType[kind]).view(np.uint8)
    found = quantise(numbers, kind)
    assert found.shape == (64, 768) and torch.equal(found.blocks, torch.from_numpy(expected))


@pytest.mark.parametrize("kind", ["Q6_K", "Q8_0"])
def test_rounding_in_many_pieces(kind, numbers, monkeypatch):
    whole = quantise(numbers, kind)
    monkeypatch.setattr("helpers.formats.gguf_rounding.PIECE", {"cpu": 1000})
    assert torch.equal(quantise(numbers, kind).blocks, whole.blocks)


def lost(half: Tensor) -> Tensor:
    """How far off a number can be that was rounded to this one in float16."""
    return half * 2.0**-11 + 2.0**-25


def test_q4_k_is_as_close_as_its_layout_allows(numbers):
    """In a group of 32, the root of the mean squared error against half a step of its own range, which the best of all
    steps cannot exceed, plus what the scale and the minimum lose when they are rounded to multiples of two float16.
    """
    made = quantise(numbers, "Q4_K")
    blocks = made.blocks.view(-1, 144)
    whole, least = (blocks[:, at : at + 2].view(torch.float16).float()[..., None] for at in (0, 2))  # [blocks, 1, 1]
    groups, found = numbers.view(-1, 8, 32), made.dequantise().view(-1, 8, 32)
    step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True).clamp(max=0)) / 15
    limit = step / 2 + (15 * whole + least) / 2 + 63 * (15 * lost(whole) + lost(least))
    error = (found - groups).square().mean(-1, keepdim=True).sqrt()
    assert (error <= limit * 1.001).all()


def test_q6_k_is_as_close_as_its_layout_allows(numbers):
    """The same of a group of 16; a number opposite to the largest may lie a whole step beyond the last integer."""
    made = quantise(numbers, "Q6_K")
    whole = made.blocks.view(-1, 210)[:, 208:].view(torch.float16).float().abs()[..., None]
    groups, found = numbers.view(-1, 16, 16), made.dequantise().view(-1, 16, 16)
    step = groups.abs().amax(-1, keepdim=True) / 32
    limit = step + 32 * (whole / 2 + 128 * lost(whole))
    error = (found - groups).square().mean(-1, keepdim=True).sqrt()
    assert (error <= limit * 1.001).all()


@pytest.mark.parametrize(("kind", "size", "steps"), [("Q4_K", 32, 15), ("Q6_K", 16, 63)])
def test_even_numbers_lose_less_than_with_equal_steps(kind, size, steps):
    """Spread evenly over [-1, 1], both ends included, numbers lie off the nearest of equal steps by step / sqrt(12);
    steps chosen for so few numbers do a little better.
    """
    even = torch.rand(3200, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    even[:, 0], even[:, -1] = -1, 1
    even = even.view(-1, 256)
    error = (quantise(even, kind).dequantise() - even).square().mean().sqrt().item()
    assert 0.8 < error / (2 / steps / 12**0.5) < 1


@pytest.mark.parametrize("sign", [1, -1])
def test_numbers_that_q6_k_can_hold_lose_nothing(sign):
    """Integers from -32 to 31, a factor of up to 128 for each group, and one power of two."""
    generator = torch.Generator().manual_seed(4)
    integers, factors = (torch.randint(low, 32, (20, 16, 16), generator=generator) for low in (-32, 1))
    factors = factors[..., :1] * 3
    integers[..., 5], factors[:, 7] = -32, 128
    exact = (integers * factors * sign).view(20, 256) * 2.0**-9
    assert torch.equal(quantise(exact, "Q6_K").dequantise(), exact)


def test_numbers_that_q4_k_can_hold_lose_nothing():
    """Integers from 0 to 15, factors and minima of up to 63 for each group, and a power of two for each of both."""
    generator = torch.Generator().manual_seed(5)
    integers = torch.randint(0, 16, (20, 8, 32), generator=generator)
    integers[..., 5], integers[..., 8] = 0, 15
    factors, minima = (torch.randint(1, 64, (20, 8, 1), generator=generator) for _ in range(2))
    factors[:, 3], minima[:, 6] = 63, 63
    exact = (integers * factors * 2.0**-9 - minima * 2.0**-7).view(20, 256)
    assert torch.equal(quantise(exact, "Q4_K").dequantise(), exact)


def test_more_bits_lose_less():
    """The K types also lose less than older types of as many bits or more."""
    drawn = torch.randn(100, 512, generator=torch.Generator().manual_seed(2))
    error = {kind: (quantise(drawn, kind).dequantise() - drawn).norm() / drawn.norm() for kind in TYPES}
    assert error["F32"] == 0 < error["F16"] < error["BF16"] < error["Q8_0"] < error["Q6_K"] < error["Q5_1"]
    assert error["Q5_1"] < error["Q5_0"] < error["Q4_K"] < error["Q4_1"] < error["Q4_0"] < 0.1


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-7, 60000.0])
def test_numbers_at_the_ends_of_float16(kind, size):
    """What is too small for a scale becomes 0, never something else."""
    made = torch.linspace(-1, 1, 512).reshape(2, 256) * size
    found = quantise(made, kind).dequantise()
    assert (found - made).abs().max() <= size * 0.05 if size > 1 else found.count_nonzero() == 0


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in ("F32", "BF16")])
@pytest.mark.parametrize("wrong", [1e5, torch.inf, torch.nan])
def test_numbers_that_a_type_cannot_hold_are_refused(kind, wrong):
    made = torch.zeros(1, 256)
    made[0, 9] = wrong
    with pytest.raises(ValueError, match=rf"size (100000|inf|nan) cannot be {kind}, whose scales end at 65504: keep"):
        quantise(made, kind)


def test_types_that_are_only_read_are_refused():
    with pytest.raises(
        ValueError, match="cannot be rounded to the GGUF type Q3_K here: choose one of F32, F16, BF16, Q"
    ):
        quantise(torch.zeros(1, 256), "Q3_K")


# Files


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    """The tiny model as Q8_0, and what was told about it."""
    return write_gguf(TINY, tmp_path_factory.mktemp("gguf") / "tiny.gguf", "Q8_0")


@pytest.fixture
def folder(tmp_path):
    """A model of five tensors, with names and row lengths as a BAGEL has them."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        files.MARK: (6, 512),
        f"{LAYER}mlp_moe_gen.up_proj.weight": (4, 192),
        f"{LAYER}mlp.down_proj.weight": (4, 100),
        f"{LAYER}self_attn.q_proj.bias": (6,),
        "language_model.lm_head.weight": (5, 512),
    }
    made = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    save_file(made, tmp_path / "ema.safetensors")
    return tmp_path


def strange(file, tensors, architecture="pig", kind="F32"):
    """A GGUF by the package alone, with one type."""
    writer = gguf.GGUFWriter(file, architecture)
    for name, values in tensors.items():
        writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("kind", TYPES)
def test_a_folder_comes_back_from_its_file(kind, tmp_path):
    """All its tensors, in torch's order; only the matrices of the layers are rounded."""
    told = write_gguf(TINY, tmp_path / "tiny.gguf", kind)
    opened, original = open_gguf(told.file), load_file(TINY / "ema.safetensors")
    assert opened.shapes == {name: tuple(tensor.shape) for name, tensor in original.items()}
    assert opened.types == told.types
    for name, tensor in original.items():
        matrix = name.startswith("language_model.model.layers.") and tensor.ndim == 2
        expected = quantise(tensor, told.types[name]).dequantise() if matrix else tensor.float()
        assert torch.equal(opened.tensors[name].dequantise(), expected), name


def test_the_file_is_what_the_package_reads(tiny_gguf):
    opened, reader = open_gguf(tiny_gguf.file), gguf.GGUFReader(tiny_gguf.file)
    assert opened.metadata == {"general.architecture": "bagel", "general.quantization_version": 2}
    assert len(reader.tensors) == len(opened.tensors) > 300
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert torch.equal(opened.tensors[tensor.name].dequantise(), torch.from_numpy(values)), tensor.name


def test_tensors_are_views_of_the_mapped_file(tiny_gguf):
    opened, whole = open_gguf(tiny_gguf.file), tiny_gguf.file.read_bytes()
    storages = {packed.blocks.untyped_storage().data_ptr() for packed in opened.tensors.values()}
    assert len(storages) == 1
    for packed in opened.tensors.values():
        blocks = packed.blocks
        assert blocks.untyped_storage().nbytes() == len(whole)
        start = blocks.storage_offset()
        assert blocks.numpy().tobytes() == whole[start : start + blocks.numel()]


def test_rows_that_do_not_fit_get_another_type_and_that_is_told(folder):
    told = write_gguf(folder, folder / "made.gguf", "Q4_K")
    up, down = f"{LAYER}mlp_moe_gen.up_proj.weight", f"{LAYER}mlp.down_proj.weight"
    kinds = {files.MARK: "Q4_K", up: "Q8_0", down: "BF16", f"{LAYER}self_attn.q_proj.bias": "F32"}
    assert open_gguf(told.file).types == {**kinds, "language_model.lm_head.weight": "BF16"}
    assert told.fallbacks == {up: 192, down: 100}
    assert told.bytes == told.file.stat().st_size
    assert "2 matrices with rows of 100, 192 numbers cannot be Q4_K (blocks of 256); they are: " in str(told)
    assert "1 Q8_0" in str(told).partition("they are")[2] and "1 BF16" in str(told).partition("they are")[2]
    assert write_gguf(folder, folder / "made.gguf", "F16").fallbacks == {}


def test_the_released_model_can_be_written_in_every_type():
    """Its layers' rows are multiples of 256, and no name is too long for the format."""
    for name, shape in official_shapes().items():
        if files.LAYER_MATRIX.fullmatch(name) and len(shape) == 2:
            assert shape[-1] % 256 == 0 and files._type(name, shape, "BF16", "Q4_K") == "Q4_K"


def test_a_file_of_another_converter(tmp_path):
    """Another architecture's name, a name of 70 characters, an order of tensors of its own, a type we only read."""
    long = "language_model.model.layers.27.post_attention_layernorm_moe_gen.weight"
    blocks = random_blocks("IQ4_NL", 6).reshape(-1, 18 * 2)[:4]
    strange(tmp_path / "other.gguf", {long: blocks[:1], files.MARK: blocks}, kind="IQ4_NL")
    opened = open_gguf(tmp_path / "other.gguf")
    assert opened.shapes == {long: (1, 64), files.MARK: (4, 64)}
    assert_same(opened.tensors[files.MARK].dequantise(), reference("IQ4_NL", blocks))


# What is refused


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.gguf is missing: give the path of a GGUF"):
        open_gguf(tmp_path / "none.gguf")
    with pytest.raises(FileNotFoundError, match=r"ema.safetensors is missing: a GGUF is made from a BAGEL folder"):
        write_gguf(tmp_path, tmp_path / "x.gguf")


@pytest.mark.parametrize("content", [b"", b"GGU", b"\x10\x00\x00\x00\x00\x00\x00\x00{}", b"<!DOCTYPE html>"])
def test_no_gguf(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.gguf is no GGUF: it starts with b'.*' instead of b'GGUF'. Give the path"):
        open_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("version", "order", "told"),
    [
        (1, "little", "version 1;"),
        (4, "little", "version 4;"),
        (3, "big", r"version 50331648 \(in big-endian order\);"),
    ],
)
def test_another_version(tiny_gguf, tmp_path, version, order, told):
    content = tiny_gguf.file.read_bytes()
    (tmp_path / "x.gguf").write_bytes(content[:4] + version.to_bytes(4, order) + content[8:])
    with pytest.raises(ValueError, match=f"is a GGUF of {told} versions 2 and 3 in little-endian order can be read"):
        open_gguf(tmp_path / "x.gguf")


def test_a_file_that_ends_early(folder):
    """Wherever it ends: in the metadata, in the list of tensors, in the last one's blocks."""
    told = write_gguf(folder, folder / "whole.gguf", "Q4_K")
    whole, cut = told.file.read_bytes(), folder / "cut.gguf"
    last = max(open_gguf(told.file).tensors.values(), key=lambda packed: packed.blocks.storage_offset()).blocks
    end = last.storage_offset() + last.numel()
    for length in [*range(4, 700), *range(700, end, 97), end - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=r"cut.gguf (is a GGUF of version 0|.*truncated or damaged; fetch it again)"
        ):
            open_gguf(cut)
    cut.write_bytes(whole[:end])
    assert open_gguf(cut).types == told.types


def test_another_model(tmp_path):
    tensors = {name: np.zeros((2, 32), np.float32) for name in ("token_embd.weight", "blk.0.attn_q.weight")}
    strange(tmp_path / "bagel-7b-v0.5.gguf", tensors, "llama")
    message = (
        r"bagel-7b-v0.5.gguf holds another model: its architecture is 'llama' and its 2 tensors are named "
        r"token_embd.weight, blk.0.attn_q.weight ...; wanted is BAGEL-7B-MoT with the tensors of ema.safetensors"
    )
    with pytest.raises(ValueError, match=message):
        open_gguf(tmp_path / "bagel-7b-v0.5.gguf")


def test_types_that_cannot_be_read(tmp_path):
    strange(tmp_path / "x.gguf", {files.MARK: np.zeros((2, 66), np.uint8)}, kind="IQ2_XXS")
    with pytest.raises(ValueError, match=r"x.gguf holds tensors .* read here: 1 IQ2_XXS. Use a file .* F32, F16, BF16"):
        open_gguf(tmp_path / "x.gguf")


def test_a_type_that_nobody_knows(tmp_path):
    """As the files of llama.cpp's variants hold."""
    content = strange(tmp_path / "x.gguf", {files.MARK: np.zeros((2, 32), np.float32)}).read_bytes()
    place = content.index(files.MARK.encode()) + len(files.MARK) + 4 + 2 * 8  # after the count of sizes and two sizes
    (tmp_path / "x.gguf").write_bytes(content[:place] + (208).to_bytes(4, "little") + content[place + 4 :])
    with pytest.raises(ValueError, match=r"x.gguf holds tensors of types .* here: the type number 208. Use a file"):
        open_gguf(tmp_path / "x.gguf")


def test_without_the_package(tiny_gguf, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    for what in (
        lambda: open_gguf(tiny_gguf.file),
        lambda: write_gguf(TINY, tmp_path / "x.gguf"),
        lambda: quantise(torch.zeros(1, 32), "Q8_0"),
    ):
        with pytest.raises(ImportError, match=r"GGUF files need the gguf package: pip install '.\[gguf\]'"):
            what()
    # What lies on a device already needs none.
    assert quantise(torch.ones(1, 256), "Q6_K").dequantise().max() == pytest.approx(1, abs=0.02)


def test_a_folder_that_cannot_become_one(folder):
    with pytest.raises(
        ValueError, match="cannot be rounded to the GGUF type q8 here: choose one of F32, F16, BF16, Q8_0"
    ):
        write_gguf(folder, folder / "x.gguf", "q8")
    save_file({files.MARK: torch.zeros(2, 32, dtype=torch.float64)}, folder / "ema.safetensors")
    with pytest.raises(ValueError, match=r"q_proj.weight as F64, which must be one of F32, BF16, F16"):
        write_gguf(folder, folder / "x.gguf")
    (folder / "ema.safetensors").write_bytes(b"half of it")
    with pytest.raises(ValueError, match=r"ema.safetensors .*truncated or damaged"):
        write_gguf(folder, folder / "x.gguf")
    assert [file.name for file in folder.iterdir()] == ["ema.safetensors"]


def test_a_full_disk_leaves_the_old_file(folder, monkeypatch):
    """Known before, or found out in the middle."""
    before = write_gguf(folder, folder / "x.gguf").file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 10**9 - 100, 100))
        with pytest.raises(OSError, match=r"x.gguf needs 0.0 GB, 0.0 GB are free on its disk: make room"):
            write_gguf(folder, folder / "x.gguf", "F32")
    calls = []

    def full_at_the_third(*what):
        calls.append(what)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return quantise(*what)

    monkeypatch.setattr(files, "quantise", full_at_the_third)
    with pytest.raises(OSError, match="No space left"):
        write_gguf(folder, folder / "x.gguf", "F32")
    assert (folder / "x.gguf").read_bytes() == before
    assert sorted(file.name for file in folder.iterdir()) == ["ema.safetensors", "x.gguf"]


# The model


def outputs(bagel, kind):
    """A picture with its first velocity, and answers to questions about scenes."""
    heard, settings = [], {"seed": 7, "num_timesteps": 2, "height": 64, "width": 64}
    made = bagel.generate("a red circle on a white background", **settings, on_step=lambda *one: heard.append(one[2]))
    questions = make_questions(12, seed=0)
    scenes = [[to_picture(picture) for picture in draw(one.scenes)] for one in questions]
    answers = bagel.understand(scenes, [one.question for one in questions], max_new_tokens=20)
    return Drawn.of("picture", kind, made, heard[0]), [answer.text for answer in answers]


def rounded(tensor: Tensor, kind: str) -> Blocks:
    return replace(quantise(tensor.reshape(-1, 256), kind), shape=tuple(tensor.shape))


def test_rounded_layers_draw_and_answer_nearly_the_same(tiny_gguf):
    """The tiny model's weights replaced by those of its file, which keeps some of the layers' matrices as they are,
    then by what each type makes of all of them. Its rows are too short for blocks of 256; those lie over several here.
    """
    bagel = load_bagel("tiny", weights="fp32", device="cpu", attention="sdpa")
    weights = bagel.model.state_dict()
    own = {name: weights[name].clone() for name in weights if files._is_layer_matrix(name, weights[name].shape)}
    exact, answers = outputs(bagel, "fp32")
    errors, same = {}, {}
    for kind in ("file", "F32", "Q8_0", "Q6_K", "Q4_K"):
        if kind == "file":
            made = open_gguf(tiny_gguf.file).tensors
        else:
            made = {name: rounded(tensor, kind) for name, tensor in own.items()}
        for name, packed in made.items():
            packed.dequantise_into(weights[name])
        drawn, told = outputs(bagel, kind)
        errors[kind] = losses([exact, drawn])[0].first_velocity
        same[kind] = sum(one == other for one, other in zip(answers, told, strict=True))
    assert errors["F32"] == 0 < errors["file"] < errors["Q8_0"] < errors["Q6_K"] < errors["Q4_K"] < 0.4
    assert same["F32"] == same["file"] == same["Q8_0"] == 12
