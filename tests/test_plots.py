"""Figures are small sheets that show what they were given: colours are looked for in the pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import plots
from helpers.tiny import clips
from helpers.tiny.world import to_picture
from helpers.watch import Looks, Pass


def near(sheet, color, within=12):
    """Which pixels of a sheet have about this colour: bool [height, width]."""
    pixels = np.asarray(sheet.image, int)
    return np.abs(pixels - np.array(color)).max(-1) <= within


def rgb(name):
    return tuple(int(name[i : i + 2], 16) for i in (1, 3, 5))


def passes(count):
    layer = torch.ones(5, 5)
    return [Pass(5, 0, 0, 4, 5, [layer]), *[Pass(2, 8, 5, 5, 15)] * count]


def test_experts_are_bars_in_proportion():
    sheet = plots.experts(passes(3))
    blue, orange = near(sheet, rgb(plots.UNDERSTANDING)), near(sheet, rgb(plots.GENERATION))
    rows = np.flatnonzero(orange.sum(1) > 50)
    widths = blue[rows].sum(1).max(), orange[rows].sum(1).max()
    assert widths[1] / widths[0] == pytest.approx(4, rel=0.05)
    assert blue.sum(1).max() / widths[0] == pytest.approx(2.5, rel=0.05)


def test_equal_passes_share_one_bar():
    assert plots.experts(passes(1)).image.size == plots.experts(passes(9)).image.size


def looks(brightest):
    maps = torch.zeros(2, 3, 4, 4)
    maps[:, :, *brightest] = 0.5
    return Looks(Image.new("RGB", (64, 64), "white"), ["a", "b", "c"], maps, 1)


def test_attention_is_brightest_where_the_map_is():
    def center(brightest):
        sheet = np.asarray(plots.attention(looks(brightest), [1], [0]).image, int)
        yellow = (sheet[..., 0] > 180) & (sheet[..., 2] < sheet[..., 0] - 40)
        return np.argwhere(yellow).mean(0)

    top_left, bottom_right = center((0, 0)), center((3, 3))
    assert (bottom_right - top_left > 40).all()


def test_attention_has_a_row_a_layer_and_a_column_a_word():
    one, wide, high = (
        plots.attention(looks((0, 0)), *chosen).image for chosen in (([0], [0]), ([0, 1], [0]), ([0], [0, 1]))
    )
    assert wide.width > 1.8 * one.width and wide.height == one.height
    assert high.height > 1.8 * one.height and high.width == one.width


@pytest.fixture(scope="module")
def film():
    clip = next(clip for clip in clips.test_clips(20, 1) if len(clip.balls) == 1)
    return clip, [to_picture(frame) for frame in clips.draw_clips([clip])[0]]


def test_paths_have_a_dot_for_every_frame(film):
    """Dots have black edges, so that each adds dark pixels."""
    clip, frames = film
    counts = [near(plots.ball_paths(clip, frames[3:end], 3), (0, 0, 0), 60).sum() for end in (3, 8, 13)]
    assert counts[2] - counts[1] > 50 and counts[1] - counts[0] > 50


def test_a_frame_without_balls_leaves_no_dot(film):
    clip, frames = film
    blank = Image.new("RGB", frames[0].size, frames[0].getpixel((0, 0)))
    pictures = [plots.ball_paths(clip, shown, 3).image for shown in ([blank], [])]
    assert np.array_equal(*map(np.asarray, pictures))


def test_error_curves_rise_with_the_error():
    sheet = plots.error_curves({"rising": np.arange(1.0, 11)}, 64)
    line = np.argwhere(near(sheet, (31, 119, 180))[: 3 * sheet.image.height // 4])  # above the legend
    left, right = (line[line[:, 1] == line[:, 1].min()], line[line[:, 1] == line[:, 1].max()])
    assert right[:, 0].mean() < left[:, 0].mean() - 50


def test_no_figure_stays_open():
    import matplotlib.pyplot

    plots.error_curves({"one": np.ones(3)}, 64)
    assert matplotlib.pyplot.get_fignums() == []


def test_sheets_are_small():
    assert len(plots.experts(passes(2))._repr_mimebundle_()["image/png"]) < 100_000
