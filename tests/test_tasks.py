"""The synthetic world's prompts, edits, questions and thoughts against the truth, and the tokenizer."""

import re
from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from helpers.tiny import edits, prompts, questions, reader, reasons, tasks, tokenizer, wording, world
from helpers.tiny.reader import Reading, Seen
from helpers.tiny.tasks import Picture, Text
from helpers.tiny.world import Thing

THINK = ("Think first, then answer: <think> reasoning </think> answer", "Think first, then draw.")


def reading_of(scene, rejected=0):
    """What a perfect picture of a scene reads as."""
    things = [Seen(t.shape, t.color, t.size, t.place, *t.center, 1.0) for t in scene.things]
    return Reading(scene.background, tuple(things), rejected)


def samples(task, count, seed=0, split="train"):
    rng = Random(seed)
    return [tasks.sample(task, rng, split) for _ in range(count)]


# Samples


@pytest.mark.parametrize("task", tasks.TASKS)
def test_samples_of_a_task_have_one_layout_and_stay_in_training(task):
    drawn = samples(task, 400)
    assert len({tuple((type(p), p.target, getattr(p, "kept", None)) for p in parts) for parts in drawn}) == 1
    pictures = [part for parts in drawn for part in parts if isinstance(part, Picture)]
    assert all(world.belongs(part.scene, "train") for part in pictures)
    assert samples(task, 20) == samples(task, 20) != samples(task, 20, seed=1)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_held_out_pairs_are_never_named_in_training(task):
    text = " | ".join(p.text for parts in samples(task, 600) for p in parts if isinstance(p, Text))
    named = [pair for pair in world.HELD_OUT_PAIRS if re.search(f"{pair[0]} {pair[1]}", text)]
    assert not named


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="understand_two"):
        tasks.sample("paint", Random(0))
    with pytest.raises(ValueError, match="counting"):
        tasks.test_prompts("poem", 1, 0)
    with pytest.raises(ValueError, match="recolor"):
        edits.random_edit(Random(0), "rotate")
    with pytest.raises(ValueError, match="exists"):
        questions.random_question(Random(0), "why")


# Prompts


@pytest.mark.parametrize("category", (*prompts.MAKERS, "dense"))
def test_a_prompts_own_scenes_satisfy_it_and_others_do_not(category):
    rng = Random(1)
    for prompt in tasks.test_prompts(category, 60, seed=3):
        split = "pairs" if category == "pairs" else "test" if category == "dense" else "train"
        scene = prompt.scene(rng, split)
        if scene is None:
            continue
        assert prompt.satisfied(reading_of(scene))
        assert not prompt.satisfied(reading_of(scene, rejected=1))
        assert not prompt.satisfied(Reading(scene.background, reading_of(scene).things[1:], 0))
        first, *rest = scene.things
        shape = next(s for s in world.SHAPES if all(s != wanted.shape for wanted in prompt.wanted))
        wrong = world.make_scene([replace(first, shape=shape), *rest], scene.background)
        assert not prompt.satisfied(reading_of(wrong))


def test_satisfied_checks_relation_colour_owner_and_background():
    red, blue = Thing("circle", "red", "small", "left"), Thing("star", "blue", "large", "right")
    scene = world.make_scene([red, blue], "gray")
    wanted = (prompts.Wanted("circle", "red"), prompts.Wanted("star", "blue"))
    base = prompts.Prompt("", "position", wanted)
    assert base.satisfied(reading_of(scene))
    assert replace(base, relation="left of").satisfied(reading_of(scene))
    assert not replace(base, relation="right of").satisfied(reading_of(scene))
    assert not replace(base, relation="above").satisfied(reading_of(scene))
    assert not replace(base, background="white").satisfied(reading_of(scene))
    swapped = (prompts.Wanted("circle", "blue"), prompts.Wanted("star", "red"))
    assert not replace(base, wanted=swapped).satisfied(reading_of(scene))


@pytest.mark.parametrize("category", (*prompts.CATEGORIES, "dense"))
def test_no_test_prompt_is_used_in_training(category):
    rng = Random(2)
    train = {prompts.random_prompt(rng, category).text for _ in range(1500)}
    assert not train & {prompt.text for prompt in tasks.test_prompts(category, 300, seed=0)}


def test_generation_covers_the_six_categories_and_dense_descriptions():
    rng = Random(0)
    dense = sum(parts[0].text == wording.describe(parts[1].scene) for parts in samples("generate", 2000))
    assert 0.16 < dense / 2000 < 0.24
    texts = {prompts.random_prompt(rng, "position").text for _ in range(300)}
    assert all(any(f" {relation} " in text for text in texts) for relation in prompts.RELATIONS)


# Reasoning


def test_thoughts_end_in_the_plan_that_the_prompt_wants():
    rng = Random(3)
    for _ in range(1500):
        prompt, thought = reasons.random_reason(rng)
        assert thought.startswith("<think> ") and thought.endswith(" </think>")
        assert len(thought.split()) <= 60
        wanted = prompt.wanted[0]
        looks = wording.looks(wanted.shape, wanted.color)
        count = len(prompt.wanted)
        place = f" at the {wanted.place}" if wanted.place else ""
        assert thought.split("so: ")[1] in {
            f"{plan}{place} </think>" for plan in (wording.plural(looks, count), wording.article(looks))
        }


def test_sums_are_right_and_results_balanced():
    rng, goals = Random(4), Counter()
    ops = {"plus": lambda n, k: n + k, "minus": lambda n, k: n - k}
    for _ in range(1000):
        prompt, _, _ = reasons._sums(rng)
        fact, *steps = prompt.text.split(" as ", 1)[1].split(" as ")[-1].split(", ")
        number = next(n for n, facts in reasons.COUNT_FACTS.items() if fact in facts)
        for word, *rest in map(str.split, steps):
            if rest:
                number = ops[word](number, wording.NUMBERS.index(rest[0]))
            else:
                assert word == "doubled" or number % 2 == 0
                number = number * 2 if word == "doubled" else number // 2
        assert number == len(prompt.wanted)
        goals[number] += 1
    assert min(goals.values()) > 200 and len(goals) == 4


def test_cups_are_swapped_right():
    rng = Random(5)
    for _ in range(500):
        prompt, _, _ = reasons._cups(rng)
        head, cups, *swaps = prompt.text.split(". ")
        cups = cups.removeprefix("cups: ").split()
        for swap in swaps:
            one, two = (wording.NUMBERS.index(word) - 1 for word in swap.removeprefix("swap ").split(" and "))
            cups[one], cups[two] = cups[two], cups[one]
        assert cups[wording.NUMBERS.index(head.split()[-1]) - 1] == prompt.wanted[0].color


def test_walks_end_where_they_end():
    rng = Random(6)
    for _ in range(500):
        prompt, _, _ = reasons._walk(rng)
        begin, *orders = prompt.text.split(": start at the ")[1].split(", ")
        start, facing = begin.split(" facing ")
        (row, column), way = (
            world.row_and_column(start),
            {"up": -1j, "right": 1, "down": 1j, "left": -1}[facing],
        )
        spot = complex(column, row)
        for order in orders:
            if order == "go":
                spot += way
            else:
                way *= 1j if order == "turn right" else -1j
        assert world.PLACES[int(3 * spot.imag + spot.real)] == prompt.wanted[0].place


def test_neither_the_last_step_nor_the_start_gives_a_sum_away():
    rng = Random(7)
    drawn = [reasons._sums(rng)[0] for _ in range(4000)]
    by_last = {}
    for prompt in drawn:
        by_last.setdefault(prompt.text.split(", ")[-1], Counter())[len(prompt.wanted)] += 1
    guessed = sum(counts.most_common(1)[0][1] for counts in by_last.values())
    assert guessed / len(drawn) < 0.5


# Edits


def test_edits_change_what_they_say_and_nothing_else():
    for edit in tasks.test_edits(210, seed=1):
        before, after = set(edit.before.things), set(edit.after.things)
        gone, new = before - after, after - before
        expected = {"remove": (1, 0), "add": (0, 1), "background": (0, 0)}.get(edit.kind, (1, 1))
        assert (len(gone), len(new)) == expected
        assert (edit.before.background == edit.after.background) == (edit.kind != "background")
        assert world.belongs(edit.before, "test") and not world.held_out(edit.after.things)
        differing = {
            name
            for old, thing in zip(gone, new, strict=False)
            for name in ("shape", "color", "size", "place")
            if getattr(old, name) != getattr(thing, name)
        }
        allowed = {"recolor": {"color"}, "move": {"place"}, "resize": {"size"}, "replace": {"shape", "color"}}
        assert differing <= allowed.get(edit.kind, set())


def test_test_edits_are_balanced_over_kinds():
    assert set(Counter(edit.kind for edit in tasks.test_edits(70, seed=2)).values()) == {10}


def test_instructions_name_one_thing_only():
    rng = Random(8)
    for _ in range(500):
        scene = world.random_scene(rng)
        names = [wording.reference(scene, thing) for thing in scene.things]
        for thing, name in zip(scene.things, names, strict=True):
            meant = [t for t in scene.things if _is_named(t, name)]
            assert meant == [thing]


def _is_named(thing, name):
    looks, _, place = name.removeprefix("the ").partition(" at the ")
    words = {thing.size, thing.color, thing.shape}
    return set(looks.split()) <= words and place in ("", thing.place)


def test_true_results_are_judged_right_and_untouched_inputs_wrong():
    for edit in tasks.test_edits(70, seed=3):
        before, after = world.draw([edit.before, edit.after])
        verdict = tasks.edit_verdict(edit, after, before)
        assert verdict.right and verdict.difference == 0
        unchanged = tasks.edit_verdict(edit, before, before)
        assert unchanged.kept_read and unchanged.kept_pixels and not unchanged.changed


def test_a_spoilt_neighbour_is_no_right_edit():
    kept, gone = Thing("square", "red", "large", "left"), Thing("star", "blue", "small", "right")
    scene, result = world.make_scene([kept, gone], "white"), world.make_scene([kept], "white")
    edit = edits.Edit("remove", scene, "remove the blue star", result)
    before, after = world.draw([scene, result])
    paler = after.clone()
    paler[:, 50:80, :40] += 0.1
    verdict = tasks.edit_verdict(edit, paler, before)
    assert verdict.changed and verdict.kept_read and not verdict.kept_pixels and not verdict.right
    lost = tasks.edit_verdict(edit, torch.ones(3, 128, 128), before)
    assert lost.changed and not lost.kept_read
    extra = world.draw([world.make_scene([kept, Thing("star", "blue", "small", "top")], "white")])[0]
    assert not tasks.edit_verdict(edit, extra, before).changed


# Questions


def looked_up(question):
    """The answer found from the scene by other means than the question's maker; None: not covered."""
    (scene,), text = question.scenes, question.question
    things = [vars(thing) for thing in scene.things]
    if found := re.match(r"what color is the thing at the (.*)\?", text):
        return next(t["color"] for t in things if t["place"] == found[1])
    if found := re.match(r"is there an? (\w+) (\w+)\?", text):
        return "yes" if any((t["color"], t["shape"]) == found.groups() for t in things) else "no"
    if found := re.match(r"how many (\w+) things are there\?", text):
        return wording.NUMBERS[sum(t["color"] == found[1] for t in things)]
    if found := re.match(r"is the (\w+) (\w+) (left of|right of|above|below) the (\w+) (\w+)\?", text):
        one, two = (
            next(t.center for t in scene.things if (t.color, t.shape) == pair)
            for pair in ((found[1], found[2]), (found[4], found[5]))
        )
        x, y = np.subtract(one, two)
        far = {"left of": -x, "right of": x, "above": -y, "below": y}[found[3]]
        return "yes" if far > 20 else "no"
    return None


def test_answers_are_true():
    covered = Counter()
    for question in tasks.test_questions(1800, seed=4):
        answer = looked_up(question)
        assert answer in (None, question.answer), question
        covered[question.kind] += answer is not None
    assert {kind for kind, count in covered.items() if count} == {"color", "exists", "count", "relation"}


def test_answers_are_balanced():
    rng = Random(9)
    exists = Counter(questions.random_question(rng, "exists").answer for _ in range(2000))
    assert abs(exists["yes"] - exists["no"]) < 200
    relations = Counter(questions.random_question(rng, "relation").answer for _ in range(3000))
    assert abs(relations["yes"] - relations["no"]) < 300
    counts = Counter(questions.random_question(rng, "count").answer for _ in range(3000))
    assert max(counts.values()) < 0.3 * 3000 and len(counts) == 5
    kinds = Counter(questions.random_question(rng).kind for _ in range(3000))
    assert 0.3 < kinds["describe"] / 3000 < 0.4


def test_blind_answers_do_not_pay():
    asked = tasks.test_questions(450, seed=5)
    blind = tasks.blind_answers(asked, count=4000)
    right = {kind: [] for kind in questions.KINDS}
    for question, guess in zip(asked, blind, strict=True):
        right[question.kind].append(tasks.answers_match(guess, question.answer))
    assert np.mean([hit for hits in right.values() for hit in hits]) < 0.45
    assert not any(right["describe"])


def test_descriptions_match_in_any_order():
    one = "a large red circle at the top, a small blue star at the left, on a gray background"
    other = "a small blue star at the left, a large red circle at the top, on a gray background"
    assert tasks.answers_match(f" {other.capitalize()}. ", one)
    assert not tasks.answers_match(one.replace("gray", "white"), one)
    assert not tasks.answers_match(one.replace("a small blue star at the left, ", ""), one)
    assert tasks.answers_match("Yes.", "yes") and not tasks.answers_match("yes no", "yes")


def test_two_picture_questions_are_balanced_and_true():
    rng, answers = Random(10), Counter()
    for _ in range(1500):
        question = questions.random_two_question(rng)
        first, second = question.scenes
        if question.kind == "more":
            lead = len(first.things) - len(second.things)
            assert question.answer == ("the first" if lead > 0 else "the second" if lead else "both the same")
            answers[question.answer] += 1
    assert min(answers.values()) > 0.2 * answers.total()


def test_test_sets_repeat():
    for make in (tasks.test_questions, tasks.test_edits, lambda n, s: tasks.test_prompts("reason", n, s)):
        assert make(20, 1) == make(20, 1) != make(20, 2)


def test_descriptions_can_be_read_off_the_picture():
    scene = world.random_scene(Random(11), 4)
    seen = reader.read(world.draw([scene])[0])
    things = [Thing(s.shape, s.color, s.size, s.place) for s in seen.things]
    assert wording.describe(world.make_scene(things, seen.background)) == wording.describe(scene)


# Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.make_tokenizer(folder, THINK)
    return folder


def test_tokenizer_loads_as_qwen2_and_round_trips(folder):
    loaded = AutoTokenizer.from_pretrained(folder)
    assert "Qwen2" in type(loaded).__name__ and len(loaded) <= tokenizer.SIZE
    texts = [
        "a red circle",
        "  two  spaces\n\ttabs",
        "你好，世界 ✨",
        "naïve café",
        "1234",
        "".join(map(chr, range(1, 127))),
    ]
    for text in texts:
        assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=False) == text
    ids = loaded.convert_tokens_to_ids(list(tokenizer.SPECIAL))
    assert ids == list(range(len(loaded) - 5, len(loaded)))
    assert loaded("<|im_start|>a<|im_end|>")["input_ids"][::2] == [ids[1], ids[2]]


def test_tokenizer_needs_no_tokenizer_json(folder, tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    bare, full = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for parts in samples("story", 40) + samples("reason", 40):
        for part in parts:
            if isinstance(part, Text):
                assert bare(part.text)["input_ids"] == full.encode(part.text).ids


def test_tokenizer_is_reproducible_and_spends_about_a_token_a_word(folder, tmp_path):
    tokenizer.make_tokenizer(tmp_path, THINK)
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()
    loaded = AutoTokenizer.from_pretrained(folder)
    texts = [p.text for task in tasks.TASKS for parts in samples(task, 50) for p in parts if isinstance(p, Text)]
    tokens = sum(len(loaded(text)["input_ids"]) for text in texts)
    assert tokens / sum(len(re.findall(r"\w+|[^\w\s]", text)) for text in texts) < 1.1


def test_too_small_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 261"):
        tokenizer.make_tokenizer(tmp_path, THINK, size=200)
