"""DFloat11: what is compressed comes back bit for bit, in the bytes that the dfloat11 package makes."""

import importlib.util
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.formats import df11_folder
from helpers.formats.df11 import Block, compress, decompress
from helpers.formats.df11_codes import END, decoding_table, exponent_codes, lookup_tables
from helpers.formats.df11_folder import bagel_patterns, read_df11, write_df11
from helpers.pipeline import TINY

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PARTS = ("luts", "encoded_exponent", "sign_mantissa", "output_positions", "gaps", "split_positions")


def bits(*patterns):
    """bfloat16 numbers of these 16 bits."""
    return torch.tensor(patterns, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, std=0.02):
    return (torch.randn(shape, generator=generator(sum(shape))) * std).to(torch.bfloat16)


def of_exponents(counts, seed=0):
    """Numbers with these exponents, so many of each, in random order, with random signs and mantissas."""
    exponents = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    exponents = exponents[torch.randperm(len(exponents), generator=generator(seed))]
    rest = torch.randint(0, 256, exponents.shape, generator=generator(seed + 1))
    return ((rest & 128) << 8 | exponents << 7 | rest & 127).to(torch.int16).view(torch.bfloat16)


def fibonacci(count):
    numbers = [1, 1]
    while len(numbers) < count:
        numbers.append(numbers[-1] + numbers[-2])
    return numbers


EVERY = bits(*range(65536))[torch.randperm(65536, generator=generator())]
CASES = {
    "every pattern": [EVERY],
    "infinities, NaN, subnormals and zeros": [bits(0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x0001, 0x807F, 0, 0x8000)],
    "normal": [normal(301, 101)],
    "a few NaN among many": [torch.cat([normal(9000), torch.full((3,), math.nan).bfloat16(), normal(5000)])],
    "one exponent": [of_exponents([0] * 130 + [5000])],
    "only NaN": [of_exponents([0] * 255 + [70])],
    "one number": [bits(0x3F80)],
    "no number": [torch.empty(0, 7, dtype=torch.bfloat16)],
    "rare among frequent": [of_exponents([40_000] + [1] * 239)],
    "long codes": [of_exponents([0] * 90 + fibonacci(19))],
    "several": [normal(5, 7), normal(2, 3, 4), torch.empty(0, 2, dtype=torch.bfloat16), normal(11)],
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def tensors(request):
    return CASES[request.param]


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype == torch.bfloat16 and found.shape == expected.shape
    assert torch.equal(found.contiguous().view(torch.int16).cpu(), expected.contiguous().view(torch.int16))


def test_everything_comes_back_bit_for_bit(tensors):
    block = compress(tensors)
    for found, expected in zip(decompress(block, [t.shape for t in tensors]), tensors, strict=True):
        assert_same_bits(found, expected)
    for found, expected in zip(decompress(block), tensors, strict=True):
        assert_same_bits(found, expected.flatten())


@pytest.mark.parametrize("count", [*range(1, 400, 7), *range(2**17 - 1, 2**17 + 4), 300_001])
def test_every_length_comes_back(count):
    """The last codes may end anywhere in a byte and in a piece; many are worked on in parts of 2**17."""
    numbers = normal(count)
    assert_same_bits(decompress(compress([numbers]))[0], numbers)


def card_threads(block):
    """What the package's kernel does, number by number: every thread decodes the codes that start in its 8 bytes.

    It goes on from table to table while it finds 240 or more, three times at most.
    """
    luts, stream = block.luts.tolist(), "".join(f"{byte:08b}" for byte in block.encoded_exponent.tolist()) + "0" * 128
    gaps = "".join(f"{byte:08b}" for byte in block.gaps.tolist())
    positions, count = block.positions().tolist(), block.weights
    exponents = [None] * count
    for piece in range(math.ceil(block.encoded_exponent.numel() / 8)):
        if piece % 512 == 0:
            number = positions[piece // 512]
        at = 64 * piece + int(gaps[5 * piece : 5 * piece + 5], 2)
        while at < 64 * piece + 64 and number < count:
            table = 0
            for level in range(4):
                found = luts[table][int(stream[at + 8 * level : at + 8 * level + 8], 2)]
                if found < 240:
                    break
                table = 256 - found
            exponents[number] = found
            at, number = at + luts[-1][found], number + 1
    return exponents


def test_the_packages_threads_read_it(tensors):
    block = compress(tensors)
    patterns = torch.cat([tensor.flatten() for tensor in tensors]).view(torch.int16).to(torch.int32)
    assert card_threads(block) == ((patterns >> 7) & 255).tolist()
    assert torch.equal(block.sign_mantissa.to(torch.int32), (patterns >> 8 & 128) | (patterns & 127))
    assert block.sizes == [tensor.numel() for tensor in tensors]


@pytest.fixture(scope="module")
def package():
    """The part of the dfloat11 package that encodes, which needs no card; importing all of it would need one."""
    found = importlib.util.find_spec("dfloat11")
    if found is None or importlib.util.find_spec("dahuffman") is None:
        pytest.skip("dfloat11 0.5.0 and dahuffman 0.4.2 are not installed (pip install --no-deps both)")
    file = Path(found.submodule_search_locations[0]) / "dfloat11_utils.py"
    spec = importlib.util.spec_from_file_location("dfloat11_utils", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def packages_tables(package, counts):
    """Its tables for exponents that occur so often {exponent: count}; None where it fails itself."""
    try:
        return package.get_luts(package.get_32bit_codec(counts)[2])
    except UnboundLocalError:  # no code begins with a byte of zeros
        return None


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize(
    "tensors",
    [
        *([normal(count)] for count in (2000, 2001, 2007, 32768 * 3)),
        CASES["several"],
        [of_exponents([0] * 60 + [700, 1, 1, 300, 300, 12, 0, 5000, 2, 2, 2])],
        *([of_exponents([0] * 90 + fibonacci(26), seed)] for seed in range(3)),
        [of_exponents([100] * 200)],
    ],
)
def test_the_bytes_are_the_packages(package, tensors):
    assert_the_packages_bytes(package, tensors)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_the_bytes_are_the_packages_whatever_comes_last(package):
    """Long codes last: a piece may have one start only, that of a pair's second code or of the end mark."""
    numbers = torch.cat([of_exponents([0] * (100 - n) + [count]) for n, count in enumerate(reversed(fibonacci(25)))])
    for count in range(200):
        assert_the_packages_bytes(package, [numbers[-4000 - count :].roll(count)])


def assert_the_packages_bytes(package, tensors):
    flat = [tensor.flatten() for tensor in tensors]
    codec, counts = package.get_codec(torch.cat(flat))
    encoded, rest, positions, gaps, splits = package.encode_weights(flat, codec, 8, 512)
    tables = packages_tables(package, counts)
    block = compress(tensors)
    for name, part in zip(PARTS, (tables, encoded, rest, positions.view(torch.uint8), gaps, splits), strict=True):
        assert getattr(block, name).dtype == part.dtype and torch.equal(getattr(block, name), part), name


def test_the_tables_are_the_packages(package):
    """Of random counts, and of such as would need codes of more than 32 bits."""
    random, compared = np.random.default_rng(0), 0
    histograms = [fibonacci(count) for count in (30, 33, 36, 40, 45)]
    histograms += [[7 * number for number in fibonacci(count)] for count in (31, 32, 33, 34)]
    for _ in range(150):
        histograms += [(random.pareto(random.uniform(0.2, 2), random.integers(2, 60)) * 50 + 1).astype(int).tolist()]
    for histogram in histograms:
        counts = {80 + place: number for place, number in enumerate(histogram)}
        tables = packages_tables(package, counts)
        if tables is not None and len(tables) <= 18:
            all_counts = np.array([counts.get(exponent, 0) for exponent in range(256)])
            assert torch.equal(torch.from_numpy(lookup_tables(exponent_codes(all_counts))), tables), histogram
            compared += 1
    assert compared > 100


@pytest.mark.parametrize(
    "counts",
    [
        [1] * 256,
        fibonacci(60) + [0] * 196,
        [2**40] + [1] * 255,
        [2**40] + [1] * 239,
        [5] * 200 + [0] * 55 + [3],
        [1] * 239 + [2**30, *[2**20] * 16],
        [0] * 240 + fibonacci(16),
        [3**n for n in range(20)] * 12 + [7] * 16,
    ],
)
def test_any_codes_can_be_read_through_the_tables(counts):
    codes = exponent_codes(np.array(counts))
    assert codes.keys() == {END} | {exponent for exponent, count in enumerate(counts) if count}
    words = sorted(f"{code:0{length}b}" for length, code in codes.values())
    assert not any(second.startswith(first) for first, second in zip(words, words[1:], strict=False))
    assert max(length for length, _ in codes.values()) <= 32
    # A place's value from 240 on is another table's number, but for the fourth of a chain.
    assert all(codes[exponent][0] > 24 for exponent in codes if exponent >= 240)
    tables = lookup_tables(codes)
    assert len(tables) <= 18
    assert ends(tables, 0, 1) <= codes.keys()


def ends(tables, number, level):
    """All symbols that reading may end with, whatever bits come."""
    found = set(tables[number].tolist())
    jumps = {value for value in found if value >= 240 and level < 4}
    return (found - jumps).union(*(ends(tables, 256 - value, level + 1) for value in jumps))


def test_codes_are_as_short_as_huffmans():
    numbers = normal(200_001)
    block = compress([numbers])
    _, counts = (numbers.view(torch.int16).to(torch.int32) >> 7 & 255).unique(return_counts=True)
    share = counts.double() / counts.sum()
    entropy = -(share * share.log2()).sum().item()
    assert entropy <= 8 * block.encoded_exponent.numel() / len(numbers) <= entropy + 0.1
    assert 0.66 < block.nbytes / numbers.nbytes < 0.69


@pytest.mark.parametrize("tensors", [[], [torch.zeros(3)], [normal(3), torch.zeros(3, dtype=torch.float16)]])
def test_only_bfloat16_is_compressed(tensors):
    with pytest.raises(ValueError, match=r"compresses torch.bfloat16, not (nothing|.*torch.float(32|16)).*: convert"):
        compress(tensors)


def test_shapes_that_do_not_fit():
    block = compress([normal(4, 6), normal(5)])
    for shapes in ([(4, 6)], [(4, 6), (6,)], [(5,), (4, 6)]):
        with pytest.raises(ValueError, match=r"do not fit a DFloat11 block of 24, 5 weights: use the configuration"):
            decompress(block, shapes)


def broken(block):
    """The block with one part or another damaged -> what the error says."""
    lengths = block.luts.clone()
    lengths[-1] = 0
    jump = block.luts.clone()
    jump[0] = 241
    return [
        (replace(block, gaps=block.gaps[:-1]), "gaps has .* bytes instead of"),
        (replace(block, sign_mantissa=block.sign_mantissa[:-1]), "output_positions ends at weight"),
        (replace(block, output_positions=block.output_positions[:-4]), "output_positions ends at weight"),
        (replace(block, output_positions=block.output_positions[:4]), "output_positions has 4 bytes for"),
        (replace(block, split_positions=torch.tensor([block.weights + 5])), "split_positions does not rise"),
        (replace(block, luts=block.luts.to(torch.int32)), "luts is of type torch.int32 instead of torch.uint8"),
        (replace(block, luts=block.luts[0]), "luts is no list of tables"),
        (replace(block, luts=lengths), "luts tells of no code"),
        (replace(block, luts=lengths + 40), "luts tells of a code of 40 bits"),
        (replace(block, luts=jump[[0, -1]]), "a code goes on in table 15 of 1"),
    ]


def test_a_damaged_block_is_refused():
    block = compress([normal(70_001), normal(5)])
    for damaged, message in broken(block):
        with pytest.raises(ValueError, match=message):
            decompress(damaged)
    one_length = block.luts.clone()
    one_length[-1] = 32
    with pytest.raises(ValueError, match=r"encoded_exponent holds \d+ codes for 70006 weights"):
        decompress(replace(block, luts=one_length))


def test_the_decoding_table():
    """A code of 8 bits, and one of 25 that ends in the fourth table with what elsewhere stands for a table."""
    codes = {END: (1, 1), 100: (8, 0b01000000), 255: (25, 0b0000000100000010000000111)}
    table = decoding_table(lookup_tables(codes))
    assert table[0, 0b01000000] == 8 * 256 + 100
    assert [table[0, 1], table[1, 2], table[2, 3], table[3, 0b10000000]] == [1, 2, 3, 25 * 256 + 255]


def test_decoding_never_leaves_the_tables():
    """Whatever bits follow the last code, and whatever a damaged file holds."""
    random = np.random.default_rng(0)
    for tables in (1, 3, 5):
        luts = random.integers(0, 256, (tables + 1, 256)).astype(np.uint8)
        luts[:-1] = np.where(luts[:-1] >= 240, 256 - random.integers(1, max(tables, 2), luts[:-1].shape), luts[:-1])
        luts[-1, ::2] = 0
        if tables == 1:
            luts[0] = luts[0].clip(max=239)
        table = decoding_table(luts)
        assert ((table >= 256) | (table < tables)).all()


def test_tables_that_lead_nowhere_are_left_in_the_end():
    block = compress([torch.cat([bits(0x7F80), normal(100)])])
    luts = block.luts.clone()
    luts[:-1] = 255  # on to the second table, and from there to itself
    assert len(decompress(replace(block, luts=luts))[0]) == 101


# On a card, or in Triton's interpreter.


@pytest.fixture(scope="module")
def kernel():
    pytest.importorskip("triton", reason="Triton is not installed: it comes with CUDA builds of torch")
    from helpers.formats import df11_kernel

    patch = pytest.MonkeyPatch()
    if DEVICE.type == "cpu":
        # The interpreter runs one program after the other: many threads in each.
        patch.setattr(df11_kernel, "_LANES", 1024)
    yield df11_kernel
    patch.undo()


def test_the_kernel_decodes_bit_for_bit(kernel, tensors):
    expected = torch.cat([tensor.flatten() for tensor in tensors])
    card = kernel.load(compress(tensors), DEVICE)
    buffer = torch.full((len(expected) + 9,), 7.0, dtype=torch.bfloat16, device=DEVICE)
    assert_same_bits(kernel.decode(card, buffer), expected)
    assert (buffer[len(expected) :] == 7).all()


@pytest.mark.parametrize(("first", "last"), [(0, 1), (0, 128), (128, 640), (77, 1000), (127, 128), (900, 3001), (5, 5)])
def test_the_kernel_decodes_any_part(kernel, first, last):
    expected = normal(3001)
    card = kernel.load(compress([expected]), DEVICE)
    buffer = torch.full((4000,), 7.0, dtype=torch.bfloat16, device=DEVICE)
    made = kernel.decode(card, buffer[1:], first, last)  # at an address that is no multiple of anything
    assert_same_bits(made, expected[first:last])
    assert buffer[0] == 7 and (buffer[1 + last - first :] == 7).all()


def test_the_index_takes_little(kernel):
    block = compress([normal(70_000)])
    card = kernel.load(block, DEVICE)
    assert card.starts.nbytes == 4 * math.ceil(70_000 / 128)
    assert card.nbytes < 1.03 * block.nbytes


def test_whatever_threads_read_there_is(kernel):
    """The last thread too decodes 128 weights, a word at most for each, and holds three words at first."""
    for count in (1, 127, 128, 5000):
        block = compress([normal(count)])
        words = kernel.load(block, DEVICE).words
        assert len(words) >= math.ceil(block.encoded_exponent.numel() / 4) + 128 + 3
        assert (words[math.ceil(block.encoded_exponent.numel() / 4) :] == 0).all()


def test_the_kernel_refuses_what_does_not_fit(kernel):
    card = kernel.load(compress([normal(300)]), DEVICE)
    room = torch.empty(300, dtype=torch.bfloat16, device=DEVICE)
    for out in (room[:299], room.float(), torch.empty(600, dtype=torch.bfloat16, device=DEVICE)[::2]):
        with pytest.raises(
            ValueError, match="300 weights of a DFloat11 block do not fit .*: decode them into a contig"
        ):
            kernel.decode(card, out)
    for first, last in ((-1, 5), (0, 301), (7, 6)):
        with pytest.raises(ValueError, match=f"Weights {first} to {last} are not all in a DFloat11 block of 300"):
            kernel.decode(card, room, first, last)


def test_the_kernel_refuses_a_damaged_block(kernel):
    block = compress([normal(20_001), normal(5)])
    for damaged, message in broken(block):
        with pytest.raises(ValueError, match=message):
            kernel.load(damaged, DEVICE)
    positions = block.positions().to(torch.int32)
    positions[1] += 1
    with pytest.raises(ValueError, match="does not hold the codes that output_positions tells"):
        kernel.load(replace(block, output_positions=positions.view(torch.uint8)), DEVICE)


# Folders.


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("df11") / "made"
    modules = []
    write_df11(TINY, folder, modules.append)
    return SimpleNamespace(folder=folder, modules=modules)


@pytest.fixture
def copied(converted, tmp_path):
    """The converted folder, to be damaged."""
    return Path(shutil.copytree(converted.folder, tmp_path / "copy"))


def test_a_folder_holds_all_weights_bit_for_bit(converted):
    found, weights = read_df11(converted.folder), load_file(TINY / "ema.safetensors")
    seen = set(found.tensors)
    for name, shape in found.tensors.items():
        assert_same_bits(found.tensor(name), weights[name])
        assert shape == weights[name].shape
    for module, names in found.blocks.items():
        made = decompress(found.block(module), [weights[name].shape for name in names])
        for name, tensor in zip(names, made, strict=True):
            assert_same_bits(tensor, weights[name])
        assert seen.isdisjoint(names)
        seen.update(names)
    assert seen == weights.keys()
    assert found.autoencoder.read_bytes() == (TINY / "ae.safetensors").read_bytes()


def test_a_folder_is_laid_out_as_the_published_one(converted):
    """Files, what each holds, and the configuration (DFloat11/BAGEL-7B-MoT-DF11, revision d696348)."""
    layers = [f"language_model.model.layers.{layer}" for layer in range(8)]
    modules = ["language_model.model.embed_tokens", *layers, "language_model.lm_head", "vit_model"]
    assert converted.modules == modules
    files = {file.name for file in converted.folder.glob("*.safetensors")}
    assert files == {f"{module.replace('.', '_')}.safetensors" for module in modules} | {"model.safetensors"}
    with safe_open(converted.folder / "language_model_model_layers_3.safetensors", "pt") as layer:
        names = {name.removeprefix("language_model.model.layers.3.") for name in layer.keys()}  # noqa: SIM118
        assert layer.metadata() is None
    others = {
        f"{name}layernorm{suffix}.weight" for name in ("input_", "post_attention_") for suffix in ("", "_moe_gen")
    }
    others |= {f"self_attn.{name}_norm{suffix}.weight" for name in "qk" for suffix in ("", "_moe_gen")}
    others |= {f"self_attn.{name}_proj{suffix}.bias" for name in "qkv" for suffix in ("", "_moe_gen")}
    assert names == {*PARTS, *others}
    rest = load_file(converted.folder / "model.safetensors")
    starts = ("connector.", "time_embedder.", "vae2llm.", "llm2vae.", "latent_pos_embed.", "vit_pos_embed.")
    assert all(name.startswith((*starts, "language_model.model.norm")) for name in rest)
    config = json.loads((converted.folder / "config.json").read_text())
    told = config.pop("dfloat11_config")
    assert config == json.loads((TINY / "config.json").read_text())
    assert (told["version"], told["threads_per_block"], told["bytes_per_thread"]) == ("0.5.0", [512], 8)
    assert list(told["pattern_dict"])[1:3] == [r"language_model\.model\.layers.\d+", r"language_model\.lm_head"]
    beside = {"llm_config.json", "vit_config.json", "vocab.json", "merges.txt", "tokenizer_config.json"}
    assert beside <= {file.name for file in converted.folder.iterdir()}


def test_the_7b_models_patterns_are_the_published_ones():
    names = json.loads((ROOT / "tests" / "reference" / "manifest_ema.json").read_text())
    embed, layers, head, vit = bagel_patterns(list(names)).values()
    assert embed == head == []
    heads = [f"self_attn.{name}_proj" for name in "qkvo"]
    assert layers[:8] == heads + [f"{name}_moe_gen" for name in heads]
    assert layers[8:11] == ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert layers[11:] == ["mlp_moe_gen.gate_proj", "mlp_moe_gen.up_proj", "mlp_moe_gen.down_proj"]
    assert len(vit) == 26 * 6 + 1 and vit[-1] == "vision_model.embeddings.patch_embedding"
    second = [name.removeprefix("vision_model.encoder.layers.1.") for name in vit[6:12]]
    attention = [f"self_attn.{name}_proj" for name in ("k", "v", "q", "out")]
    assert second == [*attention, "mlp.fc1", "mlp.fc2"]
    assert vit[-2] == "vision_model.encoder.layers.25.mlp.fc2"
    counts = [math.prod(names[f"language_model.model.layers.0.{layer}.weight"]) for layer in layers]
    assert sum(counts) == 466_092_032  # as the published file has


def test_only_headers_are_read_at_first(converted, monkeypatch):
    monkeypatch.setattr(df11_folder.Block, "check", lambda _: pytest.fail("read"))
    assert len(read_df11(converted.folder).blocks) == 11


def change_config(folder, **told):
    config = json.loads((folder / "config.json").read_text())
    config["dfloat11_config"] |= told
    (folder / "config.json").write_text(json.dumps(config))


def test_a_folder_without_its_configuration(copied):
    config = copied / "config.json"
    whole = config.read_text()
    config.write_text(json.dumps({"vae_config": {}}))
    with pytest.raises(ValueError, match=r"config.json has no dfloat11_config: this is no DFloat11 folder"):
        read_df11(copied)
    config.write_text(whole[:100])
    with pytest.raises(ValueError, match=r"config.json is no configuration in JSON \(.*\): fetch it again"):
        read_df11(copied)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json is missing.*: fetch it again, or let the conversion run"):
        read_df11(copied)


@pytest.mark.parametrize("version", ["0.2.0", "0.3.1", "0.5.0"])
def test_versions_of_the_same_layout(copied, version):
    change_config(copied, version=version)
    assert len(read_df11(copied).blocks) == 11


@pytest.mark.parametrize("version", ["0.1.0", "0.20.0", "1.0.0", None])
def test_another_version(copied, version):
    change_config(copied, version=version)
    with pytest.raises(ValueError, match=rf"tells DFloat11 version {version}; 0.2, 0.3, 0.4, 0.5 are read"):
        read_df11(copied)


def test_other_sizes_of_pieces(copied):
    change_config(copied, threads_per_block=[256])
    with pytest.raises(ValueError, match=r"\[256\] threads of 8 bytes; only \[512\] of 8 are read"):
        read_df11(copied)


def test_patterns_of_another_model(copied):
    change_config(copied, pattern_dict={r"language_model\..*": []})
    with pytest.raises(ValueError, match=r"no pattern for the module vit_model: use files of the same DFloat11 folder"):
        read_df11(copied)
    change_config(copied, pattern_dict={".*": ["one", "two"]})
    folder = read_df11(copied)
    with pytest.raises(ValueError, match=r"layers.2 has 14 tensors, config.json tells of 2: use files of the same"):
        folder.block("language_model.model.layers.2")


def test_a_truncated_file(copied):
    file = copied / "language_model_model_layers_3.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"layers_3.safetensors .*: it is truncated or damaged; fetch it again"):
        read_df11(copied)


def test_files_that_lack_something(copied):
    file = copied / "language_model_lm_head.safetensors"
    parts = load_file(file)
    gaps = parts.pop("language_model.lm_head.gaps")
    save_file(parts, file)
    with pytest.raises(ValueError, match=r"lacks language_model.lm_head.gaps: fetch the DFloat11 folder again"):
        read_df11(copied)
    save_file(parts | {"language_model.lm_head.gaps": gaps[:-1].clone()}, file)
    with pytest.raises(ValueError, match=r"lm_head.safetensors .*language_model.lm_head: gaps has .* bytes instead of"):
        read_df11(copied).block("language_model.lm_head")
    for shard in copied.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no compressed weights: fetch the DFloat11 folder's"):
        read_df11(copied)


@pytest.fixture
def source(tmp_path):
    """A folder to convert that may be damaged."""
    return Path(shutil.copytree(TINY, tmp_path / "source"))


def test_folders_that_cannot_be_converted(source, tmp_path):
    target = tmp_path / "made"
    (source / "ae.safetensors").rename(tmp_path / "ae")
    with pytest.raises(FileNotFoundError, match=r"ae.safetensors is missing: convert a whole BAGEL folder"):
        write_df11(source, target)
    (tmp_path / "ae").rename(source / "ae.safetensors")
    weights = load_file(source / "ema.safetensors")
    lacking = {name: weight for name, weight in weights.items() if "layers.5.mlp.up_proj" not in name}
    save_file(lacking, source / "ema.safetensors")
    with pytest.raises(
        ValueError, match=r"lacks language_model.model.layers.5.mlp.up_proj.weight: these are no weights"
    ):
        write_df11(source, target)
    save_file(weights | {"connector.fc1.bias": torch.zeros(192)}, source / "ema.safetensors")
    with pytest.raises(ValueError, match=r"connector.fc1.bias as F32, DFloat11 compresses BF16: convert to bfloat16"):
        write_df11(source, target)
    (source / "ema.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"ema.safetensors is missing"):
        write_df11(source, target)
    assert not target.exists()


def test_a_target_that_is_not_empty(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"is not empty: name a new folder"):
        write_df11(TINY, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_disk_without_room(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=9_000_000))
    with pytest.raises(OSError, match=r"needs about 0.0 GB, 0.0 GB are free: make room first"):
        write_df11(TINY, tmp_path / "made")
    assert not list((tmp_path / "made").iterdir())


def test_a_disk_that_fills_up(tmp_path, monkeypatch):
    """What was written stays, nothing half-written has a file's name, and the folder is known not to be whole."""
    save, files = df11_folder.save_file, []

    def fill(tensors, file):
        files.append(file)
        if len(files) == 3:
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, file)

    monkeypatch.setattr(df11_folder, "save_file", fill)
    with pytest.raises(OSError, match=r"layers_1.safetensors could not be written .*No space left.*make room"):
        write_df11(TINY, tmp_path / "made")
    assert {file.suffix for file in files} == {".part"}
    names = {file.name for file in (tmp_path / "made").iterdir()}
    assert names == {f"language_model_model_{name}.safetensors" for name in ("embed_tokens", "layers_0")}
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        read_df11(tmp_path / "made")


def test_a_block_has_the_files_names():
    assert tuple(Block.__dataclass_fields__) == PARTS
