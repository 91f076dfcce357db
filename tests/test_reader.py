"""The reader: right on what is drawn, still right after mild damage, and not fooled by what is no object."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.fft import dctn, idctn

from helpers.tiny import edits, reader, world
from helpers.tiny.world import BACKGROUNDS, COLORS, PAIRS, SCALES, SIZES, Scene, Thing, pick

MOST_ACCEPTED = 0.01  # part of the garbage that may pass as an object


def scenes(count, seed, splits=world.SPLITS):
    rng = Random(seed)
    return [world.random_scene(rng, split=pick(rng, splits)) for _ in range(count)]


def part_right(drawn, pictures):
    readings = reader.read_batch(pictures)
    return np.mean([edits.shows(reading, scene) for reading, scene in zip(readings, drawn, strict=True)])


def alone(rng):
    color, shape = pick(rng, PAIRS)
    return Thing(shape, color, pick(rng, SIZES), "center")


def picture_of(thing, background):
    return world.draw([Scene((thing,), background)])[0]


def accepted(pictures):
    """Objects accepted per picture of what should be none."""
    return np.mean([len(reading.things) for reading in reader.read_batch(pictures)])


def damaged(picture, noise):
    """A picture after a slight blur, noise, and coarser steps for finer 8x8 cosine waves."""
    blurred = ndimage.gaussian_filter(picture.numpy(), (0, 0.7, 0.7)) + noise.normal(0, 0.03, picture.shape)
    blocks = blurred.reshape(3, 16, 8, 16, 8).transpose(0, 1, 3, 2, 4)
    step = 0.15 * (1 + 0.7 * np.add.outer(np.arange(8), np.arange(8)))
    waves = np.round(dctn(blocks, axes=(3, 4), norm="ortho") / step) * step
    back = idctn(waves, axes=(3, 4), norm="ortho").transpose(0, 1, 3, 2, 4).reshape(picture.shape)
    return torch.from_numpy(back.clip(-1, 1).astype(np.float32))


def test_drawn_scenes_are_read():
    drawn = scenes(1000, 1)
    assert part_right(drawn, world.draw(drawn)) >= 0.995


def test_centers_are_read_to_a_part_of_a_pixel():
    drawn = scenes(50, 2)
    for scene, reading in zip(drawn, reader.read_batch(world.draw(drawn)), strict=True):
        for thing, seen in zip(scene.things, reading.things, strict=True):
            assert np.hypot(seen.x - thing.center[0], seen.y - thing.center[1]) < 0.1


def test_damaged_scenes_are_read():
    drawn, noise = scenes(400, 3), np.random.default_rng(0)
    assert part_right(drawn, [damaged(picture, noise) for picture in world.draw(drawn)]) >= 0.98


def test_softened_scenes_are_read():
    drawn = scenes(200, 4)
    soft = [torch.from_numpy(ndimage.gaussian_filter(p.numpy(), (0, 1.2, 1.2))) for p in world.draw(drawn)]
    assert part_right(drawn, soft) >= 0.98


@pytest.mark.parametrize("size", [64, 96, 256])
def test_other_sizes_are_read(size):
    drawn = scenes(100, 5)
    assert part_right(drawn, world.draw(drawn, size=size)) >= 0.98


def test_pictures_and_tensors_read_alike():
    drawn = scenes(30, 6)
    tensors = world.draw(drawn)
    assert part_right(drawn, [world.to_picture(picture) for picture in tensors]) == 1
    with pytest.raises(ValueError, match=r"\[1, 3, 128, 128\]"):
        reader.read(tensors[:1])


def test_heavily_blurred_objects_are_rejected():
    rng = Random(7)
    pictures = [picture_of(alone(rng), pick(rng, tuple(BACKGROUNDS))).numpy() for _ in range(400)]
    blurs = [4 + 2 * rng.random() for _ in pictures]
    blurred = [ndimage.gaussian_filter(p, (0, b, b)) for p, b in zip(pictures, blurs, strict=True)]
    assert accepted(map(torch.from_numpy, blurred)) <= MOST_ACCEPTED


def merged_pictures(rng, count, same_color):
    """Two objects of one size, 10 to 18 pixels apart (if large), so that neither hides the other."""
    while count:
        one, other = alone(rng), alone(rng)
        other = replace(other, size=one.size, color=one.color if same_color else other.color)
        if same_color or one.color != other.color:
            table = torch.from_numpy(world.scene_table([Scene((one, other), pick(rng, tuple(BACKGROUNDS)))]))
            angle, far = 2 * np.pi * rng.random(), (10 + 8 * rng.random()) * SCALES[one.size]
            table[0, 1, 2:4] += far * torch.tensor([np.cos(angle), np.sin(angle)], dtype=torch.float32)
            yield world.draw_table(table)[0]
            count -= 1


@pytest.mark.parametrize("same_color", [True, False])
def test_merged_objects_are_rejected(same_color):
    assert accepted(merged_pictures(Random(8), 400, same_color)) <= MOST_ACCEPTED


def cut(rng):
    """A half plane through the centre, bool [128, 128]."""
    angle = 2 * np.pi * rng.random()
    y, x = np.mgrid[:128, :128] - 63.5
    return torch.from_numpy(x * np.cos(angle) + y * np.sin(angle) > 0)


def test_half_objects_are_rejected():
    rng, pictures = Random(9), []
    for _ in range(200):
        whole = picture_of(alone(rng), pick(rng, tuple(BACKGROUNDS)))
        pictures.append(torch.where(cut(rng), whole, whole[:, :1, :1]))
    assert accepted(pictures) <= MOST_ACCEPTED


def test_objects_of_two_colors_are_rejected():
    rng, pictures = Random(10), []
    for _ in range(200):
        thing, background = alone(rng), pick(rng, tuple(BACKGROUNDS))
        other = replace(thing, color=pick(rng, [color for color in COLORS if color != thing.color]))
        pictures.append(torch.where(cut(rng), picture_of(thing, background), picture_of(other, background)))
    assert accepted(pictures) <= MOST_ACCEPTED


def test_objects_between_the_two_sizes_are_rejected():
    rng = Random(11)
    drawn = [Scene((replace(alone(rng), size="large"),), pick(rng, tuple(BACKGROUNDS))) for _ in range(200)]
    table = torch.from_numpy(world.scene_table(drawn))
    table[:, 0, 0] = 0.85
    assert accepted(world.draw_table(table)) <= MOST_ACCEPTED


def test_shapes_between_two_shapes_are_rejected():
    pixel = torch.arange(128) + 0.5 - 64
    x, y = torch.meshgrid(pixel, pixel, indexing="xy")
    circle, square, *_ = world.distances(x, y)
    part = torch.linspace(0.4, 0.6, 9)[:, None, None]
    covers = (0.5 - torch.lerp(circle, square, part)).clamp(0, 1)
    assert accepted(1 - 2 * covers[:, None].expand(-1, 3, -1, -1)) == 0


def test_random_blobs_and_noise_are_rejected():
    rng, noise = Random(12), np.random.default_rng(12)
    blobs = []
    for _ in range(150):
        field = ndimage.gaussian_filter(noise.normal(size=(128, 128)), 6 + 4 * rng.random())
        color, background = COLORS[pick(rng, tuple(COLORS))], BACKGROUNDS[pick(rng, tuple(BACKGROUNDS))]
        levels = np.where((field > np.quantile(field, 0.9))[..., None], color, background) / 127.5 - 1
        blobs.append(torch.from_numpy(levels.astype(np.float32)).permute(2, 0, 1))
    readings = reader.read_batch(blobs)
    count = sum(len(reading.things) for reading in readings)
    assert count <= MOST_ACCEPTED * (count + sum(reading.rejected for reading in readings))
    assert accepted(torch.rand(20, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1) == 0


def test_an_unknown_background_is_named_so():
    assert reader.read(torch.tensor([1.0, -1.0, 1.0])[:, None, None].expand(3, 128, 128)).background == "unknown"
