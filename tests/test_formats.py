"""Weight formats from the outside: what `load_bagel` makes of a folder, what it keeps, and what it refuses."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from helpers import checkpoint, choices, load_bagel
from helpers.bagel.decoder import FeedForward
from helpers.bagel.images import open_picture
from helpers.bagel.layers import finite, linears
from helpers.bagel.packed import Room
from helpers.bench.floors import weight_bytes
from helpers.convert import main
from helpers.formats.df11_folder import read_df11

FOLDER = ROOT / "tests" / "reference" / "checkpoint"
PICTURE = ROOT / "tests" / "reference" / "tall.png"
PACKED = ("int8", "int4", "nf4")
DRAW = {"prompt": "the red cat", "height": 64, "width": 64, "num_timesteps": 5, "seed": 3}


def load(folder=FOLDER, weights="fp32", **more):
    return load_bagel(folder, weights=weights, device="cpu", attention="sdpa", **more)


@pytest.fixture(scope="module")
def exact():
    bagel = load()
    return SimpleNamespace(bagel=bagel, latent=bagel.generate(**DRAW).latent)


@pytest.mark.parametrize(
    ("weights", "most"), [("fp16", 0.02), ("bf16", 0.1), ("int8", 0.05), ("nf4", 0.5), ("int4", 0.5)]
)
def test_a_format_draws_nearly_the_same_in_less_memory(exact, weights, most):
    bagel = load(weights=weights)
    error = (bagel.generate(**DRAW).latent - exact.latent).norm() / exact.latent.norm()
    assert 0 < error < most
    assert weight_bytes(bagel) < weight_bytes(exact.bagel)


@pytest.mark.parametrize("weights", PACKED)
def test_packed_weights_are_saved_and_loaded_without_the_original(tmp_path, weights):
    bagel = load(weights=weights)
    bagel.save(tmp_path / "packed")
    assert (
        sum(file.stat().st_size for file in (tmp_path / "packed").glob("ema*"))
        < (FOLDER / "ema.safetensors").stat().st_size
    )
    again = load(tmp_path / "packed", "auto")
    assert again.weights == weights and weight_bytes(again) == weight_bytes(bagel)
    assert torch.equal(again.generate(**DRAW).latent, bagel.generate(**DRAW).latent)
    with pytest.raises(FileExistsError, match="not empty"):
        again.save(tmp_path / "packed")
    with pytest.raises(ValueError, match=f"packed as {weights}.*'bf16'"):
        load(tmp_path / "packed", "bf16")


def test_what_cannot_be_saved_says_so(tmp_path, exact, folders):
    """Of a DFloat11 folder the shards would come along, and the configuration that says that they count."""
    whole = exact.bagel, load("random-tiny", "int8"), load(folders[1], "int8")
    for bagel in (*whole, load(weights="int8", experts="understanding")):
        with pytest.raises(ValueError, match="cannot be saved: load a folder whole, as one of int8"):
            bagel.save(tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(OSError, match="GB do not fit .*name another disk"):
        load(weights="int8").save(tmp_path / "packed")
    assert not any((tmp_path / "packed").iterdir())


def test_a_damaged_folder_of_packed_weights_names_what_is_wrong(tmp_path):
    load(weights="int8").save(tmp_path)
    file = tmp_path / "ema.safetensors"
    tensors = load_file(file)
    name = "language_model.model.layers.0.self_attn.q_proj.weight.scale"
    del tensors[name]
    save_file(tensors, file, {"format": "pt", "bagel_weights": "int8"})
    with pytest.raises(ValueError, match=f"1 missing: {name}"):
        load(tmp_path, "auto")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="truncated or damaged"):
        load(tmp_path, "auto")


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_the_understanding_half_answers_alike(exact, weights):
    whole, half = load(weights=weights), load(weights=weights, experts="understanding")
    ask = {"question": "What is it?", "max_new_tokens": 6}
    assert half.understand(PICTURE, **ask).token_ids == whole.understand(PICTURE, **ask).token_ids
    assert not any("_moe_gen" in name for name in half.model.state_dict())
    assert weight_bytes(half) < 0.6 * weight_bytes(whole)
    for ask in (lambda: half.generate("a cat"), lambda: half.edit(open_picture(PICTURE), "blue")):
        with pytest.raises(ValueError, match="experts='understanding'.*'all'"):
            ask()


def test_unknown_formats_and_experts_are_refused():
    with pytest.raises(ValueError, match="weights 'int3' must be one of auto, bf16, fp16.*int4"):
        load(weights="int3")
    with pytest.raises(ValueError, match="experts 'half' must be one of all, understanding"):
        load(experts="half")


def test_old_cards_compute_in_float16(monkeypatch):
    """A T4, emulated: its capability is what the choice is made by."""
    monkeypatch.setattr(choices, "_capability", lambda device: (7, 5))
    card = torch.device("cuda")
    assert choices._weights(card)[0] == "fp16"
    assert choices._activations("int8", card) == torch.float16
    assert choices._activations("bf16", card) == torch.bfloat16
    monkeypatch.setattr(choices, "_capability", lambda device: (8, 0))
    assert choices._activations("int8", card) == torch.bfloat16
    assert "overflow" in choices._lacking_for_kernels(card, torch.float16)


def test_float16_stays_finite_where_it_would_overflow():
    """Products beyond 65,504: infinities, whose sum with others would be no numbers."""
    torch.manual_seed(0)
    part = FeedForward(64, 128).to(torch.float16)
    part.gate_proj.weight.data *= 3e3
    part.up_proj.weight.data *= 3e3
    x = torch.randn(1, 5, 64, dtype=torch.float16) * 10
    gate, up = (layer(x) for layer in (part.gate_proj, part.up_proj))
    assert not torch.isfinite(torch.nn.functional.silu(gate) * up).all()
    assert torch.isfinite(part(x)).all()
    assert all(torch.isfinite(made).all() for made in linears(x * 100, [part.gate_proj]))
    beyond = torch.tensor([1e30, -1e30], dtype=torch.bfloat16)
    assert torch.equal(finite(beyond.clone()), beyond)


def test_the_header_alone_tells_the_format(tmp_path):
    load(weights="nf4").save(tmp_path)
    with open(tmp_path / "ema.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["__metadata__"]["bagel_weights"] == "nf4"
    assert header["language_model.model.layers.0.mlp_moe_gen.down_proj.weight.codes"]["dtype"] == "U8"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The reference checkpoint in bfloat16, and compressed by DFloat11."""
    plain, compressed = (tmp_path_factory.mktemp("weights") / name for name in ("plain", "compressed"))
    shutil.copytree(FOLDER, plain)
    weights = load_file(FOLDER / "ema.safetensors")
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, plain / "ema.safetensors")
    assert main(["--model", str(plain), "--weights", "df11", "--out", str(compressed)]) == 0
    return plain, compressed


def test_dfloat11_loses_nothing(folders):
    plain, compressed = (load(folder, "auto") for folder in folders)
    assert compressed.weights == "df11"
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(compressed.model.state_dict()[name], weight)
    half = load(folders[1], "int8", experts="understanding")
    assert half.understand(PICTURE, "What is it?", max_new_tokens=3).token_ids


def test_weights_are_found_in_their_block(folders):
    """Queries, keys and values lie one behind the other in it; the output's weights come next."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from helpers.formats.df11_weights import CardReader

    weights = load_file(folders[0] / "ema.safetensors")
    head = "language_model.model.layers.1.self_attn."
    names = [f"{head}{name}_proj.weight" for name in "qkv"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reader, room = CardReader(read_df11(folders[1]), device), Room(device, torch.float32, None)
    expected = torch.cat([weights[name] for name in names])
    packed = reader.packed(names, tuple(expected.shape), room)
    assert torch.equal(packed.whole().cpu(), expected.float())
    bias, out = torch.empty(64, device=device), torch.empty(64, 64, device=device)
    reader.read({f"{head}q_proj.bias": bias, f"{head}o_proj.weight": out})
    assert torch.equal(bias.cpu(), weights[f"{head}q_proj.bias"].float())
    assert torch.equal(out.cpu(), weights[f"{head}o_proj.weight"].float())
    with pytest.raises(ValueError, match="v_proj.weight does not follow .*q_proj.weight"):
        reader.packed([names[0], names[2]], tuple(expected.shape), room)
    with pytest.raises(ValueError, match=r"weights in its DFloat11 block instead of 4096"):
        reader.packed(names, (64, 64), room)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card: Triton's interpreter takes five minutes")
def test_layers_that_stay_compressed_compute_the_same(folders):
    """With the decoder's kernels: of the layers nothing is whole but one matrix at a time."""
    kept = load_bagel(folders[1], device="cuda", attention="sdpa")
    plain = load_bagel(folders[0], weights="bf16", device="cuda", attention="sdpa").model
    decoder = kept.model.language_model.model
    assert not any("_proj.weight" in name for name in decoder.state_dict())
    for name, weight in kept.model.state_dict().items():
        assert torch.equal(weight, plain.state_dict()[name])
    found, layer = decoder.layers[1], plain.language_model.model.layers[1]
    for one, other in ((found.self_attn, layer.self_attn), (found.mlp_moe_gen, layer.mlp_moe_gen)):
        for group, expected in zip(one.over_one_input(), other.over_one_input(), strict=True):
            assert torch.equal(group[0].joined.matrix(), expected[0].joined.matrix())
    ids = torch.tensor([5], device="cuda")
    logits = [model.append_token(model.new_context(1, 8, 0), ids) for model in (kept.model, plain)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("weights", ["df11", "gguf"])
def test_formats_that_a_folder_must_bring(folders, weights):
    with pytest.raises(ValueError, match=f"is no folder of '{weights}' weights.*helpers convert"):
        load(folders[0], weights)


@pytest.mark.parametrize("kind", ["Q8_0", "BF16"])
def test_a_gguf_stays_as_it_is_or_becomes_whole(folders, tmp_path, kind):
    pytest.importorskip("gguf", reason="gguf is not installed")
    ask = ["--model", str(folders[0]), "--weights", "gguf", "--type", kind, "--out", str(tmp_path / "new")]
    assert main(ask) == 0
    file = tmp_path / "new" / f"bagel-{kind}.gguf"
    kept, whole, original = load(tmp_path / "new", "auto"), load(file, "fp32"), load(folders[0])
    assert (kept.weights, whole.weights) == ("gguf", "fp32")
    assert weight_bytes(kept) < weight_bytes(whole)
    latent = kept.generate(**DRAW).latent
    assert torch.equal(latent, whole.generate(**DRAW).latent)
    error = (latent - original.generate(**DRAW).latent).norm() / latent.norm()
    assert error < 0.05 and (error == 0) == (kind == "BF16")
    half = load(file, "auto", experts="understanding")
    ask = {"question": "What is it?", "max_new_tokens": 4}
    assert half.understand(PICTURE, **ask).token_ids == kept.understand(PICTURE, **ask).token_ids
    shutil.copyfile(file, tmp_path / "new" / "other.gguf")
    with pytest.raises(ValueError, match=f"has bagel-{kind}.gguf, other.gguf: name the file"):
        load(tmp_path / "new", "auto")


def test_what_a_load_will_take_is_known_before(folders, tmp_path, monkeypatch):
    """The room for packed weights included: what is asked for before anything is read is what then lies there."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    assert main(["--model", str(folders[0]), "--weights", "gguf", "--out", str(tmp_path / "new")]) == 0
    asked = []
    monkeypatch.setattr(checkpoint, "check_room", lambda needed, *_: asked.append(needed))
    for folder, weights in [(folders[0], kind) for kind in ("fp32", "bf16", *PACKED)] + [(tmp_path / "new", "gguf")]:
        bagel = load(folder, weights)
        rooms = {
            layer.joined.weight.room
            for layer in bagel.model.modules()
            if hasattr(layer, "joined") and weights not in ("fp32", "bf16")
        }
        taken = weight_bytes(bagel) + sum(room.buffer.nbytes for room in rooms)
        assert asked.pop() == pytest.approx(taken, rel=0.03), weights


def test_a_dfloat11_folder_of_another_model_says_what_differs(folders, tmp_path):
    shutil.copytree(folders[1], tmp_path / "other")
    file = tmp_path / "other" / "llm_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"intermediate_size": config["intermediate_size"] + 8}))
    with pytest.raises(ValueError, match=r"mlp.*gate_proj.weight has \d+ weights in its DFloat11 block instead of \d+"):
        load(tmp_path / "other", "auto")


@pytest.mark.parametrize("weights", PACKED)
def test_the_command_writes_a_folder_that_loads(tmp_path, capsys, weights):
    ask = ["--model", str(FOLDER), "--weights", weights, "--out", str(tmp_path / "new")]
    assert main(ask) == 0
    assert f"load_bagel('{tmp_path / 'new'}') loads it" in capsys.readouterr().out
    assert load(tmp_path / "new", "auto").weights == weights
    assert main(ask) == 1
    assert "is not empty: name a new folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as wrong:
        main(["--weights", "int3", "--out", str(tmp_path / "newer")])
    assert wrong.value.code == 2
