"""`python -m helpers bench`: measures a model in one run and says what was measured while it goes on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch

from ..hardware import inspect
from .loss import Drawn, losses, remark
from .measuring import MEMORY, Row, failed, load
from .rates import Limits, limits
from .tables import HEADER, cells, loss_table
from .works import Asked, Bench

EXAMPLES = """examples:
  python -m helpers bench --num-timesteps 10                          the tiny model, on any machine
  python -m helpers bench --model BAGEL-7B-MoT --json bench.json      the released weights, on a card
  python -m helpers bench --model random-7b --weights bf16 fp8        their sizes without the download, two formats
"""
TEXTS = {
    "prompt": "a photo of a red circle and a blue square",
    "question": "Describe the picture in detail.",
    "instruction": "make the background gray",
}
_WIDTHS = (38, 7, 9, 7, 10, 8, 8, 7, 8, 7, 11, 7, 5)
Result = TypeVar("Result")


def main(arguments: list[str]) -> int:
    """Returns 0, or 1 where a row holds an error; ends with 2 for values that it does not know."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        asked = Asked(**TEXTS, num_timesteps=given.num_timesteps, seed=1, runs=given.runs)
        report = Report(given)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for weights in given.weights:
        _measure(report, weights, asked)
    return int(any(row.error for row in report.rows))


def _measure(report: Report, weights: str, asked: Asked) -> None:
    """One format: loading, this device's rates, every work, what the faster modes lose."""
    loaded = report.attempt("loading", weights, lambda: load(report.given.model, weights, report.given.device))
    if loaded is None:
        return
    bagel, loading = loaded
    with closing(bagel):
        report.add(loading)
        device, dtype, weights = bagel.model.device, bagel.model.dtype, loading.weights
        limit = report.attempt("limits", weights, lambda: limits(device, dtype, fp8=weights == "fp8"))
        if limit is None:
            return
        report.found(weights, limit)
        bench = Bench(bagel, weights, limit, asked)
        for row in bench.rows():
            report.add(row)
        report.compare(bench.drawn)


class Report:
    """What a run has measured so far: printed, and written to the file, as soon as it is known."""

    def __init__(self, given: argparse.Namespace):
        self.given = given
        self.device = ""
        self.limits: dict[str, Limits] = {}
        self.rows: list[Row] = []
        self.drawn: list[Drawn] = []
        # A folder is named without the path to it, which is nobody's business.
        self.arguments = {**vars(given), "model": Path(given.model).resolve().name}
        del self.arguments["json"]
        self.save()  # a file that cannot be written is better known now than after the first row
        _say(_line(HEADER))

    def attempt(self, work: str, weights: str, action: Callable[[], Result]) -> Result | None:
        """What `action` gives; an error becomes a row, and None."""
        try:
            return action()
        except Exception as error:  # whatever it is, the other formats are worth measuring
            self.add(failed(work, weights, error))
            return None

    def add(self, row: Row) -> None:
        self.rows.append(row)
        _say(_line(cells(row)))
        self.save()

    def found(self, weights: str, limit: Limits) -> None:
        """The rates that the floors of a format's rows are computed with."""
        device = torch.device(limit.device)
        self.limits[weights], self.device = limit, _name(device)
        rates = {f"product in {limit.dtype}": limit.matmul, "for seconds": limit.sustained, "in FP8": limit.fp8}
        told = [f"{what} {rate / 1e12:.4g} TFLOP/s" for what, rate in rates.items() if rate]
        _say(f"{self.device}: {', '.join(told)}; copy {limit.copy / 1e9:.4g} GB/s, read and written")
        _say(f"memory: {MEMORY[device.type]}")
        self.save()

    def compare(self, drawn: list[Drawn]) -> None:
        """Adds pictures and says what all faster ones of the run lose so far."""
        self.drawn += drawn
        _say(str(loss_table(losses(self.drawn))))
        _say(remark(self.given.model))
        self.save()

    def save(self) -> None:
        if self.given.json is None:
            return
        content = {
            "device": self.device,
            "torch": torch.__version__,
            "arguments": self.arguments,
            "limits": {weights: asdict(limit) for weights, limit in self.limits.items()},
            "rows": [row.values() for row in self.rows],
            "losses": [asdict(one) for one in losses(self.drawn)],
            "remark": remark(self.given.model),
        }
        self.given.json.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{inspect().processor}, threads: {torch.get_num_threads()}"


def _line(texts: tuple[str, ...]) -> str:
    return "  ".join(text.ljust(width) for text, width in zip(texts, _WIDTHS, strict=True)).rstrip()


def _say(line: str) -> None:
    print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m helpers bench",
        description="Time and memory of pictures, edits and answers, beside what this device reached in the same run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    formats = "formats, measured one after the other; faster modes are compared with the exact picture of the first"
    parser.add_argument("--model", default="tiny", help="tiny, random-tiny, random-7b, or the folder of the weights")
    parser.add_argument("--weights", nargs="+", default=["auto"], metavar="W", help=formats)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--runs", type=int, default=3, help="measured calls of each work, after a first one")
    parser.add_argument("--num-timesteps", type=int, default=50, help="of every picture; fewer for a processor")
    parser.add_argument("--json", type=Path, metavar="FILE", help="what was measured, written again after every row")
    return parser
