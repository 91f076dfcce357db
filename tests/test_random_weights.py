"""Models of the right sizes with random weights, for measuring."""

from dataclasses import replace

import pytest
import torch

from helpers import checkpoint
from helpers.bagel.config import RELEASED
from helpers.bagel.layers import linears
from helpers.choices import choose
from helpers.pipeline import TINY, BagelPipeline, load_bagel

FLOAT = {"weights": "fp32", "device": "cpu", "attention": "sdpa"}


@pytest.fixture(scope="module")
def bagel():
    return load_bagel("random-tiny", **FLOAT)


def test_every_verb_runs_on_noise(bagel):
    picture = bagel.generate("a red circle", num_timesteps=3).image
    assert picture.size == (128, 128)
    assert bagel.edit(picture, "make it blue", num_timesteps=3).image.size == (128, 128)
    answer = bagel.understand(picture, "what?", max_new_tokens=5)
    assert 0 < len(answer.token_ids) <= 5


def test_sizes_are_those_of_the_model_and_weights_repeat(bagel):
    trained = load_bagel("tiny", **FLOAT)
    for one, other in ((bagel.model, trained.model), (bagel.autoencoder, trained.autoencoder)):
        shapes = {name: tensor.shape for name, tensor in one.state_dict().items()}
        assert shapes == {name: tensor.shape for name, tensor in other.state_dict().items()}
    again = load_bagel("random-tiny", **FLOAT)
    weight = "language_model.model.layers.0.mlp.up_proj.weight"
    assert torch.equal(bagel.model.state_dict()[weight], again.model.state_dict()[weight])
    assert not torch.equal(bagel.model.state_dict()[weight], trained.model.state_dict()[weight])


def test_activations_neither_grow_nor_vanish(bagel):
    """Through the eight layers of the tiny decoder, from tokens of deviation 1."""
    model = bagel.model
    tokens = torch.randn(1, 64, model.config.decoder.hidden_size)
    context = model.new_context(1, 0, 64)
    hidden = model.language_model.model(tokens, 2, context.block_positions(64), context.attend_beside(model.kernel, 64))
    assert 0.5 < hidden.std() < 10


def test_the_large_one_needs_its_real_memory(monkeypatch):
    """29.2 GB of weights and 0.3 GB of the autoencoder: checked before anything is made."""
    asked = []

    def refuse(needed, weights, device):
        asked.append(needed)
        raise MemoryError

    monkeypatch.setattr(checkpoint, "check_room", refuse)
    with pytest.raises(MemoryError):
        load_bagel("random-7b", weights="bf16", device="cpu", attention="sdpa")
    assert asked[0] == pytest.approx(29.21e9 + 0.335e9, rel=2e-3)


def test_the_tokenizer_fits_the_vocabulary():
    codec = checkpoint.TextCodec(checkpoint._tokenizer(TINY))
    assert len(codec.tokenizer) <= RELEASED.decoder.vocab_size
    assert codec.decode([RELEASED.decoder.vocab_size - 1, *codec.encode("a")[1:2]]) == "a"


def test_layers_over_one_input_lie_together_and_compute_the_same(bagel):
    """Loaded weights are views of one block: no second copy, and one product gives what several gave."""
    layer = bagel.model.language_model.model.layers[3]
    for part in (layer.self_attn, layer.mlp, layer.mlp_moe_gen):
        for group in part.over_one_input():
            storages = {one.weight.untyped_storage().data_ptr() for one in group}
            assert storages == {group[0].joined[0].untyped_storage().data_ptr()}
            x = torch.randn(2, 5, group[0].in_features)
            for made, one in zip(linears(x, group), group, strict=True):
                torch.testing.assert_close(made, one(x))
    fresh, x = torch.nn.Linear(4, 3), torch.randn(2, 4)
    assert torch.equal(linears(x, [fresh])[0], fresh(x))


def test_a_model_takes_no_more_memory_than_its_weights(bagel):
    joined = [part for module in bagel.model.modules() for part in getattr(module, "joined", ()) if part is not None]
    storages = [tensor.untyped_storage() for tensor in (*bagel.model.parameters(), *joined)]
    held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    assert held == sum(weight.nbytes for weight in bagel.model.parameters())


def test_every_format_rounds_the_same_random_weights(bagel):
    rounded = load_bagel("random-tiny", weights="fp8", device="cpu")
    exact, layers = (one.model.language_model.model for one in (bagel, rounded))
    assert torch.equal(exact.embed_tokens.weight, layers.embed_tokens.weight)
    group = layers.layers[2].mlp_moe_gen.gate_proj.joined
    expected = exact.layers[2].mlp_moe_gen.gate_proj.joined.weight
    assert ((group.weight.float() * group.scale[:, None] - expected).abs() <= expected.abs() / 16 + 1e-3).all()


def test_texts_of_random_weights_have_words_and_their_full_length(bagel):
    """Also where the model knows far more tokens than the tokenizer, as the large one does."""
    config = replace(bagel.config, decoder=replace(bagel.config.decoder, vocab_size=20_000))
    parts = checkpoint.load_random(config, TINY, choose("cpu", "fp32", "sdpa"))
    for question in ("what is it?", "where?", "a red circle"):
        answer = BagelPipeline(parts, "large", "fp32").understand(None, question, max_new_tokens=12)
        assert len(answer.token_ids) == 12 and answer.text.strip()
