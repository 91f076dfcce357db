"""What a picture costs for each number of steps and each size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import psutil

from ..display import Sheet, figure_sheet, progress
from ..pipeline import BagelPipeline
from .floors import forwards, picture_from_text
from .measuring import Row, measure
from .rates import Limits


@dataclass(frozen=True)
class Cost:
    """One picture of `side` x `side` pixels: its measured row; computed, its `forwards` through the decoder and
    the floating-point operations of all its work.
    """

    side: int
    num_timesteps: int
    tokens: int
    forwards: int
    flop: float
    row: Row


def costs(
    bagel: BagelPipeline,
    weights: str,
    limit: Limits,
    prompt: str,
    sides: Sequence[int],
    num_timesteps: Sequence[int],
    seed: int,
) -> list[Cost]:
    """A picture from `prompt` for every pair of a side in pixels and a number of timesteps.

    Three calls each: the first one warms up, and the faster of the others counts.
    """
    found, before = [], psutil.Process().memory_info().rss
    with progress(len(sides) * len(num_timesteps), "pictures") as step:
        for side, count in product(sides, num_timesteps):
            asked = {"height": side, "width": side, "num_timesteps": count, "seed": seed}

            def call(on_step: Any, asked: dict = asked) -> Any:
                return bagel.generate(prompt, on_step=on_step, **asked)

            row, last = measure(f"text-to-image {side}x{side}", weights, call, 2, bagel.model.device, before)
            settings, words = last.result.settings, len(bagel.codec.encode(prompt))
            work = picture_from_text(bagel.config, settings, words)
            row = replace(row, floor_seconds=work.seconds(limit))
            tokens = (side // bagel.config.latent_stride) ** 2
            found.append(Cost(side, count, tokens, forwards(settings), work.flop, row))
            step()
    return found


def plot_costs(found: Sequence[Cost]) -> Sheet:
    """Two plots, seconds against timesteps and against latent tokens; dotted, the floors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    by_steps, by_tokens = figure.subplots(1, 2)
    for side in sorted({one.side for one in found}):
        _line(by_steps, [one for one in found if one.side == side], "num_timesteps", f"{side}x{side}")
    for count in sorted({one.num_timesteps for one in found}):
        _line(by_tokens, [one for one in found if one.num_timesteps == count], "tokens", f"{count} timesteps")
    by_steps.set(xlabel="timesteps", ylabel="seconds a picture", title="cost against steps")
    by_tokens.set(xlabel="latent tokens (one is 16x16 pixels)", title="cost against picture size")
    for axes in (by_steps, by_tokens):
        axes.plot([], [], "k:", label="floor")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        axes.spines[["top", "right"]].set_visible(False)
    return figure_sheet(figure, dpi=100)


def _line(axes: Any, points: list[Cost], across: str, label: str) -> None:
    points = sorted(points, key=lambda one: getattr(one, across))
    x = [getattr(one, across) for one in points]
    (line,) = axes.plot(x, [one.row.seconds for one in points], "o-", label=label)
    axes.plot(x, [one.row.floor_seconds for one in points], ":", color=line.get_color())
