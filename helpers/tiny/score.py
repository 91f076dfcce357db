"""Scores of a tiny BAGEL on scenes that its training never saw, through the public verbs.

`python -m helpers.tiny.score [--model tiny|FOLDER] [--weights fp8] [--samples 512] [--only edits,frames] ...`
prints every row with what it is compared to, then a table, and writes one JSON file after each section:

    settings    model, weights, samples, steps, step_cache, batch, and what differs from the verbs' defaults
    seed        of test samples, of the pictures' noise and of posterior samples
    torch       version
    device      "cpu", or the card's name
    seconds     {section: seconds}
    results     {section: {row: {"value", "unit", "samples", "beside": {name: value}}}}
    errors      {section: traceback} of the sections that failed; {} when none did

`beside` holds baselines and ablations in the same unit. Units: "%" of the samples, "dB", and "% of side", a
distance in percent of the frame's side; there the samples are balls. 512 samples tell a share near 90 % to
about 2.6 points (two standard errors), the 73 of one kind of edit to about 7. Pictures are judged by
`reader.py`, which counts a doubtful object as wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image

from ..bagel.images import to_picture as decoded_picture
from ..display import grid, table
from ..hardware import inspect
from ..pipeline import BagelPipeline, load_bagel
from . import clips as moving
from .batches import GIVEN_FRAMES, PREDICTED_FRAMES, PROMPTED_FRAMES
from .edits import Edit, EditVerdict, edit_verdict, shows, test_edits
from .prompts import CATEGORIES, Prompt
from .questions import (
    Question,
    answers_match,
    blind_answers,
    random_short_question,
    random_two_question,
    test_questions,
)
from .reader import read
from .reasons import random_reason
from .tasks import test_prompts
from .verdicts import in_words
from .world import draw, random_scene, to_picture

BATCH = {"cpu": 32, "cuda": 256}  # samples a call of a verb
MAX_NEW_TOKENS = 90  # the longest true text of these tests, a thought, has 65 tokens
# Without guidance: where a ball goes next is a fact to be predicted, not a wish to be followed more strongly.
FRAMES = {"cfg_text_scale": 1.0}
PROMPTED = {**FRAMES, "height": moving.SIDE, "width": moving.SIDE}
BLIND_SAMPLES = 5000  # training questions about two pictures that the blind guesser learns from
CLOSE = 0.05  # of the side: mean distance up to which a film counts as right on a contact sheet
SHOWN_SIDE = 128  # pixels of a picture on a contact sheet


@dataclass(frozen=True)
class Row:
    """One score, and what it is compared to, all in `unit`."""

    name: str
    value: float
    unit: str
    samples: int
    beside: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        beside = "".join(f"; {name} {value:.1f}" for name, value in self.beside.items())
        return f"{self.name}: {self.value:.1f} {self.unit} of {self.samples}{beside}"


@dataclass
class Scoring:
    """A model and how to score it.

    `batch`: samples a call of a verb; `readers`: the executor that judges pictures; `sheets`: the folder
    where each test leaves a contact sheet of `shown` samples (0: none does).
    """

    bagel: BagelPipeline
    readers: Executor
    samples: int = 512
    steps: int = 50
    seed: int = 0
    batch: int = 32
    sheets: Path = Path()
    shown: int = 0
    step_cache: str | None = None

    @property
    def flow(self) -> dict:
        """Settings of every picture."""
        return {"num_timesteps": self.steps, "step_cache": self.step_cache}

    def ask(self, verb: Callable, *columns: Sequence, **settings) -> list:
        """The results of a verb for all samples, in batches; sample i has the seed `seed + i`."""
        results = []
        for start in range(0, len(columns[0]), self.batch):
            part = slice(start, start + self.batch)
            results += verb(*(column[part] for column in columns), seed=self.seed + start, **settings)
        return results

    def judge(self, function: Callable, *columns: Sequence) -> list:
        """`function` of every sample, spread over the readers."""
        return list(self.readers.map(function, *columns, chunksize=8))

    def show(self, sheet: str, hits: Sequence[bool], look: Callable[[int], tuple[list, str]]) -> None:
        """Save a contact sheet, failures first; `look(i)` gives sample i's rows of pictures and a caption."""
        chosen = sorted(range(len(hits)), key=lambda i: hits[i])[: self.shown]
        if not chosen:
            return
        looks = [look(i) for i in chosen]
        verdicts = ["right" if hits[i] else "WRONG" for i in chosen]
        titles = [f"{verdict}: {words}" for verdict, (_, words) in zip(verdicts, looks, strict=True)]
        pictures = [_joined(rows) for rows, _ in looks]
        grid(pictures, titles, size=max(pictures[0].size)).image.save(self.sheets / f"{sheet}.png")


def _joined(rows: list[list[Image.Image]]) -> Image.Image:
    """Rows of pictures as one picture."""
    side = SHOWN_SIDE if len(rows[0]) < 5 else moving.SIDE
    step = side + 2
    joined = Image.new("RGB", (step * max(map(len, rows)) - 2, step * len(rows) - 2), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            joined.paste(picture.resize((side, side)), (j * step, i * step))
    return joined


def share(name: str, hits: Sequence[bool], **beside: Sequence[bool]) -> Row:
    """The percentage of hits, and of each column beside them (underscores in names become spaces)."""
    percent = {key.replace("_", " "): 100 * float(np.mean(column)) for key, column in beside.items()}
    return Row(name, 100 * float(np.mean(hits)), "%", len(hits), percent)


def shares(groups: Sequence[str], hits: Sequence[bool], **beside: Sequence[bool]) -> list[Row]:
    """A `share` for each group, in order of appearance, and one for all."""
    rows = []
    for name in dict.fromkeys(groups):
        members = [i for i, group in enumerate(groups) if group == name]
        columns = {key: [column[i] for i in members] for key, column in beside.items()}
        rows.append(share(name, [hits[i] for i in members], **columns))
    return [*rows, share("all", hits, **beside)]


# Sections


def autoencoder(scoring: Scoring) -> list[Row]:
    """Whether a test scene still reads entirely right after encoding (a posterior sample) and decoding."""
    rng = Random(f"autoencoder {scoring.seed}")
    scenes = [random_scene(rng, split="test") for _ in range(scoring.samples)]
    drawn = draw(scenes)
    restored = _round_trip(scoring, drawn)
    before, after = [to_picture(one) for one in drawn], [decoded_picture(one) for one in restored]
    as_drawn, hits = (
        [shows(reading, scene) for reading, scene in zip(scoring.judge(read, pictures), scenes, strict=True)]
        for pictures in (before, after)
    )
    psnr = -10 * torch.log10((restored.clamp(-1, 1) - drawn).square().mean() / 4).item()
    scoring.show("autoencoder", hits, lambda i: ([[before[i], after[i]]], f"reads as {in_words(after[i])}"))
    return [share("read right", hits, as_drawn=as_drawn), Row("PSNR", psnr, "dB", len(scenes))]


@torch.inference_mode()
def _round_trip(scoring: Scoring, pixels: torch.Tensor) -> torch.Tensor:
    """[count, 3, 128, 128] in [-1, 1], encoded and decoded."""
    autoencoder, device = scoring.bagel.autoencoder, scoring.bagel.model.device
    generator, parts = torch.Generator().manual_seed(scoring.seed), []
    for part in pixels.to(device).split(scoring.batch):
        mean, _ = autoencoder.posterior(part)
        noise = torch.randn(mean.shape, generator=generator).to(device)
        parts.append(autoencoder.decode(autoencoder.encode(part, noise)).float().cpu())
    return torch.cat(parts)


def understanding(scoring: Scoring) -> list[Row]:
    """Questions of every kind about one picture; short ones after a thought; questions about two pictures.

    Beside them: the best answers that can be given without a picture.
    """
    rng, count = Random(f"more questions {scoring.seed}"), scoring.samples
    one = test_questions(count, scoring.seed)
    short = [random_short_question(rng, "test") for _ in range(count)]
    two = [random_two_question(rng, "test") for _ in range(count)]
    hits = _answered(scoring, "understanding", one)
    rows = shares([q.kind for q in one], hits, blind=_matches(one, blind_answers(one)))
    hits = _answered(scoring, "understanding_thought", short, think=True)
    rows.append(share("short, after a thought", hits, blind=_matches(short, blind_answers(short))))
    hits = _answered(scoring, "understanding_two", two)
    return [*rows, share("two pictures", hits, blind=_matches(two, _blind_two(two)))]


def _answered(scoring: Scoring, sheet: str, questions: list[Question], think: bool = False) -> list[bool]:
    pictures = [[to_picture(picture) for picture in draw(q.scenes)] for q in questions]
    texts, limit = [q.question for q in questions], MAX_NEW_TOKENS
    answers = scoring.ask(scoring.bagel.understand, pictures, texts, think=think, max_new_tokens=limit)
    hits = _matches(questions, [answer.text for answer in answers])

    def look(i: int) -> tuple[list, str]:
        thought = f" ({answers[i].thought})" if think else ""
        return [pictures[i]], f"{texts[i]} {answers[i].text!r}{thought}, truth {questions[i].answer!r}"

    scoring.show(sheet, hits, look)
    return hits


def _matches(questions: list[Question], texts: list[str]) -> list[bool]:
    return [answers_match(text, q.answer) for text, q in zip(texts, questions, strict=True)]


def _blind_two(questions: list[Question]) -> list[str]:
    """The most frequent answers in training to the same words, else to the same kind, about two pictures."""
    rng, by_text, by_kind = Random("blind two"), defaultdict(Counter), defaultdict(Counter)
    for _ in range(BLIND_SAMPLES):
        asked = random_two_question(rng)
        by_text[asked.question][asked.answer] += 1
        by_kind[asked.kind][asked.answer] += 1
    return [(by_text.get(q.question) or by_kind[q.kind]).most_common(1)[0][0] for q in questions]


def generate(scoring: Scoring) -> list[Row]:
    """GenEval's six categories and their mean; prompts that say everything; pairs never trained together.

    Beside them: the prompts that the picture of the next prompt in their category satisfies.
    """
    rows = []
    for category in (*CATEGORIES, "dense", "pairs"):
        prompts = test_prompts(category, scoring.samples, scoring.seed)
        _, hits, shuffled = _drawn(scoring, f"generate_{category}", prompts)
        rows.append(share(category, hits, shuffled_prompts=shuffled))
    six = rows[: len(CATEGORIES)]
    beside = {key: float(np.mean([row.beside[key] for row in six])) for key in six[0].beside}
    total = sum(row.samples for row in six)
    mean = Row("mean of six", float(np.mean([row.value for row in six])), "%", total, beside)
    return [*six, mean, *rows[len(six) :]]


def _drawn(scoring: Scoring, sheet: str, prompts: Sequence[Prompt], **settings) -> tuple[list, list, list]:
    """Results of `generate`, whether each satisfies its prompt, and whether it satisfies the one before."""
    texts = [prompt.text for prompt in prompts]
    results = scoring.ask(scoring.bagel.generate, texts, **scoring.flow, **settings)
    readings = scoring.judge(read, [result.image for result in results])
    hits, shuffled = (
        [prompt.satisfied(reading) for prompt, reading in zip(prompts, column, strict=True)]
        for column in (readings, [*readings[1:], readings[0]])
    )

    def look(i: int) -> tuple[list, str]:
        picture, thought = results[i].image, results[i].thought
        return [[picture]], f"{texts[i]} | {f'{thought} | ' if thought else ''}reads as {in_words(picture)}"

    scoring.show(sheet, hits, look)
    return results, hits, shuffled


def reason(scoring: Scoring) -> list[Row]:
    """Prompts that need reasoning, after a written thought; how many thoughts are true word for word.

    Beside them: the same prompts without a thought, and with one the prompts that the next picture satisfies.
    """
    rng = Random(f"reason {scoring.seed}")
    prompts, truths = zip(*(random_reason(rng, "test") for _ in range(scoring.samples)), strict=True)
    thinking = {"think": True, "max_think_tokens": MAX_NEW_TOKENS}
    results, hits, shuffled = _drawn(scoring, "reason_thought", prompts, **thinking)
    _, without, _ = _drawn(scoring, "reason_no_thought", prompts)
    beside = {"without_a_thought": without, "shuffled_prompts": shuffled}
    exact = [result.thought.strip() == truth for result, truth in zip(results, truths, strict=True)]
    families = [reason_family(prompt) for prompt in prompts]
    return [*shares(families, hits, **beside), share("thought word for word", exact)]


def reason_family(prompt: Prompt) -> str:
    """Which of `reasons.py`'s families a prompt is of, told by its words: simple, sums, cups or walk."""
    if "cups:" in prompt.text:
        return "cups"
    if "where this walk ends" in prompt.text:
        return "walk"
    return "sums" if "," in prompt.text else "simple"


def edits(scoring: Scoring) -> list[Row]:
    """The seven kinds of edit with the untouched things kept, and which part of them went right.

    Beside them: the input picture handed back unchanged, and the same edits through one encoder alone.
    """
    chosen = test_edits(scoring.samples, scoring.seed)
    before = [to_picture(picture) for picture in draw([edit.before for edit in chosen])]
    beside = {"input_unchanged": scoring.judge(edit_verdict, chosen, before, before)}
    beside["VAE_alone"] = _edited(scoring, chosen, before, "vae")
    beside["ViT_alone"] = _edited(scoring, chosen, before, "vit")
    beside = {name: [verdict.right for verdict in verdicts] for name, verdicts in beside.items()}
    both = _edited(scoring, chosen, before, "both")
    return [
        *shares([edit.kind for edit in chosen], [verdict.right for verdict in both], **beside),
        share("changed as told", [verdict.changed for verdict in both]),
        share("the rest reads the same", [verdict.kept_read for verdict in both]),
        share("the rest keeps its pixels", [verdict.kept_pixels for verdict in both]),
    ]


def _edited(scoring: Scoring, chosen: list[Edit], before: list[Image.Image], encoders: str) -> list[EditVerdict]:
    told = [edit.instruction for edit in chosen]
    settings = {**scoring.flow, "encoders": encoders}
    after = [result.image for result in scoring.ask(scoring.bagel.edit, before, told, **settings)]
    verdicts = scoring.judge(edit_verdict, chosen, after, before)

    def look(i: int) -> tuple[list, str]:
        verdict, truth = verdicts[i], to_picture(draw([chosen[i].after])[0])
        words = f"{'' if verdict.changed else 'not '}changed as told, "
        words += f"rest {'kept' if verdict.kept_read else 'lost'} and {verdict.difference:.3f} off"
        return [[before[i], after[i], truth]], f"{told[i]} | {words}; before, after, truth"

    scoring.show(f"edits_{encoders}", [verdict.right for verdict in verdicts], look)
    return verdicts


def frames(scoring: Scoring) -> list[Row]:
    """The balls' distance from their true centres: ten frames after three given ones, and eight from a text.

    Beside them: the last centres copied (of a text: those it starts at), and a straight line, blind to walls.
    A ball that is not found is a whole side away; a ball too many is not counted.
    """
    total = GIVEN_FRAMES + PREDICTED_FRAMES
    chosen = moving.test_clips(scoring.samples, scoring.seed, total)
    given = [[to_picture(frame) for frame in film[:GIVEN_FRAMES]] for film in moving.draw_clips(chosen)]
    settings = {"count": PREDICTED_FRAMES, **scoring.flow, **FRAMES}
    films = [result.frames for result in scoring.ask(scoring.bagel.predict_frames, given, **settings)]
    guesses = {"last frame copied": moving.copy_last, "straight line": moving.straight_line}
    beside = {name: _guess_errors(chosen, guess, GIVEN_FRAMES) for name, guess in guesses.items()}
    errors = _film_errors(scoring, "frames", chosen, films, GIVEN_FRAMES)
    return [*_error_rows("frame", errors, beside), *_prompted(scoring)]


def _prompted(scoring: Scoring) -> list[Row]:
    chosen = moving.test_clips(scoring.samples, scoring.seed, PROMPTED_FRAMES, prompted=True)
    settings = {"count": PROMPTED_FRAMES, **scoring.flow, **PROMPTED}

    def from_text(prompts: list[str], **more) -> list:
        return scoring.bagel.predict_frames([], prompt=prompts, **more)

    results = scoring.ask(from_text, [moving.clip_prompt(clip) for clip in chosen], **settings)
    errors = _film_errors(scoring, "frames_prompted", chosen, [result.frames for result in results], 0)
    start = {"start copied": _guess_errors(chosen, moving.copy_last, 0)}
    return _error_rows("prompted frame", errors, start)


def _film_errors(scoring: Scoring, sheet: str, chosen: list, films: list, start: int) -> np.ndarray:
    """Pixels from each ball to its true centre, float [frames, balls of all films], from frame `start` on."""
    errors = scoring.judge(moving.ball_errors, chosen, films, [start] * len(films))
    far = [float(film.mean()) / moving.SIDE for film in errors]

    def look(i: int) -> tuple[list, str]:
        truth = [to_picture(frame) for frame in moving.draw_clips([chosen[i]])[0]]
        words = f"{moving.clip_prompt(chosen[i])} | {far[i]:.1%} of the side off; truth above"
        return [truth, [*truth[:start], *films[i]]], words

    scoring.show(sheet, [distance <= CLOSE for distance in far], look)
    return np.concatenate(errors, axis=1)


def _guess_errors(chosen: list, guess: Callable, given: int) -> np.ndarray:
    """The same for a guess from the true centres in the first `given` frames; with 0, in the first one."""
    columns = []
    for clip in chosen:
        truth = moving.positions(clip)
        later = truth[given:]
        columns.append(np.linalg.norm(guess(truth[: max(given, 1)], len(later)) - later, axis=-1))
    return np.concatenate(columns, axis=1)


def _error_rows(name: str, errors: np.ndarray, beside: dict[str, np.ndarray]) -> list[Row]:
    """A row for each frame, one for their mean, and the share of balls that were not found."""

    def mean(part: np.ndarray) -> float:
        return 100 * float(part.mean()) / moving.SIDE

    def row(words: str, part: int | slice) -> Row:
        percent = {key: mean(guess[part]) for key, guess in beside.items()}
        return Row(words, mean(errors[part]), "% of side", errors.shape[1], percent)

    rows = [row(f"{name} {i + 1}", i) for i in range(len(errors))]
    lost = share(f"{name}s, balls not found", (errors == moving.SIDE).ravel())
    return [*rows, row(f"{name}s, mean", slice(None)), lost]


SECTIONS: dict[str, Callable[[Scoring], list[Row]]] = {
    "autoencoder": autoencoder,
    "understanding": understanding,
    "generate": generate,
    "reason": reason,
    "edits": edits,
    "frames": frames,
}


# Running and reporting


def run_section(scoring: Scoring, name: str, report: dict) -> None:
    """Score one section into `report`'s seconds and results; one that raises goes to its errors instead."""
    print(f"{name} ...", flush=True)
    started = time.perf_counter()
    try:
        rows = SECTIONS[name](scoring)
    except Exception:  # whatever it is, the other sections shall still be scored
        report["errors"][name] = traceback.format_exc()
        print(report["errors"][name], file=sys.stderr, flush=True)
    else:
        print("".join(f"  {row}\n" for row in rows), end="", flush=True)
        report["results"][name] = {row.name: _without_name(row) for row in rows}
    report["seconds"][name] = round(time.perf_counter() - started, 1)


def _without_name(row: Row) -> dict:
    return {key: value for key, value in asdict(row).items() if key != "name"}


def summary(results: dict[str, dict[str, dict]]) -> str:
    """All rows of a report as an aligned table."""
    lines = []
    for section, rows in results.items():
        for name, row in rows.items():
            beside = ", ".join(f"{key} {value:.1f}" for key, value in row["beside"].items())
            lines.append((section, name, f"{row['value']:.1f} {row['unit']}", row["samples"], beside))
    return str(table(("section", "row", "score", "samples", "beside it"), lines))


def new_readers() -> Executor:
    """A process for each core, of one thread: reading a picture takes milliseconds of plain Python.

    Started afresh, not forked: a process that uses CUDA must not be forked.
    """
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(max(1, int(inspect().cores)), spawn, initializer=torch.set_num_threads, initargs=(1,))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 1 if a section failed."""
    a = _parsed(arguments)
    bagel = load_bagel(a.model, weights=a.weights, device=a.device)
    device, dtype = bagel.model.device, str(bagel.model.dtype).removeprefix("torch.")
    batch = BATCH[device.type]
    settings = {
        "model": Path(a.model).name, "weights": dtype if a.weights == "auto" else a.weights, "samples": a.samples,
        "steps": a.steps, "step_cache": a.step_cache, "batch": batch,
        "max_new_tokens": MAX_NEW_TOKENS, "frames": FRAMES, "prompted frames": PROMPTED,
    }  # fmt: skip
    report = {
        "settings": settings,
        "seed": a.seed,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "seconds": {},
        "results": {},
        "errors": {},
    }
    a.out.parent.mkdir(parents=True, exist_ok=True)
    with new_readers() as readers:
        scoring = Scoring(
            bagel, readers, a.samples, a.steps, a.seed, batch, a.out.parent, a.save_pictures, a.step_cache
        )
        for name in a.only:
            run_section(scoring, name, report)
            a.out.write_text(json.dumps(report, indent=1) + "\n")
    print(summary(report["results"]))
    return 1 if report["errors"] else 0


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny", help="tiny, or the folder of a checkpoint that was trained on this world")
    add("--samples", type=_at_least(1), default=512, help="samples of each test")
    add("--steps", type=_at_least(2), default=50, help="num_timesteps of every picture")
    add("--weights", default="auto", help="auto, or a weight format of load_bagel")
    add("--step-cache", choices=["taylorseer"], help="make pictures with the step cache")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("scores.json"), help="the file to write")
    add("--only", type=_names, default=list(SECTIONS), help=f"some of {','.join(SECTIONS)}")
    add(
        "--save-pictures",
        type=_at_least(0),
        default=0,
        help="samples on each contact sheet, a PNG beside --out",
    )
    return parser.parse_args(arguments)


def _at_least(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least {least}")
        return int(text)

    return whole


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no section {', '.join(unknown)}; choose of {','.join(SECTIONS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
