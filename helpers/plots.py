"""Figures of the notebooks that are more than pictures in a row, each as a small static sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from .display import Sheet, figure_sheet
from .tiny import clips
from .tiny.world import BACKGROUNDS, COLORS
from .watch import Looks, Pass, routing

UNDERSTANDING, GENERATION = "#4477aa", "#ee8833"  # the experts' colours in every figure


def experts(passes: Sequence[Pass]) -> Sheet:
    """A bar for each different pass through the decoder: its tokens, in the colours of the experts that took them.

    `passes`: at least one, from `watch.watching`; equal ones share a bar that says how often they ran.
    """
    rows = routing(list(passes))
    figure = Figure((10, 0.8 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for height, (one, count) in enumerate(rows):
        axes.barh(height, one.understanding, color=UNDERSTANDING)
        axes.barh(height, one.generation, left=one.understanding, color=GENERATION)
        times = f"  x {count}" if count > 1 else ""
        axes.text(one.understanding + one.generation, height, f" {one.kind}{times}", va="center")
    most = max(one.understanding + one.generation for one, _ in rows)
    axes.set(xlim=(0, 1.25 * most), xlabel="tokens in the pass", yticks=[])
    axes.invert_yaxis()
    axes.set_title("understanding expert", color=UNDERSTANDING, loc="left")
    axes.set_title("generation expert", color=GENERATION, loc="right")
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure_sheet(figure)


def attention(looks: Looks, words: Sequence[int], layers: Sequence[int]) -> Sheet:
    """Where words of a question or its answer looked, laid over the picture: a row a layer, a column a word.

    `words` and `layers`: numbers of the maps to show, from 0. The brighter a patch, the more attention it got; every
    map has its own scale, and its title says which part of the word's attention went to the picture at all.
    Raises IndexError for a word or layer that `looks` does not have.
    """
    figure = Figure((1.7 * len(words), 1.95 * len(layers)), layout="constrained")
    grid = figure.subplots(len(layers), len(words), squeeze=False)
    share = looks.share()
    gray, (width, height) = np.asarray(looks.picture.convert("L")), looks.picture.size
    for row, layer in zip(grid, layers, strict=True):
        for axes, word in zip(row, words, strict=True):
            axes.imshow(gray, cmap="gray", vmin=-255, vmax=510, extent=(0, width, height, 0))
            axes.imshow(looks.maps[layer, word].numpy(), cmap="inferno", alpha=0.65, extent=(0, width, height, 0))
            axes.set_title(f"{looks.words[word].strip()!r} {100 * share[layer, word]:.0f} %", fontsize=9)
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"layer {layer}", fontsize=9)
    return figure_sheet(figure)


def ball_paths(clip: clips.Clip, frames: Sequence[Image.Image], start: int) -> Sheet:
    """The true paths of a clip's balls as lines, and where the predicted `frames` show the balls as dots.

    `start`: number of the first predicted frame; the given ones before it are squares on the line. Places in pixels
    of a 64x64 frame, x to the right and y down. A ball that is not found in a frame leaves no dot.
    """
    figure = Figure((6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor(_unit(BACKGROUNDS[clip.background]))
    truth = clips.positions(clip)
    seen = [{color: (x, y) for color, x, y in clips.read_balls(frame)} for frame in frames]
    for number, ball in enumerate(clip.balls):
        style = {"color": _unit(COLORS[ball.color]), "markeredgecolor": "black"}
        axes.plot(*truth[:, number].T, color=style["color"], linewidth=2, label=f"{ball.color}, true path")
        axes.plot(*truth[:start, number].T, "s", **style, label=f"{ball.color}, given")
        found = [places[ball.color] for places in seen if ball.color in places] or [(math.nan, math.nan)]
        axes.plot(*np.array(found).T, "o", **style, alpha=0.8, label=f"{ball.color}, predicted")
    axes.set(xlim=(0, clips.SIDE), ylim=(clips.SIDE, 0), aspect="equal", xlabel="x in pixels", ylabel="y in pixels")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1))
    return figure_sheet(figure)


def error_curves(errors: Mapping[str, np.ndarray], side: int) -> Sheet:
    """A line for each method: its error in every predicted frame, in percent of a frame's side.

    `errors`: name -> distances in pixels, [frames]; `side` in pixels. Dotted: 5 %, the aim of the tiny model.
    """
    figure = Figure((7, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, values in errors.items():
        axes.plot(range(1, len(values) + 1), 100 * np.asarray(values) / side, marker="o", label=name)
    axes.axhline(5, color="gray", linestyle=":", label="5 % of the side")
    axes.set(xlabel="predicted frame", ylabel="error, % of the side", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=len(errors) + 1)
    axes.spines[["top", "right"]].set_visible(False)
    return figure_sheet(figure)


def _unit(color: tuple[int, int, int]) -> tuple[float, ...]:
    return tuple(level / 255 for level in color)
