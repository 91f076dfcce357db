"""Every case of the reference vectors: inputs and outputs of the official algorithm in float32 on a CPU."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from helpers.bagel.config import ResizeRule
from helpers.bagel.flow import timesteps
from helpers.bagel.images import fitted_size, open_picture, resize, to_pixels
from helpers.bagel.text import THINK_TO_ANSWER, THINK_TO_DRAW
from helpers.pipeline import load_bagel

FOLDER = Path(__file__).parent / "reference"
CASES = json.loads((FOLDER / "cases.json").read_text(encoding="utf8"))
EXPECTED = load_file(FOLDER / "expected.safetensors")
DRAWN = [name for name in CASES if f"{name}.noise" in EXPECTED]
WRITTEN = [name for name in CASES if name.startswith("und_")]
PICTURES = ("photo", "tall", "alpha", "big")


@pytest.fixture(scope="module")
def bagel():
    return load_bagel(FOLDER / "checkpoint", weights="fp32", device="cpu", attention="sdpa")


def close(actual, name):
    """The tolerance of the reference: 2e-4 of the largest expected value."""
    expected = EXPECTED[name]
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4 * expected.abs().max().item())


def inputs_of(case):
    return [Image.open(FOLDER / f"{part[4:]}.png") if part.startswith("img:") else part for part in case["inputs"]]


def vae_picture(bagel, name):
    return open_picture(FOLDER / f"{name}.png"), bagel.config


@pytest.mark.parametrize("name", PICTURES)
def test_vit(bagel, name):
    picture, config = vae_picture(bagel, name)
    pixels = to_pixels(resize(picture, config.vit_transform))
    close(pixels, f"vit_{name}.pixels")
    with torch.inference_mode():
        close(bagel.model.vit_model(pixels[None])[0], f"vit_{name}.features")
        close(bagel.model.embed_vit(pixels[None])[0], f"vit_{name}.embeddings")


@pytest.mark.parametrize("name", PICTURES)
def test_autoencoder(bagel, name):
    picture, config = vae_picture(bagel, name)
    pixels = to_pixels(resize(picture, config.vae_transform))
    close(pixels, f"vae_{name}.pixels")
    with torch.inference_mode():
        mean = bagel.autoencoder.encode(pixels[None])
        close(mean, f"vae_{name}.latent_mean")
        close(bagel.autoencoder.decode(mean), f"vae_{name}.decoded")


def test_resize_table():
    rows = json.loads((FOLDER / "resize_table.json").read_text())
    assert len(rows) == 60
    for row in rows:
        size = row["height"], row["width"]
        assert fitted_size(*size, ResizeRule(1024, 512, 16)) == tuple(row["vae_hw"]), row
        assert fitted_size(*size, ResizeRule(980, 224, 14)) == tuple(row["vit_hw"]), row


def test_schedule():
    for name in [n for n in EXPECTED if n.startswith("schedule.")]:
        count, shift = name.removeprefix("schedule.n").split("_s")
        torch.testing.assert_close(timesteps(int(count), float(shift)), EXPECTED[name])


def test_think_prompts_and_transforms(bagel):
    assert CASES["_think"] == {"vlm": THINK_TO_ANSWER, "gen": THINK_TO_DRAW}
    for name, rule in (("vae", bagel.config.vae_transform), ("vit", bagel.config.vit_transform)):
        expected = CASES["_transforms"][name]
        assert rule == ResizeRule(expected["max"], expected["min"], expected["stride"])


def test_tokenizer(bagel):
    codec, special = bagel.codec, CASES["_tokenizer"]["special"]
    assert (codec.start, codec.end) == (special["bos_token_id"], special["eos_token_id"])
    assert codec.image_markers == (special["start_of_image"], special["end_of_image"])
    for row in CASES["_tokenizer"]["rows"]:
        assert codec.encode(row["text"]) == [codec.start, *row["ids"], codec.end]


class Spy:
    """Watches one call from outside: the branches when denoising starts, guided velocities, logits."""

    def __init__(self, monkeypatch):
        import helpers.bagel.session as session

        self.counts, self.positions, self.noise, self.latents, self.times = [], [], None, [], []
        original = session.denoise

        def denoise(model, noise, grid, branches, settings, on_step=None):
            # Where no context of its own was needed, the image branch is the conditional one.
            contexts = [branches.conditional, branches.text, branches.image or branches.conditional]
            self.counts = [context.tokens[0] for context in contexts]
            self.positions = [context.positions[0] for context in contexts]
            self.noise = noise[0]
            self.times = timesteps(settings.num_timesteps, settings.timestep_shift)
            self.latents = [noise]
            return original(model, noise, grid, branches, settings, lambda s, t, x: self.latents.append(x))

        monkeypatch.setattr(session, "denoise", denoise)

    def velocity(self, step):
        step = step % (len(self.latents) - 1)
        return ((self.latents[step] - self.latents[step + 1]) / (self.times[step] - self.times[step + 1]))[0]


@pytest.mark.parametrize("name", DRAWN)
def test_drawing(bagel, name, monkeypatch):
    case, spy = CASES[name], Spy(monkeypatch)
    options = dict(case["options"])
    height, width = options.pop("image_shapes", (None, None))
    options["step_cache"] = "taylorseer" if options.pop("enable_taylorseer", False) else None
    if "max_think_token_n" in options:
        options["max_think_tokens"] = options.pop("max_think_token_n") - 1
    posterior = "sample" if name.endswith("sampled_posterior") else "mean"
    (result,) = bagel.interleave(
        inputs_of(case), make=["image"], seed=case["seed"], height=height, width=width, posterior=posterior, **options
    )
    image_branch = slice(0, 3 if options["cfg_img_scale"] > 1 else 2)
    assert spy.counts[image_branch] == case["context_tokens"][image_branch]
    assert spy.positions[image_branch] == case["rope_positions"][image_branch]
    assert [result.thought] == case["text"] or case["text"] == []
    torch.testing.assert_close(spy.noise, EXPECTED[f"{name}.noise"], rtol=0, atol=0)
    close(spy.velocity(0), f"{name}.first_velocity")
    close(spy.velocity(-1), f"{name}.last_velocity")
    close(result.latent, f"{name}.latent")
    expected = EXPECTED[f"{name}.image"].numpy().astype(int)
    difference = np.abs(np.array(result.image).astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() <= 0.005


@pytest.mark.parametrize("name", WRITTEN)
def test_writing(bagel, name, monkeypatch):
    case, expected = CASES[name], EXPECTED[f"{name}.logits"]
    logits, append = [], bagel.model.append_token

    def recording(context, ids):
        if not logits:
            assert (context.tokens[0], context.positions[0]) == (case["context_tokens"], case["rope_position"])
        logits.append(append(context, ids)[0])
        return logits[-1][None]

    monkeypatch.setattr(bagel.model, "append_token", recording)
    *images, question = inputs_of(case)
    result = bagel.understand(images, question, think=case["think"], max_new_tokens=case["max_length"] - 1)
    made = torch.stack(logits)
    torch.testing.assert_close(made, expected[: len(made)], rtol=0, atol=2e-4 * expected.abs().max().item())
    assert [bagel.codec.start, *result.token_ids] == EXPECTED[f"{name}.tokens"].tolist()
    assert result.text == case["text"]
