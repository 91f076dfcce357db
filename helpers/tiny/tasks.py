"""What training asks of the tiny model: samples made of texts and pictures, and their tests.

All samples of one task have the same sequence of parts, so that a batch of one task has one layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from .edits import KINDS as EDIT_KINDS
from .edits import Edit, EditVerdict, edit_verdict, random_edit, test_edits
from .prompts import CATEGORIES, Prompt, Wanted, random_prompt
from .questions import (
    DESCRIBE,
    Question,
    answers_match,
    blind_answers,
    random_question,
    random_short_question,
    random_two_question,
    test_questions,
)
from .reasons import random_reason
from .wording import describe
from .world import Scene, pick

__all__ = [
    "CATEGORIES", "TASKS", "Edit", "EditVerdict", "Picture", "Prompt", "Question", "Text", "Wanted",
    "answers_match", "blind_answers", "edit_verdict", "sample", "test_edits", "test_prompts",
    "test_questions",
]  # fmt: skip
DENSE_SHARE = 0.2  # part of the generation prompts that say everything; these are learned first


@dataclass(frozen=True)
class Text:
    """A text chunk; a target has a loss on its tokens."""

    text: str
    target: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture of a scene; a target has a flow loss; `kept`: a clean copy follows for what depends on it."""

    scene: Scene
    target: bool = False
    kept: bool = True


def sample(task: str, rng: Random, split: str = "train") -> list[Text | Picture]:
    """One sample of one of TASKS from `split` ("train" or "test"). Raises ValueError for an unknown task."""
    if task not in MAKERS:
        raise ValueError(f"Unknown task {task!r}; choose one of {', '.join(TASKS)}.")
    return MAKERS[task](rng, split)


def test_prompts(category: str, count: int, seed: int, split: str = "test") -> list[Prompt]:
    """`count` prompts of one of CATEGORIES, "dense", "pairs" or "reason", the same for the same seed.

    With split "test" none of their texts is used in training. Raises ValueError for an unknown category.
    """
    rng = Random(f"prompts {category} {seed} {split}")
    if category == "reason":
        return [random_reason(rng, split)[0] for _ in range(count)]
    return [random_prompt(rng, category, split) for _ in range(count)]


def _generate(rng: Random, split: str) -> list[Text | Picture]:
    while True:
        category = "dense" if rng.random() < DENSE_SHARE else pick(rng, CATEGORIES)
        prompt = random_prompt(rng, category, split)
        scene = prompt.scene(rng, split)
        if scene:
            return [Text(prompt.text), Picture(scene, target=True, kept=False)]


def _reason(rng: Random, split: str) -> list[Text | Picture]:
    while True:
        prompt, thought = random_reason(rng, split)
        scene = prompt.scene(rng, split)
        if scene:
            return [Text(prompt.text), Text(thought, target=True), Picture(scene, target=True, kept=False)]


def _reason_plain(rng: Random, split: str) -> list[Text | Picture]:
    prompt, _, picture = _reason(rng, split)
    return [prompt, picture]


def _edit(rng: Random, split: str) -> list[Text | Picture]:
    edit = random_edit(rng, pick(rng, EDIT_KINDS), split)
    return [Picture(edit.before), Text(edit.instruction), Picture(edit.after, target=True, kept=False)]


def _edit_turns(rng: Random, split: str) -> list[Text | Picture]:
    first = random_edit(rng, pick(rng, EDIT_KINDS), split)
    second = random_edit(rng, None, split, first.after)
    return [
        Picture(first.before),
        Text(first.instruction),
        Picture(first.after, target=True),
        Text(second.instruction),
        Picture(second.after, target=True, kept=False),
    ]


def _understand(rng: Random, split: str) -> list[Text | Picture]:
    asked = random_question(rng, split=split)
    return [Picture(asked.scenes[0]), Text(asked.question), Text(asked.answer, target=True)]


def _understand_think(rng: Random, split: str) -> list[Text | Picture]:
    asked = random_short_question(rng, split)
    return [Picture(asked.scenes[0]), Text(asked.question), Text(asked.thought, target=True)]


def _understand_two(rng: Random, split: str) -> list[Text | Picture]:
    asked = random_two_question(rng, split)
    return [*map(Picture, asked.scenes), Text(asked.question), Text(asked.answer, target=True)]


def _story(rng: Random, split: str) -> list[Text | Picture]:
    prompt, picture = _generate(rng, split)
    edit = random_edit(rng, None, split, picture.scene)
    return [
        prompt,
        Picture(picture.scene, target=True),
        Text(DESCRIBE),
        Text(describe(picture.scene), target=True),
        Text(edit.instruction),
        Picture(edit.after, target=True, kept=False),
    ]


MAKERS = {
    "generate": _generate,
    "reason": _reason,
    "reason_plain": _reason_plain,
    "edit": _edit,
    "edit_turns": _edit_turns,
    "understand": _understand,
    "understand_think": _understand_think,
    "understand_two": _understand_two,
    "story": _story,
}
TASKS = tuple(MAKERS)
