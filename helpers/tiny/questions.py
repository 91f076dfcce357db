"""Questions about one or two scenes with true short answers, balanced so that blind guessing does not pay."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from .prompts import RELATIONS, related
from .wording import NUMBERS, article, describe, looks, plural
from .world import (
    BACKGROUND_NAMES,
    COLORS,
    MOST_THINGS,
    SHAPES,
    TRAINED_PAIRS,
    Scene,
    Thing,
    belongs,
    make_scene,
    pick,
    random_places,
    random_scene,
    random_thing,
)

DESCRIBE = "Describe the picture."
DESCRIBE_SHARE = 0.35
RANKS = ("first", "second")
COUNT_OPTIONS = 5  # zero to four


@dataclass(frozen=True)
class Question:
    """A question about `scenes` (one or two, in order) and its true answer, in short lower-case words."""

    kind: str
    scenes: tuple[Scene, ...]
    question: str
    answer: str

    @property
    def thought(self) -> str:
        """The answer of someone who looks first: "<think> I see a large red ... </think> ANSWER"."""
        return f"<think> I see {describe(self.scenes[0])}. </think> {self.answer}"


def answers_match(text: str, answer: str) -> bool:
    """Whether a text gives an answer, up to case, outer spaces and a final period.

    A description is compared as a set of described things and background, in any order.
    """
    return _parts(text) == _parts(answer)


def _parts(text: str) -> Counter:
    return Counter(part.strip() for part in text.strip().lower().removesuffix(".").split(","))


def random_question(rng: Random, kind: str | None = None, split: str = "train") -> Question:
    """A question of one of KINDS about one scene of `split`; raises ValueError for an unknown kind.

    None is "describe" in 35 %, else any other kind, equally likely.
    """
    if kind is None:
        kind = "describe" if rng.random() < DESCRIBE_SHARE else pick(rng, SHORT_KINDS)
    if kind not in ASKERS:
        raise ValueError(f"Unknown kind of question {kind!r}; choose one of {', '.join(KINDS)}.")
    while True:
        question = ASKERS[kind](rng, split)
        if question:
            return question


def random_short_question(rng: Random, split: str = "train") -> Question:
    """A question of any kind but "describe"."""
    return random_question(rng, pick(rng, SHORT_KINDS), split)


def test_questions(count: int, seed: int) -> list[Question]:
    """`count` questions on scenes that training never sees, all kinds in turn, the same for the same seed."""
    rng = Random(f"questions {seed}")
    return [random_question(rng, KINDS[i % len(KINDS)], "test") for i in range(count)]


def blind_answers(questions: Sequence[Question], seed: int = 0, count: int = 20_000) -> list[str]:
    """The best answers to single-scene questions that can be given without a picture.

    That is the most frequent answer to the same words among `count` training questions, or where those were
    never asked, to the same kind of question.
    """
    rng = Random(f"blind {seed}")
    by_text, by_kind = defaultdict(Counter), defaultdict(Counter)
    for i in range(count):
        asked = random_question(rng, KINDS[i % len(KINDS)])
        by_text[asked.question][asked.answer] += 1
        by_kind[asked.kind][asked.answer] += 1
    return [(by_text.get(q.question) or by_kind[q.kind]).most_common(1)[0][0] for q in questions]


# One scene: each asker returns None where the scene that it drew does not allow the question


def _one(kind: str, scene: Scene, question: str, answer: str) -> Question:
    return Question(kind, (scene,), question, answer)


def _unique(rng: Random, scene: Scene, *attributes: str) -> Thing | None:
    """A thing that no other one equals in these attributes."""
    names = [tuple(getattr(thing, attribute) for attribute in attributes) for thing in scene.things]
    alone = [thing for thing, name in zip(scene.things, names, strict=True) if names.count(name) == 1]
    return pick(rng, alone) if alone else None


def _ask_color(rng: Random, split: str) -> Question | None:
    scene = random_scene(rng, split=split)
    if rng.random() < 0.5:
        thing = pick(rng, scene.things)
        return _one("color", scene, f"what color is the thing at the {thing.place}?", thing.color)
    thing = _unique(rng, scene, "shape")
    return thing and _one("color", scene, f"what color is the {thing.shape}?", thing.color)


def _ask_shape(rng: Random, split: str) -> Question | None:
    scene = random_scene(rng, split=split)
    if rng.random() < 0.5:
        thing = pick(rng, scene.things)
        return _one("shape", scene, f"what shape is the thing at the {thing.place}?", thing.shape)
    thing = _unique(rng, scene, "color")
    return thing and _one("shape", scene, f"what shape is the {thing.color} thing?", thing.shape)


def _ask_size(rng: Random, split: str) -> Question | None:
    scene = random_scene(rng, split=split)
    thing = _unique(rng, scene, "color", "shape")
    return thing and _one("size", scene, f"what size is the {thing.color} {thing.shape}?", thing.size)


def _ask_place(rng: Random, split: str) -> Question | None:
    scene = random_scene(rng, split=split)
    thing = _unique(rng, scene, "color", "shape")
    return thing and _one("place", scene, f"where is the {thing.color} {thing.shape}?", thing.place)


def _ask_background(rng: Random, split: str) -> Question:
    scene = random_scene(rng, split=split)
    return _one("background", scene, "what color is the background?", scene.background)


def _ask_describe(rng: Random, split: str) -> Question:
    scene = random_scene(rng, split=split)
    return _one("describe", scene, DESCRIBE, describe(scene))


def _ask_count(rng: Random, split: str) -> Question | None:
    """How many in all, of a colour or of a shape; the latter two with zero to four equally likely."""
    which = pick(rng, ("all", "color", "shape"))
    if which == "all":
        scene = random_scene(rng, split=split)
        return _one("count", scene, "how many things are there?", NUMBERS[len(scene.things)])
    count = int(rng.random() * COUNT_OPTIONS)
    name = pick(rng, tuple(COLORS) if which == "color" else SHAPES)
    total = max(1, count) + int(rng.random() * (MOST_THINGS + 1 - max(1, count)))
    things = []
    for i, place in enumerate(random_places(rng, total)):
        thing = random_thing(rng, place, **({which: name} if i < count else {}))
        while i >= count and getattr(thing, which) == name:
            thing = random_thing(rng, place)
        things.append(thing)
    scene = make_scene(things, pick(rng, BACKGROUND_NAMES))
    if not belongs(scene, split):
        return None
    many = f"{name} things" if which == "color" else plural(name, 2).removeprefix("two ")
    return _one("count", scene, f"how many {many} are there?", NUMBERS[count])


def _ask_exists(rng: Random, split: str) -> Question | None:
    """Yes or no, half each; half of the "no" swap attributes that are both in the picture."""
    scene = random_scene(rng, split=split)
    present = {(thing.color, thing.shape) for thing in scene.things}
    truth = rng.random() < 0.5
    if truth:
        pairs = sorted(present)
    elif rng.random() < 0.5:
        pairs = [pair for pair in TRAINED_PAIRS if pair not in present]
    else:
        colors, shapes = {color for color, _ in present}, {shape for _, shape in present}
        pairs = [p for p in TRAINED_PAIRS if p not in present and p[0] in colors and p[1] in shapes]
        pairs = pairs or [p for p in TRAINED_PAIRS if p not in present and (p[0] in colors or p[1] in shapes)]
    color, shape = pick(rng, pairs)
    return _one("exists", scene, f"is there {article(looks(shape, color))}?", "yes" if truth else "no")


def _ask_relation(rng: Random, split: str) -> Question | None:
    """Yes or no (half each) between two things, or what stands on one side of a thing."""
    scene = random_scene(rng, 2 + int(rng.random() * (MOST_THINGS - 1)), split)
    names = [f"{thing.color} {thing.shape}" for thing in scene.things]
    if len(set(names)) < len(names):
        return None
    relation = pick(rng, RELATIONS)
    if rng.random() < 1 / 3:
        other = pick(rng, range(len(names)))
        there = [
            n for n, t in zip(names, scene.things, strict=True) if related(t.place, relation, scene.things[other].place)
        ]
        question = f"what is {relation} the {names[other]}?"
        return _one("relation", scene, question, there[0]) if len(there) == 1 else None
    truth = rng.random() < 0.5
    one, other = rng.sample(range(len(names)), 2)
    while related(scene.things[one].place, relation, scene.things[other].place) != truth:
        relation = pick(rng, RELATIONS)
    answer = "yes" if truth else "no"
    return _one("relation", scene, f"is the {names[one]} {relation} the {names[other]}?", answer)


ASKERS = {
    "color": _ask_color,
    "shape": _ask_shape,
    "count": _ask_count,
    "exists": _ask_exists,
    "relation": _ask_relation,
    "place": _ask_place,
    "size": _ask_size,
    "background": _ask_background,
    "describe": _ask_describe,
}
KINDS = tuple(ASKERS)
SHORT_KINDS = KINDS[:-1]


# Two scenes


def random_two_question(rng: Random, split: str = "train") -> Question:
    """A question that compares two scenes of `split`, or asks about one of them by its rank."""
    kind = pick(rng, ("more", "background", "which", "rank"))
    if kind == "more":
        return _two_more(rng, split)
    if kind == "background":
        return _two_background(rng, split)
    return _two_which(rng, split) if kind == "which" else _two_rank(rng, split)


def _two_more(rng: Random, split: str) -> Question:
    """Which has more things: each of the three answers equally likely."""
    answer = pick(rng, ("the first", "the second", "both the same"))
    while True:
        scenes = random_scene(rng, split=split), random_scene(rng, split=split)
        lead = len(scenes[0].things) - len(scenes[1].things)
        if answer == ("the first" if lead > 0 else "the second" if lead else "both the same"):
            return Question("more", scenes, "which picture has more things?", answer)


def _two_background(rng: Random, split: str) -> Question:
    truth = rng.random() < 0.5
    while True:
        scenes = random_scene(rng, split=split), random_scene(rng, split=split)
        if (scenes[0].background == scenes[1].background) == truth:
            answer = "yes" if truth else "no"
            return Question("same", scenes, "do both pictures have the same background?", answer)


def _two_which(rng: Random, split: str) -> Question:
    """Where a thing is: the first, the second, both or neither, equally likely."""
    answer = pick(rng, ("the first", "the second", "both", "neither"))
    shape = pick(rng, SHAPES)
    wanted = (answer in ("the first", "both"), answer in ("the second", "both"))
    scenes = tuple(_scene_with(rng, split, shape, there) for there in wanted)
    return Question("which", scenes, f"which picture has {article(shape)}?", answer)


def _scene_with(rng: Random, split: str, shape: str, there: bool) -> Scene:
    while True:
        scene = random_scene(rng, split=split)
        if any(thing.shape == shape for thing in scene.things) == there:
            return scene


def _two_rank(rng: Random, split: str) -> Question:
    """A question about the first or the second picture alone."""
    rank = int(rng.random() * 2)
    while True:
        scenes = random_scene(rng, split=split), random_scene(rng, split=split)
        asked = pick(rng, ("color", "count", "background"))
        picture = f"the {RANKS[rank]} picture"
        if asked == "count":
            return Question("rank", scenes, f"how many things are in {picture}?", NUMBERS[len(scenes[rank].things)])
        if asked == "background":
            question = f"what color is the background of {picture}?"
            return Question("rank", scenes, question, scenes[rank].background)
        thing = _unique(rng, scenes[rank], "shape")
        if thing:
            return Question("rank", scenes, f"what color is the {thing.shape} in {picture}?", thing.color)
