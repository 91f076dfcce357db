"""Bad input gets an error that names the value, the limit and the cure."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers import choices, memory
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


def test_a_tokenizer_without_words_is_refused(folder):
    """It would load, and encode every text as nothing."""
    (folder / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"merges.txt is missing"):
        load_bagel(folder, **QUIET)
    (folder / "vocab.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"vocab.json is missing: fetch the tokenizer"):
        load_bagel(folder, **QUIET)


@pytest.mark.parametrize(("name", "content"), [("vocab.json", "{"), ("tokenizer_config.json", "{")])
def test_a_damaged_tokenizer_is_refused(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer's files in .* cannot be read"):
        load_bagel(folder, **QUIET)


def test_json_of_the_wrong_kind(folder):
    (folder / "config.json").write_text("null")
    with pytest.raises(ValueError, match=r"config.json holds NoneType instead of names and values"):
        load_bagel(folder, **QUIET)
    (folder / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="no valid JSON"):
        load_bagel(folder, **QUIET)


@pytest.mark.parametrize("value", ["64", 0, True])
def test_sizes_are_numbers(folder, value):
    file = folder / "llm_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_size": value}))
    with pytest.raises(ValueError, match=rf"hidden_size is {value!r}, but must be a number above 0"):
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
        ("weights", "int3", "auto, bf16, fp16, fp32"),
        ("attention", "fast", "auto, sdpa"),
        ("attention", "flash_attn", "needs a CUDA card"),
        ("device", "tpu", "'auto', 'cpu', 'cuda'"),
        ("device", None, "device None must be"),
    ],
)
def test_unknown_choices(name, value, message):
    with pytest.raises(ValueError, match=message):
        load_bagel(FOLDER / "checkpoint", **{**QUIET, name: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here")
def test_missing_card():
    with pytest.raises(ValueError, match="sees 0 CUDA cards"):
        load_bagel(FOLDER / "checkpoint", device="cuda")


def test_flash_attn_computes_in_16_bits():
    with pytest.raises(ValueError, match="16 bits, not with weights='fp32': use 'sdpa'"):
        choices._check_attention("flash_attn", torch.device("cuda"), torch.float32)


def test_a_model_is_a_name():
    with pytest.raises(TypeError, match="model None"):
        load_bagel(None)


def test_a_closed_model_says_so():
    closed = load_bagel(FOLDER / "checkpoint", **QUIET)
    closed.close()
    closed.close()
    with pytest.raises(RuntimeError, match="was closed: load it again with load_bagel"):
        closed.generate("a red cat")


def test_memory_of_a_container_counts(monkeypatch):
    monkeypatch.setattr(memory, "main_memory", lambda: (2 * 10**9, 10**9))
    with pytest.raises(MemoryError, match=r"need 1.5 GB as bf16 on cpu; 1.0 of 2.0 GB are free: close other"):
        memory.check_room(15 * 10**8, "bf16", torch.device("cpu"))


def test_too_little_memory():
    with pytest.raises(MemoryError, match=r"need 1000000.0 GB as fp32 on cpu; .* GB are free: .*bf16"):
        memory.check_room(10**15, "fp32", torch.device("cpu"))


@pytest.mark.parametrize(
    "verb",
    [
        lambda bagel: bagel.understand(None, "what?", max_new_tokens=2),
        lambda bagel: bagel.generate("a cat", num_timesteps=2),
        lambda bagel: bagel.predict_frames([], 1, "a cat", num_timesteps=2),
    ],
)
def test_a_verb_that_runs_out_of_memory_says_what_to_change(bagel, monkeypatch, verb):
    monkeypatch.setattr(bagel.model, "new_context", lambda *_sizes: torch.empty(10**15))
    with pytest.raises(MemoryError, match=r"on cpu when it asked for 4000000000000000 bytes more.*smaller") as found:
        verb(bagel)
    # Nothing keeps the frames of the failed call, and with them its tensors, alive.
    assert found.value.__context__ is None and found.value.__cause__ is None


def test_a_card_that_runs_out_of_memory_is_understood():
    said = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity of 24")
    assert memory._wanted(said) == "20.50 GiB"
    assert memory._wanted(RuntimeError("shapes cannot be multiplied")) is None


def test_other_errors_of_a_verb_stay_as_they_are(bagel, monkeypatch):
    def fail(*_sizes):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(bagel.model, "new_context", fail)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        bagel.generate("a cat", num_timesteps=2)


def test_an_answer_ends_where_the_context_is_full(bagel):
    """4,096 tokens in all: the question takes all but a few, and what was written until then comes back."""
    question = "x" * (4096 - 2 - 5)
    result = bagel.understand(None, question, max_new_tokens=1000)
    assert len(result.token_ids) <= 5
    with pytest.raises(ValueError, match="would hold 4097 tokens"):
        bagel.understand(None, "x" * (4096 - 2), max_new_tokens=1000)


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
    with pytest.raises(FileNotFoundError, match="No picture at"):
        bagel.understand(tmp_path, "what?")
    opened = Image.open(FOLDER / "big.png")
    opened.close()
    with pytest.raises(ValueError, match="cannot be read .*open it again"):
        bagel.understand(opened, "what?")
    with pytest.raises(ValueError, match="0 x 5 pixels"):
        bagel.understand(Image.new("RGB", (0, 5)), "what?")
    with pytest.raises(ValueError, match="mode F does not say which of its values is white"):
        bagel.understand(Image.new("F", (8, 8)), "what?")


def test_a_picture_too_large_to_open(bagel, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="too large to open safely .*reduce it first"):
        bagel.understand(FOLDER / "big.png", "what?")


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
        ({"cfg_text_scale": math.nan}, r"cfg_text_scale nan must be a finite number"),
        ({"cfg_img_scale": math.inf}, r"cfg_img_scale inf must be a finite number"),
        ({"timestep_shift": math.nan}, r"timestep_shift nan must be a finite number"),
        ({"cfg_interval": 0.4}, r"cfg_interval 0.4 must be two numbers"),
        ({"cfg_interval": (math.nan, 1)}, r"bound nan must be a finite number"),
        ({"seed": -1}, r"seed -1 must be at least 0"),
        ({"seed": 2**70}, r"seed \d+ must be below 2\*\*63"),
    ],
)
def test_settings(bagel, options, message):
    with pytest.raises(ValueError, match=message):
        bagel.generate("a red cat", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 64.0}, r"height 64.0 \(float\) must be a whole number"),
        ({"width": "64"}, r"width '64' \(str\) must be a whole number, without quotes"),
        ({"num_timesteps": "50"}, r"num_timesteps '50' \(str\)"),
        ({"cfg_text_scale": "4"}, r"cfg_text_scale '4' \(str\) must be a number, without quotes"),
        ({"cfg_renorm_min": None}, r"cfg_renorm_min None"),
        ({"seed": 1.5}, r"seed 1.5 \(float\)"),
        ({"seed": True}, r"seed True"),
        ({"think": True, "max_think_tokens": 2.5}, r"max_think_tokens 2.5"),
    ],
)
def test_settings_of_the_wrong_type(bagel, options, message):
    with pytest.raises(TypeError, match=message):
        bagel.generate("a red cat", **options)


def test_numbers_of_numpy_are_numbers(bagel):
    numbers = {"height": np.int64(16), "width": 16, "seed": np.int64(3), "num_timesteps": np.int64(2)}
    made = bagel.generate("a red cat", **numbers, cfg_text_scale=np.float32(2), cfg_interval=[0, np.float64(1)])
    assert made.seed == 3 and made.image.size == (16, 16)
    assert json.dumps(made.settings)


@pytest.mark.parametrize("wrong", [None, 5, Image.new("RGB", (64, 64)), ["a", 5]])
def test_what_must_be_a_text(bagel, wrong):
    picture = Image.new("RGB", (64, 64))
    with pytest.raises(TypeError, match="prompt must be a text or a list of texts, not"):
        bagel.generate(wrong)
    with pytest.raises(TypeError, match="question must be a text"):
        bagel.understand(picture, wrong)
    with pytest.raises(TypeError, match="instruction must be a text"):
        bagel.edit(picture, wrong)


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
    with pytest.raises(ValueError, match="prompt that describes the clip"):
        bagel.predict_frames([[], []])
    with pytest.raises(ValueError, match="count 0"):
        bagel.predict_frames([], count=0, prompt="a ball")
    with pytest.raises(TypeError, match="count 2.0"):
        bagel.predict_frames([], count=2.0, prompt="a ball")
    with pytest.raises(ValueError, match="every entry must be a list"):
        bagel.predict_frames([Image.new("RGB", (64, 64)), [Image.new("RGB", (64, 64))]])
    with pytest.raises(TypeError, match="inputs must be a list of texts and pictures, not str"):
        bagel.interleave("a red cat", make=["text"])
    for wrong in (None, [["image"]], iter(["image"])):
        with pytest.raises(ValueError, match="must be a sequence of 'text' and 'image'"):
            bagel.interleave(["x"], make=wrong)
    with pytest.raises(ValueError, match="Input 1 holds characters that are no text"):
        bagel.generate("\ud83d")
    with pytest.raises(ValueError, match="'median'"):
        bagel.edit(Image.new("RGB", (64, 64)), "a", posterior="median")


def test_sampling_settings(bagel):
    for name, value in (("temperature", 0), ("top_p", 0), ("top_p", 2)):
        with pytest.raises(ValueError, match=f"{name} {value}"):
            bagel.understand(None, "what?", do_sample=True, **{name: value})
    for name, value in (("temperature", "0.3"), ("top_p", None), ("max_new_tokens", 2.5)):
        with pytest.raises(TypeError, match=f"{name} {value!r}"):
            bagel.understand(None, "what?", do_sample=True, **{name: value})
    with pytest.raises(ValueError, match="max_new_tokens 0"):
        bagel.understand(None, "what?", max_new_tokens=0)


def test_context_too_long(bagel):
    with pytest.raises(ValueError, match=r"context would hold .* the model was built for 4096"):
        bagel.understand(None, "a " * 5000, max_new_tokens=2)


def test_no_memory_is_taken_for_a_text_that_is_too_long(bagel, monkeypatch):
    monkeypatch.setattr(bagel.model, "new_context", lambda *_sizes: pytest.fail("buffers were made"))
    with pytest.raises(ValueError, match=r"would hold 100002 tokens; the model was built for 4096"):
        bagel.generate("x" * 100_000)


def test_a_context_is_never_larger_than_the_model(bagel, monkeypatch):
    sizes, made = [], bagel.model.new_context
    monkeypatch.setattr(bagel.model, "new_context", lambda *size: sizes.append(size) or made(*size))
    bagel.understand(None, ["stop 2814"], max_new_tokens=10**6)
    assert sizes == [(1, 4096, 0)]
