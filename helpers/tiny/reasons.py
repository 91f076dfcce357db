"""Prompts that need reasoning before a picture can be drawn, with the thought that leads to it.

A quarter need one step ("as many blue circles as a triangle has corners"); the others need several in
order: arithmetic, swapped cups, and a walk on the grid. Each thought writes every intermediate state, so that
with it no single step is hard, and ends in a plain plan: "so: three blue circles".
"""

from __future__ import annotations

from itertools import combinations
from random import Random

from .prompts import Prompt, Wanted
from .wording import NUMBERS, article, looks, plural
from .world import COLORS, PLACES, SHAPES, TRAINED_PAIRS, in_test, pick, row_and_column

COUNT_FACTS = {
    1: ("the earth has moons", "a unicorn has horns", "a snail has feet"),
    2: ("a bicycle has wheels", "a face has eyes", "a bird has wings"),
    3: (
        "a triangle has corners",
        "a triangle has sides",
        "a tricycle has wheels",
        "a traffic light has lamps",
    ),
    4: ("a square has corners", "a square has sides", "a car has wheels", "a dog has legs"),
}
COLOR_FACTS = {
    "red": ("blood", "a ripe tomato"),
    "orange": ("a carrot", "a pumpkin"),
    "yellow": ("a lemon", "a banana"),
    "green": ("grass", "a frog"),
    "cyan": ("a swimming pool", "turquoise"),
    "blue": ("the sky", "a sapphire"),
    "purple": ("a plum", "lavender"),
    "black": ("coal", "a raven"),
}
MOST = 9  # largest number on the way
SUM_STEPS = (3, 4, 5)
SWAPS = (3, 4, 5)
CUPS = 4
PAIRS_OF_CUPS = tuple(combinations(range(CUPS), 2))
FEWEST_HOPS = 2  # of the colour asked for, from cup to cup
WALK_STEPS = (5, 6, 7)
HEADINGS = ("up", "right", "down", "left")  # clockwise
MOVES = {"up": (-1, 0), "right": (0, 1), "down": (1, 0), "left": (0, -1)}  # row, column


def random_reason(rng: Random, split: str = "train") -> tuple[Prompt, str]:
    """A prompt and its thought "<think> ... so: PLAN </think>"; no test prompt's text is used in training."""
    while True:
        prompt, steps, plan = pick(rng, FAMILIES)(rng)
        if in_test(prompt.text) == (split == "test"):
            return prompt, f"<think> {steps}. so: {plan} </think>"


def _prompt(text: str, count: int, shape: str, color: str, place: str | None = None) -> Prompt:
    return Prompt(text, "reason", (Wanted(shape, color, place=place),) * count)


def _simple(rng: Random) -> tuple[Prompt, str, str]:
    """One fact: a count or a colour that is not named."""
    color, shape = pick(rng, TRAINED_PAIRS)
    if rng.random() < 0.5:
        thing = pick(rng, COLOR_FACTS[color])
        prompt = _prompt(f"{article(shape)} in the color of {thing}", 1, shape, color)
        return prompt, f"{thing} is {color}", article(looks(shape, color))
    count = pick(rng, tuple(COUNT_FACTS))
    fact = pick(rng, COUNT_FACTS[count])
    prompt = _prompt(f"as many {_plural(color, shape)} as {fact}", count, shape, color)
    return prompt, _fact(fact, count), plural(looks(shape, color), count)


def _plural(color: str, shape: str) -> str:
    return plural(looks(shape, color), 2).removeprefix("two ")


def _fact(fact: str, count: int) -> str:
    """ "a triangle has corners" with its count: "a triangle has three corners"."""
    owner, part = fact.split(" has ")
    return f"{owner} has {plural(part.removesuffix('s'), count) if part != 'feet' else 'one foot'}"


def _sums(rng: Random) -> tuple[Prompt, str, str]:
    """A count known from a fact, then three to five sums in order; all results are equally likely."""
    color, shape = pick(rng, TRAINED_PAIRS)
    goal = pick(rng, tuple(COUNT_FACTS))
    length = pick(rng, SUM_STEPS)
    while True:
        number = start = pick(rng, tuple(COUNT_FACTS))
        path = []
        for _ in range(length):
            word, number = pick(rng, SUMS[number])
            path.append((word, number))
        if number == goal:
            break
    fact = pick(rng, COUNT_FACTS[start])
    text = f"as many {_plural(color, shape)} as {fact}, {', '.join(word for word, _ in path)}"
    steps = ", ".join(f"{word} is {NUMBERS[number]}" for word, number in path)
    prompt = _prompt(text, goal, shape, color)
    return prompt, f"{_fact(fact, start)}, {steps}", plural(looks(shape, color), goal)


def _sums_from(number: int) -> tuple[tuple[str, int], ...]:
    """What can be done with a number without leaving 1 to 9: (words, result)."""
    sums = [(f"{'plus' if k > 0 else 'minus'} {NUMBERS[abs(k)]}", number + k) for k in (-4, -3, -2, -1, 1, 2, 3, 4)]
    sums += [("doubled", number * 2)] * 2 + [("halved", number // 2)] * (2 if number % 2 == 0 else 0)
    return tuple((words, result) for words, result in sums if 1 <= result <= MOST)


SUMS = {number: _sums_from(number) for number in range(1, MOST + 1)}


def _cups(rng: Random) -> tuple[Prompt, str, str]:
    """Four cups in four colours, three to five swaps; the colour asked for hops at least twice."""
    while True:
        order = rng.sample(tuple(COLORS), CUPS)
        shape, asked = pick(rng, SHAPES), int(rng.random() * CUPS)
        cups, states, swaps = list(order), [], []
        for _ in range(pick(rng, SWAPS)):
            one, two = pick(rng, [swap for swap in PAIRS_OF_CUPS if swap != (swaps[-1] if swaps else None)])
            cups[one], cups[two] = cups[two], cups[one]
            swaps.append((one, two))
            states.append(list(cups))
        color = cups[asked]
        places = [state.index(color) for state in (order, *states)]
        hops = sum(one != two for one, two in zip(places, places[1:], strict=False))
        if hops >= FEWEST_HOPS and (color, shape) in TRAINED_PAIRS:
            break
    said = [f"swap {NUMBERS[one + 1]} and {NUMBERS[two + 1]}" for one, two in swaps]
    cup = f"cup {NUMBERS[asked + 1]}"
    text = f"{article(shape)} in the color of {cup}. cups: {' '.join(order)}. {'. '.join(said)}"
    steps = ". ".join(f"{swap}: {' '.join(state)}" for swap, state in zip(said, states, strict=True))
    prompt = _prompt(text, 1, shape, color)
    return prompt, f"{steps}. {cup} is {color}", article(looks(shape, color))


def _walk(rng: Random) -> tuple[Prompt, str, str]:
    """A walk over the 3x3 grid by turns and steps; the thing stands where it ends."""
    color, shape = pick(rng, TRAINED_PAIRS)
    while True:
        row, column = row_and_column(start := pick(rng, PLACES))
        heading = int(rng.random() * 4)
        begin = f"at the {start} facing {HEADINGS[heading]}"
        steps = [begin]
        orders = _orders(rng)
        for order in orders:
            if order == "go":
                down, right = MOVES[HEADINGS[heading]]
                row, column = row + down, column + right
                if not (0 <= row < 3 and 0 <= column < 3):
                    break
                steps.append(f"go: at the {PLACES[3 * row + column]}")
            else:
                heading = (heading + (1 if order == "turn right" else -1)) % 4
                steps.append(f"{order}: facing {HEADINGS[heading]}")
        else:
            break
    place = PLACES[3 * row + column]
    name = article(looks(shape, color))
    text = f"{name} where this walk ends: start {begin}, {', '.join(orders)}"
    return _prompt(text, 1, shape, color, place), ", ".join(steps), f"{name} at the {place}"


def _orders(rng: Random) -> list[str]:
    """Turns and steps, with at least two steps after a turn, and a step at the end."""
    while True:
        orders = [pick(rng, ("go", "turn left", "turn right")) for _ in range(pick(rng, WALK_STEPS) - 1)] + ["go"]
        first_turn = next((i for i, order in enumerate(orders) if order != "go"), len(orders))
        if orders[first_turn:].count("go") >= 2:
            return orders


FAMILIES = (_simple, _sums, _cups, _walk)
