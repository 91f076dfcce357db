"""How things and scenes are put into words: one way for prompts, answers, thoughts and instructions."""

from __future__ import annotations

from .world import Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def looks(shape: str, color: str | None = None, size: str | None = None) -> str:
    """Size, colour and shape, as far as they are given: "large red circle"."""
    return " ".join(word for word in (size, color, shape) if word)


def plural(phrase: str, count: int) -> str:
    """A counted phrase: "one blue cross", "two blue crosses"."""
    ending = "" if count == 1 else "es" if phrase.endswith("s") else "s"
    return f"{NUMBERS[count]} {phrase}{ending}"


def describe_thing(thing: Thing) -> str:
    """All of a thing but its jitter: "a large red circle at the top left"."""
    return f"a {thing.size} {thing.color} {thing.shape} at the {thing.place}"


def describe(scene: Scene) -> str:
    """The dense description: every thing in reading order, then the background."""
    return f"{', '.join(map(describe_thing, scene.things))}, on a {scene.background} background"


def reference(scene: Scene, thing: Thing) -> str:
    """The thing's shortest name that means it alone: colour and shape, else with its size, else its place."""
    alike = [t for t in scene.things if (t.color, t.shape) == (thing.color, thing.shape)]
    if len(alike) == 1:
        return f"the {thing.color} {thing.shape}"
    if sum(t.size == thing.size for t in alike) == 1:
        return f"the {thing.size} {thing.color} {thing.shape}"
    return f"the {thing.color} {thing.shape} at the {thing.place}"
