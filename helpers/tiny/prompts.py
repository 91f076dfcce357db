"""Prompts that ask for a picture, with what a picture must show to satisfy them.

The categories are GenEval's six (arXiv 2310.11513), "dense" (everything said) and "pairs" (colour-shape pairs
that training never draws together).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from random import Random

from .reader import Reading, Seen
from .wording import article, describe, looks, plural
from .world import (
    BACKGROUND_NAMES,
    HELD_OUT_PAIRS,
    PLACES,
    SHAPES,
    SIZES,
    TRAINED_PAIRS,
    Scene,
    Thing,
    belongs,
    in_test,
    make_scene,
    pick,
    random_places,
    random_scene,
    random_thing,
    row_and_column,
)

CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attribution")
RELATIONS = ("left of", "right of", "above", "below")
FORMS = ("{}", "a photo of {}", "a picture of {}", "draw {}")
BACKGROUND_SAID = 0.25  # part of the prompts that name the background
TRIES = 200
PLACE_SAID = 0.3  # part of the "position" prompts that name a place instead of a relation


@dataclass(frozen=True)
class Wanted:
    """One thing that a prompt asks for; what it leaves open is None."""

    shape: str
    color: str | None = None
    size: str | None = None
    place: str | None = None

    def fits(self, thing: Thing | Seen) -> bool:
        """Whether a thing, true or seen, is as wanted."""
        return (
            self.shape == thing.shape
            and self.color in (None, thing.color)
            and self.size in (None, thing.size)
            and self.place in (None, thing.place)
        )


@dataclass(frozen=True)
class Prompt:
    """A text that asks for a picture, and what must be in it: these things and no others.

    `relation` (one of RELATIONS) is that of the first wanted thing to the second; `background` None is any.
    """

    text: str
    category: str
    wanted: tuple[Wanted, ...]
    relation: str | None = None
    background: str | None = None

    def satisfied(self, reading: Reading) -> bool:
        """Whether a picture shows exactly what is asked: all of it as said, no other thing, none rejected."""
        if reading.rejected or len(reading.things) != len(self.wanted):
            return False
        if self.background not in (None, reading.background):
            return False
        return any(self._matches(things) for things in permutations(reading.things))

    def _matches(self, things: tuple[Seen, ...]) -> bool:
        if not all(wanted.fits(thing) for wanted, thing in zip(self.wanted, things, strict=True)):
            return False
        return self.relation is None or related(things[0].place, self.relation, things[1].place)

    def scene(self, rng: Random, split: str = "train") -> Scene | None:
        """A random scene of `split` that satisfies the prompt; whatever it leaves open is drawn uniformly.

        None where TRIES scenes did not belong to `split`: a prompt can say so much that none does.
        """
        for _ in range(TRIES):
            things = [
                random_thing(rng, place, wanted.color, wanted.shape, wanted.size)
                for wanted, place in zip(self.wanted, self._places(rng), strict=True)
            ]
            scene = make_scene(things, self.background or pick(rng, BACKGROUND_NAMES))
            if belongs(scene, split):
                return scene
        return None

    def _places(self, rng: Random) -> list[str]:
        while True:
            drawn = random_places(rng, len(self.wanted))
            places = [wanted.place or place for wanted, place in zip(self.wanted, drawn, strict=True)]
            if len(set(places)) == len(places) and (
                self.relation is None or related(places[0], self.relation, places[1])
            ):
                return places


def related(one: str, relation: str, other: str) -> bool:
    """Whether place `one` has one of RELATIONS to place `other`; only that axis counts."""
    (row, column), (other_row, other_column) = row_and_column(one), row_and_column(other)
    return {
        "left of": column < other_column,
        "right of": column > other_column,
        "above": row < other_row,
        "below": row > other_row,
    }[relation]


def random_prompt(rng: Random, category: str, split: str = "train") -> Prompt:
    """A prompt of a category that belongs to `split`: no text of a test prompt is ever used in training.

    Raises ValueError for an unknown category.
    """
    if category == "dense":
        return dense_prompt(random_scene(rng, split=split))
    if category not in MAKERS:
        raise ValueError(f"Unknown category {category!r}; choose one of {', '.join((*MAKERS, 'dense'))}.")
    while True:
        prompt = MAKERS[category](rng)
        if category == "pairs" or in_test(prompt.text) == (split == "test"):
            return prompt


def dense_prompt(scene: Scene) -> Prompt:
    """The prompt that says all about a scene but the jitter."""
    wanted = tuple(Wanted(t.shape, t.color, t.size, t.place) for t in scene.things)
    return Prompt(describe(scene), "dense", wanted, background=scene.background)


def _phrased(rng: Random, category: str, phrase: str, *wanted: Wanted, relation: str | None = None) -> Prompt:
    background = pick(rng, BACKGROUND_NAMES) if rng.random() < BACKGROUND_SAID else None
    ending = f" on a {background} background" if background else ""
    return Prompt(pick(rng, FORMS).format(phrase) + ending, category, wanted, relation, background)


def _name(wanted: Wanted) -> str:
    return article(looks(wanted.shape, wanted.color, wanted.size))


def _pair(rng: Random) -> Wanted:
    color, shape = pick(rng, TRAINED_PAIRS)
    return Wanted(shape, color)


def _other(rng: Random, first: Wanted) -> Wanted:
    """A coloured thing that differs from the first in colour and in shape."""
    while True:
        other = _pair(rng)
        if other.shape != first.shape and other.color != first.color:
            return other


def _two_shapes(rng: Random) -> tuple[Wanted, Wanted]:
    first = pick(rng, SHAPES)
    return Wanted(first), Wanted(pick(rng, [shape for shape in SHAPES if shape != first]))


def _single_object(rng: Random) -> Prompt:
    wanted = Wanted(pick(rng, SHAPES), size=pick(rng, (None, *SIZES)))
    return _phrased(rng, "single_object", _name(wanted), wanted)


def _two_object(rng: Random) -> Prompt:
    one, two = _two_shapes(rng)
    return _phrased(rng, "two_object", f"{_name(one)} and {_name(two)}", one, two)


def _counting(rng: Random) -> Prompt:
    count = 2 + int(rng.random() * 3)
    wanted = Wanted(pick(rng, SHAPES)) if rng.random() < 0.5 else _pair(rng)
    phrase = plural(looks(wanted.shape, wanted.color), count)
    return _phrased(rng, "counting", phrase, *[wanted] * count)


def _colors(rng: Random) -> Prompt:
    wanted = _pair(rng)
    return _phrased(rng, "colors", _name(wanted), wanted)


def _position(rng: Random) -> Prompt:
    if rng.random() < PLACE_SAID:
        color, shape = pick(rng, TRAINED_PAIRS)
        wanted = Wanted(shape, color, place=pick(rng, PLACES))
        return _phrased(rng, "position", f"{_name(wanted)} at the {wanted.place}", wanted)
    relation = pick(rng, RELATIONS)
    if rng.random() < 0.5:
        one, two = _two_shapes(rng)
    else:
        one = _pair(rng)
        two = _other(rng, one)
    return _phrased(rng, "position", f"{_name(one)} {relation} {_name(two)}", one, two, relation=relation)


def _color_attribution(rng: Random) -> Prompt:
    one = _pair(rng)
    two = _other(rng, one)
    return _phrased(rng, "color_attribution", f"{_name(one)} and {_name(two)}", one, two)


def _held_out(rng: Random) -> Prompt:
    """A held-out pair, in half the prompts beside a trained one."""
    color, shape = pick(rng, HELD_OUT_PAIRS)
    wanted = Wanted(shape, color)
    if rng.random() < 0.5:
        return _phrased(rng, "pairs", _name(wanted), wanted)
    two = _other(rng, wanted)
    return _phrased(rng, "pairs", f"{_name(wanted)} and {_name(two)}", wanted, two)


MAKERS = {
    "single_object": _single_object,
    "two_object": _two_object,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attribution": _color_attribution,
    "pairs": _held_out,
}
