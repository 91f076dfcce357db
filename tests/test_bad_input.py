"""Bad input gets an error that names the value, the limit and the cure."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers import checkpoint
from helpers.pipeline import load_bagel

FOLDER = Path(__file__).parent / "reference"
QUIET = {"weights": "fp32", "device": "cpu", "attention": "sdpa"}


@pytest.fixture(scope="module")
def bagel():
    return load_bagel(FOLDER / "checkpoint", **QUIET)


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(FOLDER / "checkpoint", tmp_path / "model"))


@pytest.mark.parametrize(
    "name", ["ema.safetensors", "ae.safetensors", "llm_config.json", "vit_config.json", "tokenizer_config.json"]
)
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_bagel(folder, **QUIET)


@pytest.mark.parametrize("name", ["ema.safetensors", "ae.safetensors"])
def test_truncated_weights(folder, name):
    file = folder / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{name}.*truncated or damaged"):
        load_bagel(folder, **QUIET)


def test_broken_json(folder):
    (folder / "llm_config.json").write_text("{")
    with pytest.raises(ValueError, match="no valid JSON"):
        load_bagel(folder, **QUIET)
    (folder / "llm_config.json").write_text('{"hidden_size": 64}')
    with pytest.raises(ValueError, match="lacks intermediate_size"):
        load_bagel(folder, **QUIET)


def test_other_tensors(folder):
    tensors = load_file(folder / "ema.safetensors")
    tensors["surprise"] = tensors.pop("llm2vae.bias")
    tensors["vae2llm.bias"] = torch.zeros(7)
    save_file(tensors, folder / "ema.safetensors")
    with pytest.raises(ValueError, match=r"missing: llm2vae.bias.*unexpected: surprise.*vae2llm.bias \[7\] instead of"):
        load_bagel(folder, **QUIET)


def test_no_such_folder():
    with pytest.raises(FileNotFoundError, match="neither 'tiny' nor a folder"):
        load_bagel("no/such/folder")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weights", "int3", "auto, bf16, fp32"),
        ("attention", "fast", "auto, sdpa"),
        ("attention", "flash_attn", "needs a CUDA card"),
        ("device", "tpu", "'auto', 'cpu', 'cuda'"),
    ],
)
def test_unknown_choices(name, value, message):
    with pytest.raises(ValueError, match=message):
        load_bagel(FOLDER / "checkpoint", **{**QUIET, name: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here")
def test_missing_card():
    with pytest.raises(ValueError, match="sees 0 CUDA cards"):
        load_bagel(FOLDER / "checkpoint", device="cuda")


def test_too_little_memory(monkeypatch):
    choices = checkpoint.Choices(torch.device("cpu"), "fp32", "sdpa", "")
    with pytest.raises(MemoryError, match=r"need 1000000.0 GB as fp32 on cpu; .* GB are free: .*bf16"):
        checkpoint.check_memory(10**15, choices)


def test_no_picture(bagel, tmp_path):
    (tmp_path / "words.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"words.png is no picture"):
        bagel.understand(tmp_path / "words.png", "what?")
    with pytest.raises(FileNotFoundError, match=r"No picture at"):
        bagel.edit(str(tmp_path / "none.png"), "what?")
    whole = (FOLDER / "big.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged picture"):
        bagel.understand(tmp_path / "half.png", "what?")
    with pytest.raises(TypeError, match="not int"):
        bagel.understand(3, "what?")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 100}, r"height 100 must be a multiple of 16.*try 96"),
        ({"width": 4096}, r"width 4096 must be a multiple of 16, at most 128 .*try 128"),
        ({"height": 0}, r"height 0 must be"),
        ({"num_timesteps": 1}, r"num_timesteps 1 must be at least 2"),
        ({"cfg_renorm_type": "local"}, r"'local' must be one of global, channel, text_channel"),
        ({"timestep_shift": 0}, r"timestep_shift 0 must be above 0"),
        ({"cfg_renorm_min": 2}, r"cfg_renorm_min 2"),
        ({"cfg_interval": (1, 0)}, r"cfg_interval \(1, 0\)"),
        ({"step_cache": "magic"}, r"step_cache 'magic'"),
        ({"seed": [1, 2]}, r"2 seeds for a batch of 1"),
        ({"think": True, "max_think_tokens": 0}, r"max_think_tokens 0 must be at least 1"),
    ],
)
def test_settings(bagel, options, message):
    with pytest.raises(ValueError, match=message):
        bagel.generate("a red cat", **options)


def test_texts_and_lists(bagel):
    with pytest.raises(ValueError, match="empty text"):
        bagel.generate("  ")
    with pytest.raises(ValueError, match="nothing to work on"):
        bagel.interleave([], make=["text"])
    with pytest.raises(ValueError, match="must be a sequence of 'text' and 'image'"):
        bagel.interleave(["x"], make=["video"])
    with pytest.raises(ValueError, match=r"lengths \[2, 3\]"):
        bagel.interleave([["a", "b"], ["a", "b", "c"]], make=["text"])
    with pytest.raises(TypeError, match="mixes texts and pictures"):
        bagel.interleave([["a", Image.new("RGB", (64, 64))]], make=["text"])
    with pytest.raises(ValueError, match="3 pictures for a batch of 2"):
        bagel.understand([Image.new("RGB", (64, 64))] * 3, ["a", "b"])
    with pytest.raises(ValueError, match="one size"):
        bagel.edit([Image.new("RGB", (64, 64)), Image.new("RGB", (128, 64))], "a")
    with pytest.raises(ValueError, match="prompt that describes the clip"):
        bagel.predict_frames([])
    with pytest.raises(ValueError, match="count 0"):
        bagel.predict_frames([], count=0, prompt="a ball")
    with pytest.raises(ValueError, match="'median'"):
        bagel.edit(Image.new("RGB", (64, 64)), "a", posterior="median")


def test_sampling_settings(bagel):
    for name, value in (("temperature", 0), ("top_p", 0), ("top_p", 2)):
        with pytest.raises(ValueError, match=f"{name} {value}"):
            bagel.understand(None, "what?", do_sample=True, **{name: value})
    with pytest.raises(ValueError, match="max_new_tokens 0"):
        bagel.understand(None, "what?", max_new_tokens=0)


def test_context_too_long(bagel):
    with pytest.raises(ValueError, match=r"context would hold .* the model was built for 4096"):
        bagel.understand(None, "a " * 5000, max_new_tokens=2)
