"""Watching the model changes nothing, and what it reports is what happened."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.pipeline import load_bagel
from helpers.watch import DenoisingPath, Looks, look_at, routing, routing_table, watching

FOLDER = Path(__file__).parent / "reference"
PHOTO = FOLDER / "photo.png"  # 96 x 64: 4 x 6 latent tokens, 5 x 7 ViT patches
QUESTION = "what color is the sky?"


@pytest.fixture(scope="module")
def bagel():
    return load_bagel(FOLDER / "checkpoint", weights="fp32", device="cpu", attention="sdpa")


@pytest.fixture(scope="module")
def looks(bagel):
    return look_at(bagel, PHOTO, QUESTION, max_new_tokens=4)


def test_an_edit_takes_both_experts(bagel):
    with watching(bagel) as passes:
        bagel.edit(PHOTO, "make it red", num_timesteps=3)
    text = len(bagel.codec.encode("make it red"))
    seen = [(one.kind, one.understanding, one.generation, one.first, one.last, n) for one, n in routing(passes)]
    assert seen == [
        ("latents", 2, 24, 0, 0, 1),
        ("ViT tokens", 37, 0, 1, 1, 1),
        ("text", text, 0, 2, 1 + text, 1),
        ("text", text, 0, 0, text - 1, 1),
        ("latents", 2, 24, 2 + text, 2 + text, 2),
        ("latents", 2, 24, 2, 2, 2),
        ("latents", 2, 24, text, text, 2),
    ]
    keys = [one.keys for one, _ in routing(passes)]
    assert keys == [26, 63, 63 + text, text, 26 + 63 + text, 26 + 63, 26 + text]


def test_a_question_takes_one_expert_only(bagel):
    with watching(bagel) as passes:
        bagel.understand(PHOTO, QUESTION, max_new_tokens=2)
    assert sum(one.generation for one in passes) == 0
    assert len(routing_table(passes).rows) == len(passes)


def test_watching_changes_nothing_and_ends(bagel):
    plain = bagel.generate("a cat", num_timesteps=3).latent
    kernel = bagel.model.kernel
    with watching(bagel) as passes:
        watched = bagel.generate("a cat", num_timesteps=3).latent
    count = len(passes)
    bagel.generate("a cat", num_timesteps=2)
    torch.testing.assert_close(watched, plain, rtol=0, atol=0)
    assert bagel.model.kernel is kernel
    assert len(passes) == count


def test_an_error_inside_ends_the_watching(bagel):
    kernel = bagel.model.kernel
    with pytest.raises(ValueError, match="empty text"), watching(bagel):
        bagel.generate(" ")
    assert bagel.model.kernel is kernel


def test_attention_agrees_with_the_kernel(bagel):
    """Weights that average the same values as the model's own kernel does are its weights."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, heads, 16, generator=generator) for n, heads in ((3, 4), (8, 2), (8, 2)))
    v = v[:, :, :1].expand(-1, -1, 2, -1)  # the same values in every head, so that the mean weight is all that counts
    from helpers.watch import _weights

    expected = bagel.model.kernel(q, k, v, True, None).mean(2)[0]
    torch.testing.assert_close(_weights(q[0], k[0]) @ v[0, :, 0], expected)


def test_looks_have_a_map_for_every_token(bagel, looks):
    question = bagel.codec.encode(QUESTION)
    assert looks.maps.shape == (3, len(question) + looks.answer, 5, 7)
    assert len(looks.words) == looks.maps.shape[1]
    assert looks.words[-looks.answer] == "<|im_start|>"
    assert "".join(looks.words[1 : len(question) - 1]) == QUESTION


def test_maps_leave_the_two_markers_out(bagel, looks):
    with watching(bagel) as passes:
        bagel.understand(PHOTO, QUESTION, max_new_tokens=4)
    question = passes[1].layers[2][:, 2:37].unflatten(-1, (5, 7))
    torch.testing.assert_close(looks.maps[2, : len(question)], question, rtol=0, atol=0)


def test_the_brightest_patch_is_found():
    maps = torch.zeros(2, 1, 2, 4)
    maps[1, 0, 1, 3] = 1
    assert Looks(Image.new("RGB", (8, 4)), ["a"], maps, 1).brightest(1, 0) == (7 / 8, 3 / 4)


def test_attention_on_the_picture_is_a_part_of_the_whole(looks):
    share = looks.share()
    assert (share > 0).all() and (share < 1).all()


def test_the_path_ends_in_the_picture(bagel):
    path = DenoisingPath()
    result = bagel.generate("a cat", num_timesteps=5, height=64, width=96, on_step=path)
    pictures, guesses = path.pictures(bagel, (64, 96), [0, 3]), path.guesses(bagel, (64, 96), [1, 3])
    assert len(path.times) == 4 and path.times[-1] == 0
    for last in (pictures[-1], guesses[-1]):
        assert np.array_equal(np.array(last), np.array(result.image))
    assert not np.array_equal(np.array(pictures[0]), np.array(result.image))


def test_a_guess_needs_a_step_before_it(bagel):
    path = DenoisingPath()
    bagel.generate("a cat", num_timesteps=3, height=64, width=64, on_step=path)
    with pytest.raises(ValueError, match="step 0 must be at least 1"):
        path.guesses(bagel, (64, 64), [0])


def test_a_straight_path_is_guessed_at_once(bagel):
    """On x_t = (1 - t) x_0 + t noise every guess is x_0 itself."""
    generator = torch.Generator().manual_seed(0)
    start, noise = torch.randn(2, 1, 16, 64, generator=generator).unbind()
    path = DenoisingPath()
    for step, t in enumerate((0.9, 0.5, 0.0)):
        path(step, t, (1 - t) * start + t * noise)
    early, late = path.guesses(bagel, (64, 64), [1, 2])
    assert isinstance(early, Image.Image)
    assert np.abs(np.array(early, int) - np.array(late, int)).max() <= 1
