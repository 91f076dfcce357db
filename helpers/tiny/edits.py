"""Editing instructions with their true results, and the verdict on an edited picture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import numpy as np
import torch
from PIL import Image

from .reader import Reading, Seen, read, to_pixels
from .wording import describe_thing, looks, reference
from .world import (
    BACKGROUND_NAMES,
    COLORS,
    JITTER,
    MOST_THINGS,
    PLACES,
    SHAPES,
    SIDE,
    Scene,
    Thing,
    belongs,
    draw,
    held_out,
    make_scene,
    pick,
    random_scene,
    random_thing,
)

KINDS = ("recolor", "remove", "add", "move", "resize", "replace", "background")
FORMS = {
    "recolor": ("change the color of {thing} to {new}", "make {thing} {new}", "paint {thing} {new}"),
    "remove": ("remove {thing}", "delete {thing}", "take away {thing}"),
    "add": ("add {new}", "put {new}", "draw {new}"),
    "move": ("move {thing} to the {new}", "put {thing} at the {new}", "shift {thing} to the {new}"),
    "resize": ("make {thing} {new}", "change the size of {thing} to {new}", "turn {thing} {new}"),
    "replace": ("replace {thing} with a {new}", "turn {thing} into a {new}", "swap {thing} for a {new}"),
    "background": (
        "change the background to {new}",
        "make the background {new}",
        "paint the background {new}",
    ),
}
CLOSE = 0.05  # largest mean absolute difference, in [-1, 1], of an untouched thing's pixels


@dataclass(frozen=True)
class Edit:
    """An instruction of one of the seven kinds, and the scenes before and after it."""

    kind: str
    before: Scene
    instruction: str
    after: Scene

    @property
    def kept(self) -> tuple[Thing, ...]:
        """The things that the instruction does not touch."""
        return tuple(thing for thing in self.before.things if thing in self.after.things)


@dataclass(frozen=True)
class EditVerdict:
    """What became of an edit.

    `changed`: the background and every thing that should change are as they should be, and nothing else
    appeared; `kept_read`: every untouched thing still reads the same; `difference`: the largest mean absolute
    difference in [-1, 1] between an untouched thing's pixels before and after (0 if there is none).
    """

    changed: bool
    kept_read: bool
    difference: float

    @property
    def kept_pixels(self) -> bool:
        """Whether every untouched thing's pixels stayed within 0.05."""
        return self.difference <= CLOSE

    @property
    def right(self) -> bool:
        """Whether the whole edit is right: what should change did, and what should not did not."""
        return self.changed and self.kept_read and self.kept_pixels


def random_edit(rng: Random, kind: str | None = None, split: str = "train", before: Scene | None = None) -> Edit:
    """A random edit of a kind (None: any that is possible) on a scene of `split` or on `before`.

    In training the result is a training scene too; in no split does it hold a held-out pair.
    Raises ValueError for an unknown kind.
    """
    if kind not in (None, *KINDS):
        raise ValueError(f"Unknown kind of edit {kind!r}; choose one of {', '.join(KINDS)}.")
    while True:
        chosen = kind or pick(rng, KINDS)
        edit = _try(rng, chosen, before or random_scene(rng, split=split))
        if edit and (belongs(edit.after, "train") if split == "train" else not held_out(edit.after.things)):
            return edit


def test_edits(count: int, seed: int) -> list[Edit]:
    """`count` edits of scenes that training never sees, the kinds in turn, the same for the same seed."""
    rng = Random(f"edits {seed}")
    return [random_edit(rng, KINDS[i % len(KINDS)], "test") for i in range(count)]


def _try(rng: Random, kind: str, scene: Scene) -> Edit | None:
    """An edit of this kind on this scene, None where the draw makes it impossible."""
    if kind == "background":
        new = pick(rng, [name for name in BACKGROUND_NAMES if name != scene.background])
        return _edit(rng, kind, scene, None, new, replace(scene, background=new))
    free = [place for place in PLACES if all(place != thing.place for thing in scene.things)]
    if kind == "add":
        if len(scene.things) == MOST_THINGS:
            return None
        added = random_thing(rng, pick(rng, free))
        after = make_scene((*scene.things, added), scene.background)
        return _edit(rng, kind, scene, None, describe_thing(added), after)
    thing = pick(rng, scene.things)
    others = [other for other in scene.things if other is not thing]
    if kind == "remove":
        return _edit(rng, kind, scene, thing, "", make_scene(others, scene.background)) if others else None
    changed, new = _changed(rng, kind, thing, free)
    return _edit(rng, kind, scene, thing, new, make_scene((*others, changed), scene.background))


def _changed(rng: Random, kind: str, thing: Thing, free: list[str]) -> tuple[Thing, str]:
    """A thing after an edit that changes it, and the words for what it becomes."""
    if kind == "recolor":
        new = pick(rng, [color for color in COLORS if color != thing.color])
        return replace(thing, color=new), new
    if kind == "move":
        new = pick(rng, free)
        return replace(thing, place=new), new
    if kind == "resize":
        new = "small" if thing.size == "large" else "large"
        dx, dy = (max(-JITTER[new], min(JITTER[new], shift)) for shift in (thing.dx, thing.dy))
        return replace(thing, size=new, dx=dx, dy=dy), new
    shape = pick(rng, [shape for shape in SHAPES if shape != thing.shape])
    color = thing.color if rng.random() < 0.5 else pick(rng, tuple(COLORS))
    return replace(thing, shape=shape, color=color), looks(shape, color)


def _edit(rng: Random, kind: str, before: Scene, thing: Thing | None, new: str, after: Scene) -> Edit:
    name = reference(before, thing) if thing else ""
    return Edit(kind, before, pick(rng, FORMS[kind]).format(thing=name, new=new), after)


def edit_verdict(
    edit: Edit, picture: Image.Image | torch.Tensor, before_picture: Image.Image | torch.Tensor
) -> EditVerdict:
    """Judge an edited picture against the truth and its untouched things against the input picture."""
    reading = read(picture)
    seen = {thing.place: thing for thing in reading.things}
    kept_places = {thing.place for thing in edit.kept}
    due = [thing for thing in edit.after.things if thing.place not in kept_places]
    changed = (
        reading.background == edit.after.background
        and not reading.rejected
        and len(seen) == len(reading.things)
        and set(seen) <= kept_places | {thing.place for thing in due}
        and all(_same(thing, seen.get(thing.place)) for thing in due)
    )
    kept_read = all(_same(thing, seen.get(thing.place)) for thing in edit.kept)
    return EditVerdict(changed, kept_read, _difference(edit.kept, picture, before_picture))


def shows(reading: Reading, scene: Scene) -> bool:
    """Whether a picture reads as exactly this scene."""
    return (
        reading.background == scene.background
        and not reading.rejected
        and len(reading.things) == len(scene.things)
        and all(map(_same, scene.things, reading.things))
    )


def _same(thing: Thing, seen: Seen | None) -> bool:
    names = (thing.shape, thing.color, thing.size, thing.place)
    return seen is not None and names == (seen.shape, seen.color, seen.size, seen.place)


def _difference(things: tuple[Thing, ...], picture, before_picture) -> float:
    """The largest mean absolute difference, in [-1, 1], inside the outline of any of the things."""
    gap = np.abs(to_pixels(picture, SIDE) - to_pixels(before_picture, SIDE)).mean(2) / 127.5
    worst = 0.0
    for thing in things:
        drawn = draw([Scene((replace(thing, color="black"),), "white")])[0, 0].numpy()
        inside = drawn < drawn.min() + 1e-3  # the rim is left out: it takes part in a change of background
        worst = max(worst, float(gap[inside].mean()))
    return worst
