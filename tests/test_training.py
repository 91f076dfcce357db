"""Training sees what inference sees: the packed step against contexts, and a few real steps on the CPU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Qwen2Tokenizer

from helpers.bagel.autoencoder import Autoencoder
from helpers.bagel.flow import _Branch, _Forwards
from helpers.bagel.images import to_picture, to_pixels, unpatchify
from helpers.bagel.text import TextCodec
from helpers.pipeline import load_bagel
from helpers.tiny import batches, train
from helpers.tiny.team import Team

TOKENIZER = Path(__file__).parent / "reference" / "checkpoint"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def packed():
    """One step of the smallest mixture, nothing dropped: (joint, tasks after the decoder, batches)."""
    codec = TextCodec(Qwen2Tokenizer.from_pretrained(TOKENIZER))
    recipe = train.Recipe(batch_scale=0.001, steps=1)
    config = train.tiny_config(len(codec.tokenizer))
    torch.manual_seed(0)
    model = train.new_model(config, codec, 0, CPU)
    torch.nn.init.normal_(model.llm2vae.weight, std=0.1)
    for name, parameter in model.named_parameters():  # experts that differ
        if "_moe_gen" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    widths = batches.text_widths(codec, recipe.mixture(), 30)
    joint = train.Joint(model, Autoencoder(config.autoencoder).eval(), recipe, widths, recipe.mixture())
    for layout in joint.layouts:
        layout.drop = torch.zeros_like(layout.drop)
    seen = []
    joint._text_loss = lambda tasks: seen.extend(tasks)
    joint._flow_loss = lambda tasks: None
    step = batches.StepBatches(codec, recipe.mixture(), widths, 1, 0)[0]
    with torch.no_grad():
        joint(step, torch.Generator().manual_seed(0))
    return joint, seen, step


def hidden_in_context(joint, task):
    """The same sample through contexts, segment by segment: [(und hidden states, gen hidden states or None)]."""
    model, found = joint.model, []
    decoder = model.language_model.model
    original = type(decoder).forward
    context = model.new_context(1, 2000, 100)

    def recording(x, und_tokens, positions, attend):
        hidden = original(decoder, x, und_tokens, positions, attend)
        found.append((hidden[:, :und_tokens], hidden[:, und_tokens:]))
        return hidden

    decoder.forward = recording
    side = lambda n: int(n**0.5)  # noqa: E731
    for segment in task.layout.segments:
        if segment.kind == "text":
            count = task.batch.counts[0, segment.source].item()
            model.append_text(context, [task.batch.ids[segment.source][0, :count].tolist()])
        elif segment.kind == "vae":
            n = side(segment.tokens)
            model.append_latents(context, unpatchify(task.latents[segment.source][:1], n, n, 2))
        elif segment.kind == "vit":
            x = torch.cat([model.embed_markers(1), task.vit[segment.source][:1]], dim=1)
            model._append_block(context, x, x.shape[1])
        else:
            n = side(segment.tokens)
            branch = _Branch(model, context, model.latent_places(n, n), None)
            t = task.times[segment.source][0]
            x = torch.lerp(task.latents[segment.source][:1], task.noise[segment.source][:1], t)
            _Forwards(model, x)([branch], x, t.item())
    del decoder.forward
    return found


@pytest.mark.parametrize("name", ["generate", "reason", "edit_turns", "understand_two", "story", "frames"])
def test_packed_step_equals_contexts(packed, name):
    joint, tasks, _ = packed
    task = next(t for t, kind in zip(tasks, joint.mixture, strict=True) if kind.name == name)
    with torch.no_grad():
        found = hidden_in_context(joint, task)
    starts = zip(task.layout.starts("und_tokens"), task.layout.starts("gen_tokens"), strict=True)
    for (und, gen), (u, g) in zip(found, starts, strict=True):
        torch.testing.assert_close(task.und[:1, u : u + und.shape[1]], und, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(task.gen[:1, g : g + gen.shape[1]], gen, rtol=1e-3, atol=1e-4)


SMALLEST = train.Recipe(autoencoder_steps=2, autoencoder_batch=2, steps=4, warmup=1, batch_scale=0.001)


def progress(folder):
    return json.loads((folder / "progress.json").read_text())["step"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A few real steps on the CPU, in two calls: the first has no time at all and leaves its state."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    assert not train.run(folder, SMALLEST, Team("cpu"), minutes=0, workers=0, compiled=False)
    assert progress(folder) == 0
    autoencoder = (folder / "ae.safetensors").read_bytes()
    assert train.run(folder, SMALLEST, Team("cpu"), minutes=60, workers=0, compiled=False)
    assert (folder / "ae.safetensors").read_bytes() == autoencoder
    return folder


def test_training_starts_on_a_cpu_and_goes_on(trained):
    assert progress(trained) == 4
    rows = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["stage"] == "joint"] == [1, 4]
    assert all(file.stat().st_size < 2**24 for file in trained.iterdir() if file.is_file())


def test_the_trained_folder_is_an_official_one(trained):
    bagel = load_bagel(trained / "checkpoint", weights="fp32", device="cpu", attention="sdpa")
    assert bagel.native_size == (128, 128)
    assert bagel.generate("a red circle", num_timesteps=2).image.size == (128, 128)
    shipped = load_bagel("tiny", weights="fp32", device="cpu", attention="sdpa")
    names = {name: tensor.shape for name, tensor in shipped.model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in bagel.model.state_dict().items()} == names


def test_the_loss_of_a_repeated_step_falls(trained):
    codec = TextCodec(Qwen2Tokenizer.from_pretrained(trained))
    config, recipe = train.tiny_config(len(codec.tokenizer)), replace(SMALLEST, steps=100, lr=3e-3)
    tasks = tuple(task for task in recipe.mixture() if task.name in ("generate", "understand"))
    widths = batches.text_widths(codec, tasks, 30)
    trainer = train.Trainer(recipe, train.new_model(config, codec, 0, CPU), Team("cpu"))
    joint = train.Joint(trainer.model, Autoencoder(config.autoencoder).eval(), recipe, widths, tasks)
    loss = train.LossStep(joint, seed=0)
    step = batches.StepBatches(codec, tasks, widths, 1, 0)[0]
    losses = []
    for _ in range(12):
        losses.append([part.item() for part in loss(step, 0)])
        trainer.update()
    assert losses[-1][0] < 0.7 * losses[0][0]
    assert losses[-1][1] < losses[0][1]


def test_steps_are_made_from_seed_and_number_alone(trained):
    codec = TextCodec(Qwen2Tokenizer.from_pretrained(trained))
    tasks = SMALLEST.mixture()
    widths = batches.text_widths(codec, tasks, 30)
    one, other = (batches.StepBatches(codec, tasks, widths, 9, 0)[5] for _ in range(2))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.tables, b.tables) and all(torch.equal(x, y) for x, y in zip(a.ids, b.ids, strict=True))
    different = batches.StepBatches(codec, tasks, widths, 9, 1)[5]
    assert not torch.equal(one[0].tables, different[0].tables)


def test_resizing_on_the_device_is_what_pillow_does():
    pixels = torch.rand(3, 128, 128) * 2 - 1
    picture = to_picture(pixels)
    expected = to_pixels(picture.resize((126, 126), Image.Resampling.BICUBIC))
    made = train.resize_pixels(to_pixels(picture)[None], train.resize_matrix(128, 126))[0]
    assert (made - expected).abs().max() < 2.5 / 127.5  # Pillow rounds to whole grey levels after each direction
