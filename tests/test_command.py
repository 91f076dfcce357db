"""`python -m helpers`: what it answers, what it refuses, and that a bench keeps what it has measured."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from helpers.__main__ import main
from helpers.bench import command
from helpers.bench.measuring import Row, failed
from helpers.bench.rates import Limits


class Bagel:
    """A loaded model as the command sees it."""

    class model:  # noqa: N801 - a name of BagelPipeline
        device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, events, weights):
        self.events, self.weights = events, weights

    def close(self):
        self.events.append(f"close {self.weights}")


@pytest.fixture
def events(monkeypatch):
    """A bench of two works without a model; what it did, in order."""
    happened = []

    def load(model, weights, device):
        happened.append(f"load {weights}")
        return Bagel(happened, weights), Row("loading", weights, seconds=1.0)

    class Bench:
        def __init__(self, bagel, weights, limit, asked):
            self.weights, self.drawn = weights, []

        def rows(self):
            for work in ("first", "second"):
                happened.append(f"{work} {self.weights}")
                yield Row(work, self.weights, seconds=2.0, floor_seconds=1.0)

    monkeypatch.setattr(command, "load", load)
    monkeypatch.setattr(command, "Bench", Bench)
    monkeypatch.setattr(command, "limits", lambda device, dtype, fp8: Limits("cpu", "float32", 1e12, 2e9, fp8=3e12))
    return happened


def test_without_a_command_there_is_help(capsys):
    assert main([]) == 2
    assert "bench" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["bench", "--help"], 0), (["bentch"], 2)])
def test_help_and_unknown_commands_end_at_once(capsys, words, code):
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr()
    assert ended.value.code == code
    assert "python -m helpers bench --" in said.out if not code else "invalid choice: 'bentch'" in said.err


def test_the_program_starts_without_torch():
    command = "import sys, runpy; sys.argv[1:] = []\ntry: runpy.run_module('helpers', run_name='__main__')\n"
    command += "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "2 False"


def test_the_bench_measures_the_tiny_model(capsys, tmp_path):
    file = tmp_path / "bench.json"
    assert main(["bench", "--num-timesteps", "3", "--runs", "1", "--device", "cpu", "--json", str(file)]) == 0
    found, said = json.loads(file.read_text()), capsys.readouterr().out
    assert found["arguments"] == {
        **{"model": "tiny", "weights": ["auto"], "device": "cpu"},
        **{"runs": 1, "num_timesteps": 3},
    }
    assert found["torch"] == torch.__version__ and found["device"]
    assert found["limits"]["fp32"]["matmul"] > 0 and found["limits"]["fp32"]["fp8"] is None
    assert len(found["rows"]) == 10 and {row["weights"] for row in found["rows"]} == {"fp32"}
    for row in found["rows"]:
        assert row["error"] is None and len(row["runs"]) == 1
        assert row["work"] in said
    picture = found["rows"][1]
    assert picture["share"] == picture["floor_seconds"] / picture["seconds"]
    assert [one["work"] for one in found["losses"]] == ["text-to-image 128x128, step cache"]
    assert "/" not in file.read_text().replace("token/s", "")


def test_formats_are_measured_one_after_the_other(events, capsys):
    assert main(["bench", "--weights", "bf16", "fp8"]) == 0
    each = ("load {0}", "first {0}", "second {0}", "close {0}")
    assert events == [one.format(weights) for weights in ("bf16", "fp8") for one in each]
    said = capsys.readouterr().out
    assert "product in float32 1 TFLOP/s, in FP8 3 TFLOP/s; copy 2 GB/s" in said and "50%" in said


def test_an_error_ends_in_its_row_and_in_the_exit_code(events, monkeypatch, tmp_path):
    def load(model, weights, device, good=command.load):
        if weights == "bf61":
            raise ValueError("weights 'bf61' must be one of auto, bf16")
        return good(model, weights, device)

    monkeypatch.setattr(command, "load", load)
    file = tmp_path / "bench.json"
    assert main(["bench", "--weights", "bf61", "fp32", "--json", str(file)]) == 1
    found = [(row["work"], row["weights"], row["error"]) for row in json.loads(file.read_text())["rows"]]
    assert found[0] == ("loading", "bf61", "ValueError: weights 'bf61' must be one of auto, bf16")
    assert [row[0] for row in found[1:]] == ["loading", "first", "second"]


def test_without_limits_the_model_is_closed_and_the_next_one_measured(events, monkeypatch):
    def full(device, dtype, fp8):
        raise MemoryError("full")

    monkeypatch.setattr(command, "limits", full)
    assert main(["bench", "--weights", "bf16", "fp32"]) == 1
    assert events == ["load bf16", "close bf16", "load fp32", "close fp32"]


def test_a_row_that_fails_changes_the_exit_code_alone(events, monkeypatch):
    rows = [failed("first", "fp32", MemoryError("full")), Row("second", "fp32", seconds=1.0)]
    monkeypatch.setattr(command.Bench, "rows", lambda self: iter(rows))
    assert main(["bench"]) == 1 and events[-1] == "close auto"


def test_what_is_measured_is_kept_at_once(events, monkeypatch, tmp_path):
    file = tmp_path / "bench.json"

    def rows(self):
        yield Row("first", self.weights, seconds=1.0)
        assert [row["work"] for row in json.loads(file.read_text())["rows"]] == ["loading", "first"]
        raise KeyboardInterrupt

    monkeypatch.setattr(command.Bench, "rows", rows)
    with pytest.raises(KeyboardInterrupt):
        main(["bench", "--json", str(file)])
    assert events[-1] == "close auto"


def test_a_folder_is_recorded_without_the_way_to_it(events, tmp_path):
    file, folder = tmp_path / "bench.json", tmp_path / "BAGEL-7B-MoT"
    assert main(["bench", "--model", f"{folder}/", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["arguments"]["model"] == "BAGEL-7B-MoT"
    assert str(tmp_path) not in file.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num-timesteps", "2"], "num_timesteps 2 must be at least 3"),
        (["--runs", "0"], "runs 0 must be at least 1"),
        (["--json", "no/such/folder/b.json"], "no/such/folder"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(events, capsys, words, said):
    with pytest.raises(SystemExit) as ended:
        main(["bench", *words])
    assert ended.value.code == 2 and said in capsys.readouterr().err and events == []
