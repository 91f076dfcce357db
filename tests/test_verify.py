"""`python -m helpers verify`: the runner against a stand-in checkout, the exchange, the comparison, what it refuses.

The stand-in (`standin/`) has the official names and signatures and answers with `reference/verify.safetensors`. Those
vectors were made by `verify --save` from a copy of the official code's inference path, in float32 on a processor; the
same copy and the same runner gave all vectors of `reference/expected.safetensors` without a step cache to within 1e-5.
"""

import ast
import json
import math
import shutil
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers.__main__ import main
from helpers.bagel.config import RELEASED, read_config
from helpers.checkpoint import tensor_shapes
from helpers.verify import command, exchange, official, process, works
from helpers.verify.comparing import BFLOAT16, FLOAT32, Rules, compare, different_sizes, distance
from helpers.verify.exchange import Vectors
from helpers.verify.works import Sizes, Works

REFERENCE = ROOT / "tests" / "reference"
CHECKPOINT = REFERENCE / "checkpoint"
VECTORS = REFERENCE / "verify.safetensors"
EXPECTED = load_file(REFERENCE / "expected.safetensors")
SMALL = ["--size", "64", "--num-timesteps", "4", "--max-new-tokens", "8"]  # what the vectors were made with
FACTS = {"weights": "fp32", "device_type": "cpu", "sizes": {"ViT layers": 26, "decoder layers": 28}}


def verify(*words):
    return main(["verify", "--model", str(CHECKPOINT), "--device", "cpu", *map(str, words)])


def refused(capsys, *words):
    """The message of a wrong use."""
    with pytest.raises(SystemExit) as ended:
        verify(*words)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def checkout(tmp_path):
    """A stand-in checkout in a folder of its own."""
    folder = tmp_path / "Bagel"
    shutil.copytree(ROOT / "tests" / "standin", folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(VECTORS, folder / "recorded.safetensors")
    return folder


@pytest.fixture(scope="module")
def config():
    return read_config(CHECKPOINT, tensor_shapes(CHECKPOINT / "ema.safetensors"))


# Both sides


def test_the_official_side_runs_and_agrees(checkout, tmp_path, capsys):
    saved = tmp_path / "vectors.safetensors"
    assert verify("--official", checkout, "--save", saved, *SMALL) == 0
    said = capsys.readouterr().out
    assert "24 of 24 within tolerance" in said and official.SDPA in said and "official: edit, " in said
    made_works, made, checkpoint = exchange.read(saved)
    known_works, known, _ = exchange.read(VECTORS)
    assert made_works.cases == known_works.cases and checkpoint == exchange.checkpoint_of(CHECKPOINT)
    assert made.tensors.keys() == known.tensors.keys()
    for name, tensor in known.tensors.items():
        tolerance = 1e-5 * tensor.abs().max().item() if name.endswith(("latent", "latents", "velocity")) else 0
        torch.testing.assert_close(made.tensors[name], tensor, rtol=0, atol=tolerance, msg=name)
    assert made.facts["sizes"] == known.facts["sizes"]
    assert made.facts["versions"]["torch"] == version("torch")
    assert all(made.facts[what][case] > 0 for what in ("seconds", "peaks") for case in made_works.cases)
    for case in made_works.cases:
        row = next(line for line in said.splitlines() if line.startswith(f"{case} "))
        assert len(row.split()) == 5  # times and memory of both sides


def test_a_difference_is_found_and_named(checkout, capsys):
    tensors = load_file(VECTORS)
    tensors["vit_scene.features"][0, 0] += 1e-3 * tensors["vit_scene.features"].abs().max()
    save_file(tensors, checkout / "recorded.safetensors")
    assert verify("--official", checkout, *SMALL) == 1
    said = capsys.readouterr().out
    assert "23 of 24 within tolerance; not: vit_scene.features" in said


def test_saved_vectors_are_compared(capsys):
    assert verify("--vectors", VECTORS) == 0
    assert "24 of 24 within tolerance" in capsys.readouterr().out


def test_the_reference_checkpoint_needs_no_file(monkeypatch, capsys):
    few = ("vit_alpha", "vae_tall", "t2i_think", "edit_taylorseer", "interleaved_sampled_posterior", "und_tall_think")
    known, vectors = exchange.read_reference()
    kept = {name: tensor for name, tensor in vectors.tensors.items() if name.split(".")[0] in few}
    assert len(kept) == 4 + 3 + 5 + 5 + 5 + 2 and set(few) <= known.cases.keys()
    known = Works({name: known.cases[name] for name in few}, known.pictures)
    monkeypatch.setattr(command, "read_reference", lambda: (known, replace(vectors, tensors=kept)))
    assert verify() == 0
    assert f"{len(kept)} of {len(kept)} within tolerance" in capsys.readouterr().out
    kept["t2i_think.latent"] = kept["t2i_think.latent"] + 1e-2
    assert verify() == 1
    assert capsys.readouterr().out.strip().endswith("not: t2i_think.latent")


def test_the_reference_holds_every_kind_of_case():
    known, vectors = exchange.read_reference()
    assert {official.kind(name) for name in known.cases} == {"vit", "vae", "und", "draw"}
    assert {name.split(".")[0] for name in vectors.tensors} == known.cases.keys()
    assert len(vectors.tensors) == len([name for name in EXPECTED if not name.startswith("schedule.")])


def test_bfloat16_is_held_to_wider_limits(capsys):
    """Our own bfloat16 against the official float32: outside the limits of float32, inside those of bfloat16."""
    assert verify("--vectors", VECTORS, "--weights", "bf16") == 0
    said = capsys.readouterr().out
    assert "tolerance in bf16: 2^-7 x sqrt(layers)" in said
    errors = {line.split()[0]: float(line.split()[2]) for line in said.splitlines() if "_scene.hidden" in line}
    assert FLOAT32 < errors["prefill_scene.hidden"] < BFLOAT16 * math.sqrt(6)


# Wrong use


def test_a_folder_that_is_no_checkout_is_refused(capsys, checkout, tmp_path):
    said = refused(capsys, "--official", tmp_path / "nothing", *SMALL)
    assert "it has no inferencer.py (and 8 other files)" in said and "ByteDance-Seed/Bagel" in said
    (checkout / "data" / "transforms.py").unlink()
    assert "it has no data/transforms.py. Clone" in refused(capsys, "--official", checkout, *SMALL)


def test_a_missing_package_is_named(capsys, checkout):
    file = checkout / "data" / "data_utils.py"
    file.write_text("import wandering_band.of_packages\n" + file.read_text())
    said = refused(capsys, "--official", checkout, *SMALL)
    assert f"({sys.executable}) lacks the package wandering_band: install" in said and "--python" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--official", "x", "--vectors", "y"], "choose one"),
        (["--save", "x.safetensors"], "--save belong to a run of the official code: add --official"),
        (["--python", "x", "--size", "64"], "--python, --size belong to a run"),
        (["--official", "x", "--save", "no/such/folder/x"], "there is no folder no/such/folder"),
        (["--official", "x", "--size", "100"], "size 100 must be a multiple of 16, at most 128"),
        (["--official", "x", "--num-timesteps", "1"], "num_timesteps 1 must be at least 2"),
        (["--official", "x", "--weights", "bf16"], "bfloat16 on CUDA cards alone: use --weights fp32"),
        (["--vectors", "no.safetensors"], "no.safetensors is missing"),
    ],
)
def test_what_cannot_work_is_refused(capsys, words, said):
    assert said in refused(capsys, *words)


def test_a_python_that_is_none_is_refused(capsys, checkout):
    said = refused(capsys, "--official", checkout, "--python", checkout / "python", *SMALL)
    assert f"--python {checkout / 'python'} cannot be run" in said


def test_without_vectors_another_checkpoint_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--model", "tiny"])
    assert ended.value.code == 2
    assert "no saved vectors for tiny: give --official CHECKOUT or --vectors FILE" in capsys.readouterr().err


def test_vectors_of_another_checkpoint_are_refused(capsys, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(CHECKPOINT, folder)
    weights = bytearray((folder / "ae.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "ae.safetensors").write_bytes(weights)
    sizes = json.loads((folder / "llm_config.json").read_text())
    (folder / "llm_config.json").write_text(json.dumps({**sizes, "rope_theta": 10000.0}))
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--model", str(folder), "--vectors", str(VECTORS)])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "was made with another checkpoint" in said
    assert "llm_config.json: rope_theta is 10000.0 in the folder and 1000000.0 in the vectors" in said
    assert "ae.safetensors: SHA-256" in said and "ema.safetensors" not in said
    assert not exchange.is_reference(folder) and exchange.is_reference(CHECKPOINT)


@pytest.mark.parametrize(("content", "said"), [(b"nothing", "cannot be read"), (None, "holds no vectors")])
def test_a_file_of_another_kind_is_refused(capsys, tmp_path, content, said):
    file = tmp_path / "vectors.safetensors"
    file.write_bytes(content or (REFERENCE / "expected.safetensors").read_bytes())
    assert said in refused(capsys, "--vectors", file)


# A run without an answer


def test_a_run_that_dies_shows_its_last_lines(capsys, checkout):
    with (checkout / "data" / "data_utils.py").open("a") as file:
        file.write("raise RuntimeError('the cat sat on it')\n")
    assert verify("--official", checkout, *SMALL) == 1
    said = capsys.readouterr().out
    assert "not proven: The official code ended with code 1" in said and "RuntimeError: the cat sat on it" in said
    assert "transformers 4.49" in said


def test_noise_of_another_shape_ends_the_run(capsys, checkout):
    file = checkout / "modeling" / "bagel" / "bagel.py"
    file.write_text(file.read_text().replace("4 * self.latent_channel", "self.latent_channel"))
    assert verify("--official", checkout, *SMALL) == 1
    assert "ValueError: draw: noise [12, 64] was given, official is [12, 16]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "lines", "kind", "said"),
    [
        (
            1,
            ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"],
            "NotProvenError",
            "ran out of memory",
        ),
        (1, ["RuntimeError: [enforce fail] . DefaultCPUAllocator: can't allocate memory"], "NotProvenError", "--size"),
        (-9, [], "NotProvenError", "ran out of memory"),
        (-11, ["Segmentation fault"], "NotProvenError", "was stopped by signal 11"),
        (1, ["ModuleNotFoundError: No module named 'flash.x'"], "WrongUseError", "lacks the package flash.x"),
    ],
)
def test_the_end_of_a_run_is_explained(code, lines, kind, said):
    error = process._explained("python", code, lines)
    assert (
        type(error).__name__ == kind
        and said in str(error)
        and all(line in str(error) for line in lines[:1] * (code < 0))
    )


def test_the_last_lines_are_kept_and_progress_is_told(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("print('official: half way')\nfor i in range(30): print(i)\nimport sys; sys.exit(3)\n")
    told = []
    with pytest.raises(process.NotProvenError) as raised:
        process._run([sys.executable, str(program)], told.append)
    assert told == ["official: half way"]
    assert str(raised.value).endswith("\n".join(map(str, range(18, 30))))


def test_no_memory_on_our_side_is_no_proof(capsys, monkeypatch):
    def full(*_):
        raise MemoryError("This call ran out of memory on cpu")

    monkeypatch.setattr(command, "run_ours", full)
    assert verify("--vectors", VECTORS) == 1
    assert "not proven: This call ran out of memory" in capsys.readouterr().out


def test_models_of_different_sizes_are_no_proof(capsys, monkeypatch):
    known, vectors, checkpoint = exchange.read(VECTORS)
    facts = {**vectors.facts, "sizes": {**vectors.facts["sizes"], "ViT layers": 4}}
    monkeypatch.setattr(command, "read", lambda _file: (known, replace(vectors, facts=facts), checkpoint))
    assert verify("--vectors", VECTORS) == 1
    assert "different models: ViT layers is 3 here and 4 there" in capsys.readouterr().out
    assert different_sizes({}, FACTS) == []  # the reference vectors do not tell


# The runner's parts


def test_the_runner_stands_alone():
    """It runs where this package is not: Python 3.10, and no import but of what the official code needs too."""
    source = Path(official.__file__).read_text(encoding="utf8")
    tree = ast.parse(source, feature_version=(3, 10))
    top = {"accelerate", "PIL", "safetensors", "torch", "data", "modeling", "inferencer"}
    for node in ast.walk(tree):
        names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module]
        for name in names:
            assert name.split(".")[0] in top | sys.stdlib_module_names, name
    assert "helpers" not in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("causal", [False, True])
def test_attention_without_flash_attn_is_attention(causal):
    """Three packed sequences, grouped heads; a causal mask ends at the last key."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = [2, 1, 5], [7, 4, 5]
    q, k, v = (torch.randn(sum(n), heads, 8, generator=generator) for n, heads in ((queries, 6), (keys, 2), (keys, 2)))
    starts = [torch.tensor([0, *np.cumsum(n)], dtype=torch.int32) for n in (queries, keys)]
    made = official.packed_attention(q, k, v, *starts, max(queries), max(keys), causal=causal)
    row = 0
    for count, seen, begin in zip(queries, keys, starts[1].tolist(), strict=False):
        for index in range(count):
            end = begin + (seen - count + index + 1 if causal else seen)
            for head in range(6):
                weights = (k[begin:end, head // 3] @ q[row, head] / 8**0.5).softmax(0)
                torch.testing.assert_close(made[row, head], weights @ v[begin:end, head // 3])
            row += 1


def test_bfloat16_means_float32_in_the_checkout_alone(tmp_path, monkeypatch):
    (tmp_path / "inside_verify.py").write_text(
        "import torch\ndef kind(): return torch.bfloat16, torch.int8, torch.nn\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import inside_verify

    official.compute_in_float32(str(tmp_path))
    assert inside_verify.kind() == (torch.float32, torch.int8, torch.nn)
    assert torch.bfloat16 is not torch.float32 and works.torch is torch


def test_the_second_of_two_calls_is_timed():
    calls = []
    result, seconds, peak = official.timed(lambda: calls.append(None) or len(calls), torch.device("cpu"))
    assert result == 2 and seconds >= 0 and peak > 10**7


# Works and exchange


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.endswith(".noise")])
def test_the_noise_is_the_reference_noise(config, name):
    case = name.removesuffix(".noise")
    torch.testing.assert_close(
        works.noise_of(exchange.read_reference()[0], case, config), EXPECTED[name], rtol=0, atol=0
    )


def test_the_works_fit_the_model():
    made = works.drawn_works(RELEASED, Sizes(10, 512, 16))
    assert made.pictures["scene"].size == (512, 384)
    assert made.cases["draw"]["options"]["image_shapes"] == [384, 512]
    assert made.cases["und_scene"]["max_length"] == 17  # the official count has the start token
    assert {official.kind(name) for name in made.cases} == {"vit", "vae", "prefill", "und", "draw"}
    with pytest.raises(ValueError, match="at most 1024"):
        works.drawn_works(RELEASED, Sizes(10, 1040, 16))


def test_what_is_saved_is_what_is_read(tmp_path):
    file = tmp_path / "vectors.safetensors"
    pictures = {"a": Image.new("RGBA", (3, 2), (1, 2, 3, 4)), "b": Image.new("L", (2, 2), 7)}
    given = Works({"vit_a": {"image": "a"}}, pictures)
    vectors = Vectors({"vit_a.features": torch.arange(6.0)}, {"weights": "fp32"})
    checkpoint = exchange.Checkpoint({"ema.safetensors": "0", "ae.safetensors": "1"}, {"config.json": None})
    exchange.save(file, given, vectors, checkpoint)
    read, found, same = exchange.read(file)
    assert read.cases == given.cases and found.facts == vectors.facts and same == checkpoint
    assert torch.equal(found.tensors["vit_a.features"], torch.arange(6.0)) and len(found.tensors) == 1
    assert read.picture("img:a").getpixel((2, 1)) == (1, 2, 3, 4) and read.picture("b").getpixel((0, 0)) == (7, 7, 7)


# The comparison


def rules(weights="fp32", device="cpu", **options):
    case = {"inputs": ["x"], "seed": 1, "options": {"cfg_text_scale": 1.0, **options}}
    facts = {**FACTS, "weights": weights, "device_type": device}
    return Rules(Works({"draw": case, "vit_a": {}, "und_a": {}, "vae_a": {}}, {}), facts, FACTS)


def test_the_tolerance_follows_depth_and_guidance():
    assert rules().tolerance("draw", "latent") == FLOAT32 == 2e-4
    assert rules("bf16").tolerance("draw", "noise") == rules("bf16").tolerance("vit_a", "position_ids") == 0
    assert rules("bf16").tolerance("vit_a", "features") == pytest.approx(2**-7 * math.sqrt(26))
    assert rules("bf16").tolerance("und_a", "logits") == pytest.approx(2**-7 * math.sqrt(54))
    guided = rules("bf16", cfg_text_scale=4.0, cfg_img_scale=2.0).tolerance("draw", "latent")
    assert guided == pytest.approx(2**-7 * math.sqrt(54) * 2 * math.sqrt(5))
    assert rules("bf16").tolerance("vae_a", "decoded") == FLOAT32  # the autoencoder stays in float32
    assert rules(device="cuda").tolerance("vae_a", "decoded") == pytest.approx(2**-10 * math.sqrt(30))


def test_distances():
    its = torch.tensor([1.0, -4.0, 2.0])
    assert distance(its + torch.tensor([0.0, 0.0, 0.5]), its) == (0.5, 0.125)
    assert distance(its * math.nan, its) == (math.inf, math.inf)
    assert distance(torch.zeros(2), torch.zeros(2)) == (0, 0)
    assert distance(torch.ones(2), torch.zeros(2)) == (1, math.inf)


def row(made, its, mine, **more):
    """The row of one field of the case `made` belongs to."""
    name, rule = made
    return rule.row(name, {name: its, **more}, {name: mine})


def test_another_shape_is_not_within():
    found = row(("vit_a.features", rules("bf16")), torch.zeros(2, 3), torch.zeros(3, 2))
    assert not found.within and found.note == "shape [3, 2], not [2, 3]"


@pytest.mark.parametrize(
    ("mine", "weights", "gap", "within", "note"),
    [
        ([9, 1, 2], "fp32", 0.0, True, "all 3 equal"),
        ([9, 1, 3], "fp32", 0.0, False, "2 of 3 equal"),  # float32 has no ties to part at
        ([9, 1, 3], "bf16", 0.1, True, "2 of 3 equal, then the logits of a near tie"),
        ([9, 1, 3], "bf16", 5.0, False, "2 of 3 equal"),
        ([9, 1], "bf16", 0.0, False, "2 of 3 equal"),  # an end too early
        ([9, 1, 2, 2], "bf16", 0.0, False, "3 of 3 equal"),
    ],
)
def test_tokens_are_equal_up_to_the_first_difference(mine, weights, gap, within, note):
    logits = torch.full((3, 10), -10.0)
    logits[1, 2], logits[1, 3] = 8.0, 8.0 - gap
    made = ("und_a.tokens", rules(weights))
    found = row(made, torch.tensor([9, 1, 2]), torch.tensor(mine), **{"und_a.logits": logits})
    assert found.within is within and found.note.startswith(note)


def test_pictures_may_differ_by_one_level_in_few_values():
    its = torch.full((10, 20, 3), 100, dtype=torch.uint8)
    few, many, far = its.clone(), its.clone(), its.clone()
    few[0, 0] += 1
    many[0] += 1
    far[0, 0, 0] += 2
    made = ("draw.image", rules())
    assert [row(made, its, mine).within for mine in (its, few, many, far)] == [True, True, False, False]
    assert row(made, its, its).note.startswith("the same picture")
    # In bfloat16 by a quarter of the latents' 2^-7 * sqrt(54) = 5.7 %, which is 3.7 of 255 levels.
    made = ("draw.image", rules("bf16"))
    assert row(made, its, its + 3).within and not row(made, its, its + 4).within
    assert row(made, its, its + 3).note == "PSNR 38.6 dB"


def test_what_only_the_other_side_has_is_no_comparison():
    known = Works({"vit_a": {"image": "a"}}, {})
    theirs = Vectors({"vit_a.features": torch.zeros(1), "vit_a.depth": torch.zeros(1)}, FACTS)
    with pytest.raises(ValueError, match="vit_a.depth: the other side has these"):
        compare(known, theirs, Vectors({"vit_a.features": torch.zeros(1)}, FACTS))
    with pytest.raises(ValueError, match="nothing to compare"):
        compare(known, Vectors({}, FACTS), Vectors({}, FACTS))
