"""DFloat11 on a card, against the dfloat11 package's own compression and its own kernel: bit for bit, both ways.

The package needs a card and CuPy, so everything here is skipped without them. Where only these tests are to run,
`python -m pytest --noconftest -s tests/test_df11_card.py` needs none of the notebooks' libraries. The last test prints
how fast either kernel decodes one layer of the 7B model.
"""

import math
from pathlib import Path
from statistics import median

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from helpers.formats.df11 import Block, compress, decompress, views
from helpers.formats.df11_folder import read_df11, write_df11

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA card", allow_module_level=True)

pytest.importorskip("triton", reason="Triton is not installed: it comes with CUDA builds of torch")
df11_kernel = pytest.importorskip("helpers.formats.df11_kernel")
pytest.importorskip("pkg_resources", reason="dfloat11 0.5.0 needs pkg_resources (pip install 'setuptools<81')")
cupy = pytest.importorskip("cupy", reason="CuPy is not installed (pip install cupy-cuda13x, or 12x)")
pytest.importorskip("dahuffman", reason="dahuffman is not installed (pip install dahuffman==0.4.2)")
dfloat11 = pytest.importorskip("dfloat11", reason="dfloat11 is not installed (pip install --no-deps dfloat11==0.5.0)")

CARD = torch.device("cuda", 0)
TINY = Path(__file__).resolve().parents[1] / "helpers" / "tiny" / "checkpoint"
LAYER = [(3584, 3584), (512, 3584), (512, 3584), (3584, 3584)] * 2 + [(18944, 3584), (18944, 3584), (3584, 18944)] * 2


def normal(*shape, std=0.02):
    values = torch.randn(shape, generator=torch.Generator(CARD).manual_seed(sum(shape)), device=CARD)
    return (values * std).to(torch.bfloat16).cpu()


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype == torch.bfloat16 and found.shape == expected.shape
    assert torch.equal(found.cpu().view(torch.int16), expected.cpu().view(torch.int16))


def packages_parts(block):
    """A block's parts on the card, and the shared memory that the package's kernel needs for them."""
    most = block.positions().diff().max().item()
    return [part.to(CARD) for part in block.parts().values()], 512 * 4 + 4 + 2 * most


def packages_decode(parts, shared, out):
    """What the package's hook does with a block: one start of its kernel."""
    luts, encoded, rest, positions, gaps, _ = parts
    blocks = math.ceil(encoded.numel() / 4096)
    args = [part.data_ptr() for part in (luts, encoded, rest, positions, gaps, out)]
    with cupy.cuda.Device(CARD.index):
        dfloat11.dfloat11._decode(
            grid=(blocks,), block=(512,), shared_mem=shared, args=[*args, len(luts), encoded.numel(), rest.numel()]
        )
    return out


class Layer(nn.Module):
    """Two layers that become one block, and what stays as it is."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.ModuleDict({"first": nn.Linear(width, 2 * width), "second": nn.Linear(2 * width, width)})


class Model(nn.Module):
    """A small model in the package's sense: blocks of several layers, an embedding and a head of their own."""

    def __init__(self, width: int = 384):
        super().__init__()
        self.embed = nn.Embedding(500, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 500, bias=False)


PATTERNS = {"embed": [], r"layers\.\d+": ["inner.second", "inner.first"], "head": []}


@pytest.fixture
def model():
    made = Model().to(torch.bfloat16)
    for name, parameter in made.named_parameters():
        parameter.data = normal(*parameter.shape, std=0.1 if "head" in name else 0.02)
    return made


def test_we_read_what_the_package_writes(model, tmp_path):
    """With its own check of its own kernel on, so that the file is right by its own measure."""
    weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    dfloat11.compress_model(model, PATTERNS, str(tmp_path / "theirs"), save_single_file=False, check_correctness=True)
    folder, seen = read_df11(tmp_path / "theirs"), set()
    for module, names in folder.blocks.items():
        block, shapes = folder.block(module), [weights[name].shape for name in names]
        made = df11_kernel.decode(
            df11_kernel.load(block, CARD), torch.empty(block.weights, dtype=torch.bfloat16, device=CARD)
        )
        for name, ours, slow in zip(names, views(made, block, shapes), decompress(block, shapes), strict=True):
            assert_same_bits(ours, weights[name])
            assert_same_bits(slow, weights[name])
            seen.add(name)
    assert folder.blocks["layers.1"] == ["layers.1.inner.second.weight", "layers.1.inner.first.weight"]
    for name in folder.tensors:
        assert_same_bits(folder.tensor(name), weights[name])
    assert seen | folder.tensors.keys() == weights.keys()


def test_we_write_what_the_package_writes(model, tmp_path):
    weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    dfloat11.compress_model(model, PATTERNS, str(tmp_path / "theirs"), save_single_file=False, check_correctness=False)
    folder = read_df11(tmp_path / "theirs")
    for module, names in folder.blocks.items():
        ours = compress([weights[name] for name in names]).parts()
        for part, theirs in folder.block(module).parts().items():
            assert torch.equal(ours[part], theirs), part


def skeleton(weights: dict[str, torch.Tensor]) -> nn.Module:
    """Modules with the names of these weights: linear layers and embeddings where the weight is a matrix."""
    root = nn.Module()
    for name, weight in weights.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and weight.ndim == 2:
            rows, columns = weight.shape
            bias = f"{path}.bias" in weights
            embeds = path.endswith(("embed_tokens", "position_embedding"))
            put(root, path, nn.Embedding(rows, columns) if embeds else nn.Linear(columns, rows, bias=bias))
    for name, weight in weights.items():
        path, _, leaf = name.rpartition(".")
        module = put(root, path)
        if leaf not in dict(module.named_parameters(recurse=False)):
            module.register_parameter(leaf, nn.Parameter(torch.empty(weight.shape), requires_grad=False))
    return root.to(torch.bfloat16)


def put(root: nn.Module, path: str, module: nn.Module | None = None) -> nn.Module:
    """The module at a path, made with those around it where there is none; `module` is put there."""
    *around, last = path.split(".")
    for part in around:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if module is not None or not hasattr(root, last):
        root.add_module(last, module or nn.Module())
    return getattr(root, last)


def test_the_package_reads_what_we_write(tmp_path):
    """The whole tiny BAGEL, through the package's loader and its hooks."""
    weights = load_file(TINY / "ema.safetensors")
    write_df11(TINY, tmp_path / "ours")
    model = dfloat11.DFloat11Model.from_pretrained(
        str(tmp_path / "ours"), bfloat16_model=skeleton(weights), device=str(CARD)
    )
    seen, parameters = set(), dict(model.named_parameters())
    for module, names in read_df11(tmp_path / "ours").blocks.items():
        part = model.get_submodule(module)
        (hook,) = part._forward_pre_hooks.values()
        hook(part, ())
        torch.cuda.synchronize()
        for name in names:
            assert_same_bits(model.get_submodule(name.removesuffix(".weight")).weight, weights[name])
            seen.add(name)
    for name in weights.keys() - seen:
        assert_same_bits(parameters[name].data, weights[name])


@pytest.mark.parametrize("seed", range(3))
def test_both_kernels_decode_every_pattern(seed):
    """The package's kernel too reads infinities and NaN, which the package cannot compress."""
    every = torch.arange(65536).to(torch.int16).view(torch.bfloat16)
    order = torch.randperm(65536, generator=torch.Generator().manual_seed(seed))
    numbers = torch.cat([normal(300_001), every[order], normal(77, std=1e-30), every[order[:seed]]])
    block = compress([numbers])
    out = torch.full((len(numbers),), 7.0, dtype=torch.bfloat16, device=CARD)
    assert_same_bits(packages_decode(*packages_parts(block), out), numbers)
    out.fill_(7.0)
    assert_same_bits(df11_kernel.decode(df11_kernel.load(block, CARD), out), numbers)


def seconds(work, times=30):
    """The median of several runs, on the card's clock."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times + 5)]
    for begin, end in events:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in events[5:]) / 1000


def test_a_layer_of_the_7b_model():
    """Both kernels make the same bits of it; their speed is printed, not checked."""
    weights = [normal(*shape, std=shape[1] ** -0.5) for shape in LAYER]
    block = compress(weights)
    expected = torch.cat([weight.flatten() for weight in weights]).to(CARD)
    out = torch.full_like(expected, 7.0)
    parts, shared = packages_parts(block)
    assert_same_bits(packages_decode(parts, shared, out), expected)
    theirs = seconds(lambda: packages_decode(parts, shared, out))
    card = df11_kernel.load(block, CARD)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    df11_kernel.load(block, CARD)
    end.record()
    out.fill_(7.0)
    assert_same_bits(df11_kernel.decode(card, out), expected)
    ours = seconds(lambda: df11_kernel.decode(card, out))
    first, last = 0, sum(block.sizes[:4])  # what one expert's attention needs
    part = seconds(lambda: df11_kernel.decode(card, out, first, last))
    copy = seconds(lambda: out.copy_(expected))
    report(block, card, {"package's": theirs, "ours": ours}, expected.nbytes)
    print(f"ours, the first {last:,} weights alone: {part * 1e3:.3f} ms; a copy of the layer: {copy * 1e3:.3f} ms")
    print(f"bringing the block to the card, index included: {begin.elapsed_time(end):.0f} ms")


def report(block: Block, card, times: dict[str, float], made: int) -> None:
    print(
        f"\n{torch.cuda.get_device_name(CARD)}, {block.weights:,} weights, {block.nbytes / made:.4f} of {made:,} bytes"
    )
    for name, time in times.items():
        read = block.nbytes if name != "ours" else card.nbytes
        rates = f"{made / time / 1e9:.0f} GB/s written, {(made + read) / time / 1e9:.0f} GB/s read and written"
        print(f"{name} kernel: {time * 1e3:.3f} ms, {rates}")
