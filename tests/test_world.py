"""The synthetic world: scenes, splits, drawing and clips."""

import math
from itertools import combinations
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from helpers.bagel.images import open_picture
from helpers.tiny import clips, world
from helpers.tiny.world import COLORS, PLACES, SHAPES, Scene, Thing

ROOT = Path(__file__).parents[1]


def scenes(count, seed=0, split="train"):
    rng = Random(seed)
    return [world.random_scene(rng, split=split) for _ in range(count)]


def test_colors_are_far_apart():
    colors = {**COLORS, **world.BACKGROUNDS}
    gaps = {pair: math.dist(colors[pair[0]], colors[pair[1]]) for pair in combinations(colors, 2)}
    assert min(gaps.values()) > 70
    assert min(gap for (one, other), gap in gaps.items() if one in COLORS and other not in COLORS) > 110


def test_splits_are_disjoint_and_hold_the_right_pairs():
    def content(scene):
        return tuple((t.shape, t.color, t.size, t.place) for t in scene.things), scene.background

    train, test = ({content(s) for s in scenes(4000, 1, split)} for split in ("train", "test"))
    assert not train & test
    assert not any(world.held_out(s.things) for split in ("train", "test") for s in scenes(500, 2, split))
    assert all(world.held_out(s.things) for s in scenes(200, 3, "pairs"))
    with pytest.raises(ValueError, match="valid"):
        world.belongs(scenes(1)[0], "valid")


def test_a_scene_belongs_to_one_split_whatever_its_jitter():
    scene = world.make_scene([Thing("star", "red", "small", "top")], "white")
    moved = world.make_scene([Thing("star", "red", "small", "top", 2, -2)], "white")
    assert [world.belongs(scene, s) for s in world.SPLITS] == [world.belongs(moved, s) for s in world.SPLITS]
    assert sum(world.belongs(scene, s) for s in world.SPLITS) == 1


def test_about_an_eighth_is_for_testing():
    rng = Random(5)
    drawn = [
        world.make_scene([world.random_thing(rng, p) for p in world.random_places(rng, 3)], "gray") for _ in range(4000)
    ]
    assert 0.10 < np.mean([world.belongs(scene, "test") for scene in drawn]) < 0.15


def test_scenes_are_checked_and_in_reading_order():
    first, last = Thing("circle", "red", "small", "top left"), Thing("star", "blue", "large", "bottom")
    assert world.make_scene([last, first], "white").things == (first, last)
    with pytest.raises(ValueError, match="2 things at 1 places"):
        world.make_scene([first, first], "white")
    with pytest.raises(ValueError, match="0 things"):
        world.make_scene([], "white")


def test_scenes_use_everything_evenly():
    things = [t for s in scenes(3000) for t in s.things]
    for attribute, names in (("shape", SHAPES), ("color", COLORS), ("place", PLACES), ("size", world.SIZES)):
        counts = [sum(getattr(t, attribute) == name for t in things) for name in names]
        assert min(counts) > 0.75 * len(things) / len(names)


def test_drawing_puts_the_colors_where_the_scene_says():
    drawn = scenes(40, 7, "pairs")
    pictures = ((world.draw(drawn) + 1) * 127.5).permute(0, 2, 3, 1)
    for scene, picture in zip(drawn, pictures, strict=True):
        for thing in scene.things:
            x, y = thing.center
            assert torch.allclose(picture[y + 2, x], torch.tensor(COLORS[thing.color]).float(), atol=0.01)
        taken = {thing.place for thing in scene.things}
        for place in set(PLACES) - taken:
            row, column = world.row_and_column(place)
            cell = picture[world.CENTERS[row], world.CENTERS[column]]
            assert torch.allclose(cell, torch.tensor(world.BACKGROUNDS[scene.background]).float(), atol=0.01)


def test_things_stay_inside_their_cells_and_the_picture():
    for size, jitter in world.JITTER.items():
        for shape in SHAPES:
            moved = [(dx, dy) for dx in (-jitter, jitter) for dy in (-jitter, jitter)]
            drawn = [Scene((Thing(shape, "black", size, "center", *by),), "white") for by in moved]
            dark = (world.draw(drawn)[:, 0] < 0.9).nonzero()[:, 1:]
            assert dark.min() >= 42 and dark.max() <= 85  # 43-pixel cells


def test_nothing_is_cut_off_at_the_edge():
    for shape in SHAPES:
        places = (("center", 0), ("top left", -1), ("bottom right", 1))
        drawn = [Scene((Thing(shape, "black", "large", place, by, by),), "white") for place, by in places]
        middle, *corners = (1 - world.draw(drawn)[:, 0]).sum((1, 2))
        assert torch.allclose(torch.stack(corners), middle, rtol=1e-3)


def test_shapes_differ_and_are_of_like_extent():
    for size in world.SIZES:
        drawn = [Scene((Thing(shape, "black", size, "center"),), "white") for shape in SHAPES]
        cover = (1 - world.draw(drawn)[:, 0]) / 2
        extents = [(c > 0.5).any(0).sum().item() for c in cover]
        assert max(extents) / min(extents) < 1.2
        for one, other in combinations(cover, 2):
            assert torch.minimum(one, other).sum() / torch.maximum(one, other).sum() < 0.86


def test_a_batch_equals_single_pictures_and_other_sizes_show_the_same():
    drawn = scenes(6, 9)
    batch = world.draw(drawn)
    assert torch.equal(batch, torch.cat([world.draw([scene]) for scene in drawn]))
    small = torch.nn.functional.interpolate(batch, (64, 64), mode="area")
    assert (world.draw(drawn, size=64) - small).abs().mean() < 0.01


def test_to_picture_keeps_exact_levels():
    picture = world.to_picture(world.draw([Scene((Thing("circle", "cyan", "large", "center"),), "beige")])[0])
    assert picture.getpixel((0, 0)) == world.BACKGROUNDS["beige"]
    assert picture.getpixel((64, 64)) == COLORS["cyan"]


# Clips


PICTURES = {
    "shapes_1": Scene(
        (
            Thing("square", "red", "small", "top left", 1, -2),
            Thing("triangle", "cyan", "large", "right", -1, 1),
            Thing("cross", "blue", "large", "bottom"),
        ),
        "beige",
    ),
    "shapes_2": Scene(
        (
            Thing("triangle", "black", "large", "top right", 0, -1),
            Thing("star", "yellow", "small", "right", 1, 1),
            Thing("circle", "red", "small", "bottom left", -1, 1),
        ),
        "white",
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_notebooks_pictures_are_scenes_of_this_world(name):
    assert world.belongs(PICTURES[name], "test")
    stored = open_picture(ROOT / "notebooks" / "pictures" / f"{name}.png")
    assert np.array_equal(np.asarray(stored), np.asarray(world.to_picture(world.draw([PICTURES[name]])[0])))


def test_balls_keep_their_speed_and_stay_inside():
    for clip in clips.test_clips(40, 1):
        path = clips.positions(clip)
        assert path.shape == (13, len(clip.balls), 2)
        assert path.min() >= clips.LOW - 1e-3 and path.max() <= clips.HIGH + 1e-3
        for i, ball in enumerate(clip.balls):
            speed = math.hypot(ball.vx, ball.vy)
            assert clips.SLOWEST <= speed <= clips.FASTEST
            steps = np.linalg.norm(np.diff(path[:, i], axis=0), axis=1)
            assert steps.max() <= speed + 1e-3
        if len(clip.balls) == 2:
            assert np.linalg.norm(path[:, 0] - path[:, 1], axis=1).min() >= clips.APART


def test_a_ball_bounces_off_a_wall():
    ball = clips.Ball("red", 54.0, 30.0, 3.0, 0.0)
    path = clips.positions(clips.Clip((ball,), "white", 4))[:, 0, 0]
    assert path.tolist() == [54.0, 55.0, 52.0, 49.0]  # the wall is at 56


def test_drawn_balls_are_read_at_their_places():
    drawn = clips.test_clips(60, 2)
    errors = [clips.ball_errors(clip, frames, 0) for clip, frames in zip(drawn, clips.draw_clips(drawn), strict=True)]
    flat = np.concatenate([e.ravel() for e in errors])
    assert flat.mean() < 0.1 and flat.max() < 0.5
    seen = clips.read_balls(clips.draw_clips(drawn[:1])[0, 0])
    assert sorted(color for color, _, _ in seen) == sorted(b.color for b in drawn[0].balls)


def test_a_missing_ball_counts_as_a_whole_side():
    clip = clips.Clip((clips.Ball("red", 20, 20, 2, 0),), "white", 2)
    empty = torch.ones(3, 64, 64)
    assert clips.ball_errors(clip, [empty], 0).tolist() == [[64.0]]


def test_prompts_say_all_about_a_prompted_clip():
    by_text = {}
    for clip in clips.test_clips(300, 3, frames=8, prompted=True):
        assert by_text.setdefault(clips.clip_prompt(clip), clip) == clip
    ball = clips.Ball("orange", 11, 53, 1.6, 0.0)
    text = clips.clip_prompt(clips.Clip((ball,), "gray", 8))
    assert text == "an orange ball starts at the bottom left and moves right slowly, on a gray background"


def test_training_clips_are_no_test_clips():
    rng = Random(4)
    train = {clips.clip_prompt(clips.random_clip(rng, prompted=True)) for _ in range(300)}
    assert not train & {clips.clip_prompt(clip) for clip in clips.test_clips(300, 5, prompted=True)}
    with pytest.raises(ValueError, match="pairs"):
        clips.random_clip(rng, split="pairs")


def test_baselines():
    first = np.array([[[10.0, 20.0]], [[12.0, 21.0]], [[14.0, 22.0]]])
    assert clips.straight_line(first, 2).tolist() == [[[16.0, 23.0]], [[18.0, 24.0]]]
    assert clips.copy_last(first, 2).tolist() == [[[14.0, 22.0]]] * 2


def test_clips_of_different_lengths_are_not_drawn_together():
    ball = clips.Ball("red", 20, 20, 2, 0)
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        clips.draw_clips([clips.Clip((ball,), "white", frames) for frames in (2, 3)])
