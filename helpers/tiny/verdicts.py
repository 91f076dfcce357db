"""Short verdicts on what a model made, in the words and units of the tiny world."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from ..display import Table, table
from .clips import Clip, ball_errors, copy_last, positions, straight_line
from .reader import read
from .wording import describe


def in_words(picture: Image.Image | torch.Tensor) -> str:
    """What the reader sees, worded like a dense prompt, and how many blobs are no thing of this world.

    On a picture from outside the tiny world the words mean little: it holds nothing that the reader knows.
    """
    reading = read(picture)
    words = describe(reading) if reading.things else f"nothing, on a {reading.background} background"
    return f"{words}; {reading.rejected} unreadable" if reading.rejected else words


def frame_errors(clips: Sequence[Clip], films: Sequence[Sequence[Image.Image]], given: int) -> dict[str, np.ndarray]:
    """Mean distance of the balls from their true centres in each predicted frame, in pixels, float [frames].

    For the films (each continues `given` frames of its clip), and for two ways to predict without a model:
    copying the last given centres, and going on along the last two in a straight line.
    """
    columns = {"model": [], "last frame copied": [], "straight line": []}
    for clip, film in zip(clips, films, strict=True):
        truth = positions(clip)
        first, later = truth[:given], truth[given : given + len(film)]
        columns["model"].append(ball_errors(clip, film, given))
        for name, guess in (("last frame copied", copy_last), ("straight line", straight_line)):
            columns[name].append(np.linalg.norm(guess(first, len(film)) - later, axis=-1))
    return {name: np.concatenate(errors, axis=1).mean(axis=1) for name, errors in columns.items()}


def tally(groups: Sequence[str], **hits: Sequence[bool]) -> Table:
    """How many were right: a row for each group (in order of appearance) and one for all, a column for each
    of `hits`.

    `groups` and every one of `hits` have one entry a sample; underscores in names are shown as spaces.
    """
    names = list(dict.fromkeys(groups))
    members = {name: [i for i, group in enumerate(groups) if group == name] for name in names}
    members["all"] = list(range(len(groups)))
    rows = [
        (name, len(chosen), *(sum(column[i] for i in chosen) for column in hits.values()))
        for name, chosen in members.items()
    ]
    return table(("group", "samples", *(name.replace("_", " ") for name in hits)), rows)
