"""Scores: a fake model that knows the truth gets full marks, one that hands back its input the baseline's."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.tiny import clips, questions, score, tasks
from helpers.tiny.edits import KINDS as EDIT_KINDS
from helpers.tiny.reasons import FAMILIES
from helpers.tiny.world import BACKGROUNDS, draw, to_picture

SAMPLES, SEED = 14, 3


class Autoencoder:
    """Keeps a picture as it is, but for gray of the given weight laid over it."""

    def __init__(self, gray: float = 0.0):
        self.gray = gray

    def posterior(self, pixels):
        return pixels, pixels

    def encode(self, pixels, noise):
        assert noise.shape == pixels.shape
        return pixels

    def decode(self, latents):
        return latents * (1 - self.gray) + 0.001


class Fake:
    """What a loaded model has besides its verbs."""

    def __init__(self):
        self.model = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
        self.autoencoder = Autoencoder()


class Knowing(Fake):
    """Looks the truth of every test up: by the text, and by the pictures where the text is not enough."""

    def understand(self, pictures, texts, seed, think, max_new_tokens):
        answers = {
            (asked.question, *map(_bytes, map(to_picture, draw(asked.scenes)))): asked.answer
            for asked in _all_questions()
        }
        keys = [(text, *map(_bytes, shown)) for text, shown in zip(texts, pictures, strict=True)]
        return [SimpleNamespace(text=f" {answers[key].title()}.", thought="thought") for key in keys]

    def generate(self, texts, seed, num_timesteps, step_cache, think=False, max_think_tokens=None):
        known = _all_prompts()
        return [self._drawn(*known[text], think) for text in texts]

    def _drawn(self, prompt, thought, think):
        rng = Random(prompt.text)
        scene = next(filter(None, (prompt.scene(rng, split) for split in ("pairs", "test", "train"))))
        return SimpleNamespace(image=to_picture(draw([scene])[0]), thought=thought if think else None)

    def edit(self, pictures, texts, seed, num_timesteps, step_cache, encoders):
        known = {
            (edit.instruction, _bytes(to_picture(draw([edit.before])[0]))): edit.after
            for edit in tasks.test_edits(SAMPLES, SEED)
        }
        scenes = [known[text, _bytes(picture)] for text, picture in zip(texts, pictures, strict=True)]
        return [SimpleNamespace(image=to_picture(picture)) for picture in draw(scenes)]

    def predict_frames(self, films, count, seed, num_timesteps, step_cache, cfg_text_scale, prompt=None, **size):
        if prompt is None:
            chosen = clips.test_clips(SAMPLES, SEED, 13)
            known = {_bytes(film[0]): film for film in map(_frames, chosen)}
            return [SimpleNamespace(frames=known[_bytes(film[0])][len(film) :]) for film in films]
        assert size == {"height": 64, "width": 64}
        known = {clips.clip_prompt(clip): clip for clip in clips.test_clips(SAMPLES, SEED, 8, prompted=True)}
        return [SimpleNamespace(frames=_frames(known[text])) for text in prompt]


class Idle(Knowing):
    """Says "no", draws white, hands pictures back as they came; a film stands still from its first frame."""

    def __init__(self):
        super().__init__()
        self.autoencoder = Autoencoder(gray=0.9)

    def understand(self, pictures, texts, seed, think, max_new_tokens):
        return [SimpleNamespace(text="no", thought=None)] * len(texts)

    def _drawn(self, prompt, thought, think):
        return SimpleNamespace(image=Image.new("RGB", (128, 128), "white"), thought="hm" if think else None)

    def edit(self, pictures, texts, seed, num_timesteps, step_cache, encoders):
        return [SimpleNamespace(image=picture) for picture in pictures]

    def predict_frames(self, films, count, seed, num_timesteps, step_cache, cfg_text_scale, prompt=None, **size):
        more = {"cfg_text_scale": cfg_text_scale, "prompt": prompt, **size}
        films = films or [made.frames[:1] for made in super().predict_frames([], count, 0, 2, None, **more)]
        return [SimpleNamespace(frames=[film[-1]] * count) for film in films]


def _bytes(picture) -> bytes:
    return picture.tobytes()


def _frames(clip) -> list:
    return [to_picture(frame) for frame in clips.draw_clips([clip])[0]]


@cache
def _all_questions():
    rng = Random(f"more questions {SEED}")
    short = [questions.random_short_question(rng, "test") for _ in range(SAMPLES)]
    two = [questions.random_two_question(rng, "test") for _ in range(SAMPLES)]
    return [*questions.test_questions(SAMPLES, SEED), *short, *two]


@cache
def _all_prompts() -> dict:
    known = {}
    for category in (*tasks.CATEGORIES, "dense", "pairs"):
        known |= {prompt.text: (prompt, None) for prompt in tasks.test_prompts(category, SAMPLES, SEED)}
    rng = Random(f"reason {SEED}")
    made = [score.random_reason(rng, "test") for _ in range(SAMPLES)]
    return known | {prompt.text: (prompt, thought) for prompt, thought in made}


@pytest.fixture
def scoring(tmp_path):
    """A function that scores one section with a fake: {row: Row}."""
    with ThreadPoolExecutor(1) as readers:

        def run(section, fake, shown=0):
            how = score.Scoring(fake, readers, SAMPLES, 2, SEED, 8, tmp_path, shown)
            return {row.name: row for row in score.SECTIONS[section](how)}

        yield run


PERCENT_SECTIONS = ("autoencoder", "understanding", "generate", "reason", "edits")


@pytest.mark.parametrize("section", PERCENT_SECTIONS)
def test_who_knows_the_truth_gets_full_marks(scoring, section):
    rows = scoring(section, Knowing())
    assert {row.name: row.value for row in rows.values() if row.unit == "%" and row.value < 100} == {}


def test_true_frames_are_no_distance_away(scoring):
    rows = scoring("frames", Knowing())
    assert [name for name, row in rows.items() if row.unit == "% of side" and row.value > 0.5] == []
    assert rows["frames, balls not found"].value == rows["prompted frames, balls not found"].value == 0
    assert rows["frames, mean"].beside["straight line"] > 3
    assert rows["prompted frames, mean"].beside["start copied"] > 3


def test_copied_frames_score_what_the_copied_baseline_does(scoring):
    rows = scoring("frames", Idle())
    moved = [row for row in rows.values() if row.unit == "% of side"]
    assert len(moved) == 10 + 1 + 8 + 1
    for row in moved:
        copied = row.beside["start copied" if row.name.startswith("prompted") else "last frame copied"]
        assert row.value == pytest.approx(copied, abs=0.5)


def test_a_ball_that_is_not_there_is_a_whole_side_away(scoring):
    class Blank(Knowing):
        def predict_frames(self, films, count, seed, num_timesteps, step_cache, prompt=None, **_):
            empty = SimpleNamespace(frames=[Image.new("RGB", (64, 64), "white")] * count)
            return [empty] * len(prompt or films)

    rows = scoring("frames", Blank())
    assert {row.value for row in rows.values()} == {100.0}
    assert rows["frames, balls not found"].samples == 10 * rows["frame 1"].samples


def test_unchanged_pictures_score_what_the_unchanged_baseline_does(scoring):
    rows = scoring("edits", Idle())
    assert list(rows)[:8] == [*EDIT_KINDS, "all"]
    assert {rows[kind].value - rows[kind].beside["input unchanged"] for kind in (*EDIT_KINDS, "all")} == {0.0}
    assert rows["changed as told"].value == 0 < rows["the rest keeps its pixels"].value == 100


def test_nothing_drawn_is_nothing_right(scoring):
    rows = {**scoring("generate", Idle()), **scoring("reason", Idle())}
    assert {row.value for row in rows.values()} == {0.0}
    faded = scoring("autoencoder", Idle())
    assert faded["read right"].value < 100 == faded["read right"].beside["as drawn"]
    assert faded["PSNR"].value < 20


def test_a_constant_answer_is_right_as_often_as_it_is_true(scoring):
    rows = scoring("understanding", Idle())
    asked = questions.test_questions(SAMPLES, SEED)
    assert rows["all"].value == pytest.approx(100 * np.mean([q.answer == "no" for q in asked]))
    assert rows["all"].beside["blind"] < 100
    assert rows["two pictures"].samples == rows["short, after a thought"].samples == SAMPLES


def test_who_answers_blindly_scores_what_stands_beside(scoring):
    class Parrot(Knowing):
        def understand(self, pictures, texts, seed, think, max_new_tokens):
            asked = {q.question: q for q in _all_questions()}
            chosen = [asked[text] for text in texts]
            guess = score._blind_two if len(pictures[0]) == 2 else questions.blind_answers
            return [SimpleNamespace(text=text, thought=None) for text in guess(chosen)]

    rows = scoring("understanding", Parrot())
    assert [name for name, row in rows.items() if row.value != row.beside["blind"]] == []


def test_blind_answers_about_two_pictures_are_the_usual_ones():
    asked = ("do both pictures have the same background?", "a question that was never asked")
    same, rank = score._blind_two(
        [questions.Question(k, (), q, "") for k, q in zip(("same", "rank"), asked, strict=True)]
    )
    assert same in ("yes", "no")
    assert rank in BACKGROUNDS


def test_pictures_of_other_prompts_satisfy_few(scoring):
    rows = scoring("generate", Knowing())
    six = [rows[category] for category in tasks.CATEGORIES]
    assert rows["mean of six"].samples == 6 * SAMPLES
    mean = np.mean([row.beside["shuffled prompts"] for row in six])
    assert rows["mean of six"].beside["shuffled prompts"] == pytest.approx(mean)
    assert mean < 30


def test_encoders_alone_stand_beside_both(scoring):
    class Blind(Knowing):
        def edit(self, pictures, texts, seed, num_timesteps, step_cache, encoders):
            whole = Knowing if encoders == "both" else Idle
            return whole.edit(self, pictures, texts, seed, num_timesteps, step_cache, encoders)

    row = scoring("edits", Blind())["all"]
    assert (row.value, row.beside["VAE alone"], row.beside["ViT alone"]) == (100, 0, 0)


def test_thinking_stands_beside_not_thinking(scoring):
    class Hasty(Knowing):
        def _drawn(self, prompt, thought, think):
            return (Knowing if think else Idle)._drawn(self, prompt, thought, think)

    row = scoring("reason", Hasty())["all"]
    assert (row.value, row.beside["without a thought"]) == (100, 0)


def test_samples_go_in_batches_with_seeds_that_follow(scoring):
    seen = []

    class Noting(Knowing):
        def generate(self, texts, seed, num_timesteps, step_cache, **more):
            seen.append((len(texts), seed))
            return super().generate(texts, seed, num_timesteps, step_cache, **more)

    scoring("reason", Noting())
    assert seen == [(8, SEED), (6, SEED + 8)] * 2


def test_families_are_told_apart_by_their_words():
    rng = Random(0)
    for family in FAMILIES:
        told = {score.reason_family(family(rng)[0]) for _ in range(200)}
        assert told == {family.__name__.removeprefix("_")}


def test_a_sheet_shows_failures_first(scoring, tmp_path):
    for section in score.SECTIONS:
        scoring(section, Idle(), shown=2)
    sheets = {file.stem for file in tmp_path.glob("*.png")}
    assert {
        "autoencoder",
        "understanding_two",
        "generate_pairs",
        "reason_thought",
        "frames_prompted",
    } < sheets
    assert len(sheets) == 3 + 1 + 8 + 2 + 3 + 2
    looked = []
    how = score.Scoring(Fake(), None, sheets=tmp_path, shown=3)
    picture = Image.new("RGB", (128, 128))
    how.show("few", [True, False, True, False], lambda i: looked.append(i) or ([[picture]], "words"))
    assert looked == [1, 3, 0]


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The command line with a fake model and one thread: (exit code, the written report)."""
    monkeypatch.setattr(score, "new_readers", lambda: ThreadPoolExecutor(1))

    def run(fake, *more):
        monkeypatch.setattr(score, "load_bagel", lambda model, weights, device: fake)
        out = tmp_path / "new" / "scores.json"
        code = score.main(["--samples", str(SAMPLES), "--seed", str(SEED), "--out", str(out), *more])
        return code, json.loads(out.read_text())

    return run


def test_the_file_holds_what_the_docstring_says(command, capsys):
    code, report = command(Knowing(), "--only", "autoencoder,edits", "--steps", "7")
    assert code == 0
    assert report["settings"]["steps"] == 7 and report["settings"]["samples"] == SAMPLES
    assert (report["seed"], report["torch"], report["device"]) == (SEED, torch.__version__, "cpu")
    assert list(report["results"]) == list(report["seconds"]) == ["autoencoder", "edits"]
    assert report["results"]["edits"]["add"] == {
        "value": 100.0,
        "unit": "%",
        "samples": 2,
        "beside": {"input unchanged": 0.0, "VAE alone": 100.0, "ViT alone": 100.0},
    }
    assert "edits        all                        100.0 %  14" in capsys.readouterr().out


def test_faster_modes_reach_every_picture_and_are_recorded(command):
    asked = set()

    class Watched(Knowing):
        def generate(self, *inputs, **more):
            asked.add(("generate", more["step_cache"]))
            return super().generate(*inputs, **more)

        def edit(self, *inputs, **more):
            asked.add(("edit", more["step_cache"]))
            return super().edit(*inputs, **more)

        def predict_frames(self, *inputs, **more):
            asked.add(("predict_frames", more["step_cache"]))
            return super().predict_frames(*inputs, **more)

    fast = ("--only", "generate,reason,edits,frames", "--weights", "fp8", "--step-cache", "taylorseer")
    code, report = command(Watched(), *fast)
    assert code == 0
    assert asked == {(verb, "taylorseer") for verb in ("generate", "edit", "predict_frames")}
    assert (report["settings"]["weights"], report["settings"]["step_cache"]) == ("fp8", "taylorseer")


def test_a_section_that_fails_is_named_and_the_others_still_run(command, capsys):
    class Broken(Knowing):
        def generate(self, *_, **__):
            raise RuntimeError("no paint left")

    code, report = command(Broken(), "--only", "generate,edits")
    assert code == 1
    assert "no paint left" in report["errors"]["generate"]
    assert "no paint left" in capsys.readouterr().err
    assert report["results"].keys() == {"edits"}


@pytest.mark.parametrize("wrong", [("--only", "edit"), ("--samples", "0"), ("--steps", "1"), ("--save-pictures", "-1")])
def test_what_cannot_be_scored_is_refused_at_once(command, capsys, wrong):
    with pytest.raises(SystemExit):
        command(Knowing(), *wrong)
    assert wrong[1] in capsys.readouterr().err


def test_readers_are_processes_that_judge_in_order():
    rng = Random(5)
    scenes = [score.random_scene(rng) for _ in range(3)]
    with score.new_readers() as readers:
        readings = score.Scoring(Fake(), readers).judge(score.read, [to_picture(p) for p in draw(scenes)])
    assert all(score.shows(reading, scene) for reading, scene in zip(readings, scenes, strict=True))
