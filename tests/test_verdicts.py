"""Verdicts in words and numbers, on pictures whose truth is known."""

from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.tiny import clips
from helpers.tiny.verdicts import frame_errors, in_words, tally
from helpers.tiny.wording import describe
from helpers.tiny.world import draw, random_scene

GIVEN, LATER = 3, 10


@pytest.mark.parametrize("seed", range(5))
def test_a_drawn_scene_reads_as_its_description(seed):
    scene = random_scene(Random(seed))
    assert in_words(draw([scene])[0]) == describe(scene)


def test_what_is_no_thing_is_said():
    picture = Image.new("RGB", (128, 128), "white")
    assert in_words(picture) == "nothing, on a white background"
    picture.paste((255, 0, 0), (20, 40, 110, 44))
    assert in_words(picture) == "nothing, on a white background; 1 unreadable"


@pytest.fixture(scope="module")
def films():
    chosen = clips.test_clips(4, 3, GIVEN + LATER)
    return chosen, [list(film) for film in clips.draw_clips(chosen)]


def test_true_frames_have_no_error_and_the_baselines_do(films):
    chosen, drawn = films
    errors = frame_errors(chosen, [film[GIVEN:] for film in drawn], GIVEN)
    assert {name: values.shape for name, values in errors.items()} == dict.fromkeys(
        ("model", "last frame copied", "straight line"), (LATER,)
    )
    assert errors["model"].max() < 0.3
    assert errors["last frame copied"].mean() > 3
    assert errors["straight line"][-1] > errors["straight line"][0]


def test_copied_frames_have_the_error_of_the_copied_baseline(films):
    chosen, drawn = films
    errors = frame_errors(chosen, [[film[GIVEN - 1]] * LATER for film in drawn], GIVEN)
    np.testing.assert_allclose(errors["model"], errors["last frame copied"], atol=0.3)


def test_a_lost_ball_is_a_whole_side_away(films):
    chosen, _ = films
    errors = frame_errors(chosen[:1], [torch.ones(LATER, 3, 64, 64)], GIVEN)
    assert (errors["model"] == 64).all()


def test_tally_counts_groups_and_all():
    counted = tally(["b", "a", "b"], tiny_model=[True, False, True], blind=[False, False, True])
    assert counted.header == ("group", "samples", "tiny model", "blind")
    assert counted.rows == (("b", "2", "2", "1"), ("a", "1", "0", "0"), ("all", "3", "2", "1"))
