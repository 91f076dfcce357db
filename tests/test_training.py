"""Training sees what inference sees: the packed step against contexts, and a few real steps on the CPU."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen2Tokenizer

from helpers.bagel.autoencoder import Autoencoder
from helpers.bagel.flow import _Branch
from helpers.bagel.images import unpatchify
from helpers.bagel.text import TextCodec
from helpers.tiny import batches, train

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
    joint = train.Joint(model, Autoencoder(config.autoencoder).eval(), recipe, widths)
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
            branch._hidden(x, t.item())
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
