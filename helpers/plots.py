"""Figures of the notebooks that are more than pictures in a row, each as a small static sheet."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from .display import Sheet
from .tiny import clips
from .tiny.world import BACKGROUNDS, COLORS
from .watch import Looks, Pass, routing

UNDERSTANDING, GENERATION = "#4477aa", "#ee8833"  # the experts' colours in every figure
_DPI = 90


def experts(passes: Sequence[Pass]) -> Sheet:
    """One bar for each different pass: as long as its tokens are many, in the colours of their experts."""
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
    return _sheet(figure)


def attention(looks: Looks, words: Sequence[int], layers: Sequence[int]) -> Sheet:
    """Where chosen words (by number) looked, over the picture: a row a layer, a column a word.

    The brighter a patch, the more of the attention it got; every map has its own scale, and its title says
    which part of the word's attention went to the picture at all.
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
    return _sheet(figure)


def ball_paths(clip: clips.Clip, frames: Sequence[Image.Image], start: int) -> Sheet:
    """The true paths of a clip's balls as lines, and where `frames` (from `start` on) show them as dots.

    Places in pixels of a 64x64 frame. A ball that is not found in a frame leaves no dot.
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
    return _sheet(figure)


def error_curves(errors: Mapping[str, np.ndarray], side: int) -> Sheet:
    """A line for each method: its error in pixels per predicted frame, as a percentage of a frame's side."""
    figure = Figure((7, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, values in errors.items():
        axes.plot(range(1, len(values) + 1), 100 * np.asarray(values) / side, marker="o", label=name)
    axes.axhline(5, color="gray", linestyle=":", label="5 % of the side")
    axes.set(xlabel="predicted frame", ylabel="error, % of the side", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=len(errors) + 1)
    axes.spines[["top", "right"]].set_visible(False)
    return _sheet(figure)


def _unit(color: tuple[int, int, int]) -> tuple[float, ...]:
    return tuple(level / 255 for level in color)


def _sheet(figure: Figure) -> Sheet:
    """The figure as a picture; drawn without pyplot, so that no figure stays open behind anyone's back."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=_DPI)
    return Sheet(Image.open(buffer).convert("RGB"))
