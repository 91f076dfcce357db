"""The runner: what it refuses, what it keeps, what it says; on small notebooks made for the test."""

import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import numpy as np
import pytest
from conftest import PARAMETERS, ROOT

from helpers import workbook
from helpers.parameters import ParameterError, check_parameters, parse_parameters, read_values, values_for

TYPES = """
COUNT: int = 3  # how many
SCALE: float = 4.0  # guidance
THINK: bool = False  # 先想 first
IMAGE: str | None = None  # a picture
SHIFTS: list[float] = [1.0, 3.0]  # shifts
"""


def plan_of(tmp_path, *notebooks, values=None):
    values = values or {}
    each = {one.stem: values for one in notebooks}
    return workbook.Plan(notebooks, each, tmp_path / "out", source="tiny.yml", model="tiny")


def results(tmp_path):
    return json.loads((tmp_path / "out" / "results.json").read_text())


def test_parameters_are_read_with_type_default_and_description():
    found = parse_parameters(TYPES)
    assert list(found) == ["COUNT", "SCALE", "THINK", "IMAGE", "SHIFTS"]
    assert (found["THINK"].type, found["THINK"].default, found["THINK"].description) == (
        "bool",
        False,
        "先想 first",
    )
    assert parse_parameters('P: str = "红 # 蓝"  # 提示 prompt')["P"].description == "提示 prompt"


def test_a_line_that_is_no_parameter_is_refused():
    with pytest.raises(ParameterError, match="NAME: type = value"):
        parse_parameters("SEED = 1")


@pytest.mark.parametrize(
    "values",
    [{"SCALE": 4}, {"THINK": True}, {"IMAGE": None}, {"IMAGE": "a.png"}, {"SHIFTS": [1, 2.5]}, {"COUNT": 0}],
)
def test_values_of_the_right_type_pass(make_notebook, values):
    check_parameters(make_notebook("00_a", parameters=TYPES.strip()), values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"COUN": 3}, "Did you mean COUNT.*Valid: COUNT, SCALE"),
        ({"count": 3}, "Did you mean COUNT"),
        ({"THINK": "false"}, "write `THINK: false` without quotes"),
        ({"THINK": 1}, "must be bool"),
        ({"COUNT": True}, "must be int"),
        ({"SCALE": True}, "must be float"),
        ({"COUNT": 2.5}, "must be int; for example `COUNT: 3`"),
        ({"SCALE": "1e-3"}, "write it with a point and a sign: `SCALE: 0.001`"),
        ({"IMAGE": 7}, 'write `IMAGE: "7"` with quotes'),
        ({"SHIFTS": [1.0, "x"]}, "must be list"),
    ],
)
def test_wrong_names_and_types_are_refused_with_the_cure(make_notebook, values, said):
    with pytest.raises(ParameterError, match=said):
        check_parameters(make_notebook("00_a", parameters=TYPES.strip()), values)


def test_common_values_reach_the_notebooks_that_know_them(make_notebook):
    first, second = make_notebook("00_a"), make_notebook("01_b", parameters="COUNT: int = 1  # how many")
    values = values_for([first, second], {"common": {"SEED": 7, "COUNT": 2}, "01_b": {"COUNT": 5}})
    assert values == {"00_a": {"SEED": 7}, "01_b": {"COUNT": 5}}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"common": {"SED": 7}}, "section common: unknown parameter SED. Did you mean SEED"),
        ({"common": {1: 7}}, "section common: unknown parameter 1. Valid"),
        ({"common": {True: 7}}, "section common: unknown parameter True"),
        ({"07_x": {}}, "section 07_x: no such notebook"),
        ({"00_a": {"COUNT": 1}}, "00_a.ipynb: unknown parameter COUNT"),
    ],
)
def test_sections_that_mean_nothing_are_refused(make_notebook, sections, said):
    with pytest.raises(ParameterError, match=said):
        values_for([make_notebook("00_a")], sections)


def test_parameter_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ParameterError, match="no parameter file"):
        read_values(tmp_path / "none.yml")
    (tmp_path / "flat.yml").write_text("SEED: 1\n")
    with pytest.raises(ParameterError, match="top level holds `common:`"):
        read_values(tmp_path / "flat.yml")
    (tmp_path / "broken.yml").write_text("common: [\n")
    with pytest.raises(ParameterError, match="not YAML"):
        read_values(tmp_path / "broken.yml")
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe")
    with pytest.raises(ParameterError, match="binary.yml is not YAML"):
        read_values(tmp_path / "binary.yml")


def test_a_run_keeps_results_and_names_the_failing_cell(make_notebook, tmp_path, capsys):
    good = make_notebook(
        "00_good",
        "from helpers import record\nrecord(OUT, '00_good', seed=SEED)",
        "from PIL import Image\nfrom helpers.display import grid\ngrid([Image.new('RGB', (8, 8), 'red')])",
    )
    bad = make_notebook("01_bad", "1 + 1", "raise ValueError('size 17 is odd')", "'never'")
    last = make_notebook("02_last", "SEED")
    values = {"SEED": 7, "OUT": str(tmp_path / "out")}
    outcomes = workbook.run(plan_of(tmp_path, good, bad, last, values=values))

    assert [one.verdict for one in outcomes] == ["passed", "failed", "passed"]
    kept = results(tmp_path)
    assert kept["schema"] == 1 and kept["run"]["status"] == "failed"
    first, second, third = kept["notebooks"]
    assert first["results"] == {"seed": 7} and first["parameters"]["SEED"] == 7
    assert (first["cells"], first["cells_run"]) == (3, 3) and third["verdict"] == "passed"
    assert second["error"]["cell"] == 3 and second["error"]["evalue"] == "size 17 is odd"
    assert (second["cells"], second["cells_run"]) == (4, 3)
    assert "ValueError" in second["error"]["traceback"][-1] and "\x1b" not in str(second["error"])

    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<img ") == 1 and "size 17 is odd" in page and 'href="00_good.ipynb"' in page
    executed = (tmp_path / "out" / "00_good.html").read_text()
    assert '<script src="http' not in executed  # a page opens without a network
    assert "00_good" in executed
    assert "00_good" in capsys.readouterr().out


def test_main_says_what_was_wrong_before_anything_runs(make_notebook, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workbook, "all_notebooks", lambda: [make_notebook("00_a", "1")])
    (tmp_path / "mine.yml").write_text("common:\n  SED: 2\n")
    out = tmp_path / "out"
    assert workbook.main(["run", "--params", str(tmp_path / "mine.yml"), "--out", str(out)]) == 2
    assert "nothing was run" in (said := capsys.readouterr().err) and "SEED" in said
    assert workbook.main(["run", "--model", "no/such/folder", "--out", str(out)]) == 2
    assert "python -m helpers download --to no/such/folder" in capsys.readouterr().err
    assert workbook.main(["run", "--model", str(tmp_path), "--out", str(out)]) == 2
    assert "no folder with ema.safetensors in it" in capsys.readouterr().err
    for section in ("common", "00_a"):
        (tmp_path / "mine.yml").write_text(f"{section}:\n  MODEL: no/such/folder\n")
        assert workbook.main(["run", "--params", str(tmp_path / "mine.yml"), "--out", str(out)]) == 2
        assert "MODEL=no/such/folder: no folder with" in capsys.readouterr().err
    assert workbook.main(["run", "--notebooks", "09", "--out", str(out)]) == 2
    assert "there are 00_a" in capsys.readouterr().err
    assert not out.exists()
    (tmp_path / "empty.yml").write_text("")
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr("helpers.parameters.values_for", lambda notebooks, sections: {"00_a": {}})
    given = ["run", "--params", str(tmp_path / "empty.yml"), "--out", str(tmp_path / "taken")]
    assert workbook.main(given) == 2
    assert "no results can be put into" in (said := capsys.readouterr().err) and "OUT=" in said


def test_a_model_with_random_weights_is_a_name(make_notebook, tmp_path, monkeypatch):
    monkeypatch.setattr(workbook, "all_notebooks", lambda: [make_notebook("00_a", "1")])
    mine = tmp_path / "mine.yml"
    mine.write_text("common:\n  SEED: 2\n")
    todo = workbook.plan([], model="random-tiny", params=str(mine), out=str(tmp_path / "out"))
    assert todo.values["00_a"]["MODEL"] == todo.model == "random-tiny"


def test_a_page_that_cannot_be_written_fails_the_notebook_and_hides_no_error(make_notebook, tmp_path, monkeypatch):
    def broken(*_):
        raise ImportError("no exporter here")

    monkeypatch.setattr("helpers.report.write_page", broken)
    good, bad = make_notebook("00_good", "1 + 1"), make_notebook("01_bad", "raise ValueError('size 17 is odd')")
    outcomes = workbook.run(plan_of(tmp_path, good, bad, values={"SEED": 7, "OUT": str(tmp_path / "out")}))
    assert [one.verdict for one in outcomes] == ["failed", "failed"]
    assert (outcomes[0].error["cell"], outcomes[0].error["evalue"]) == (None, "no exporter here")
    assert (outcomes[1].error["cell"], outcomes[1].error["evalue"]) == (2, "size 17 is odd")


def test_main_returns_1_for_a_failing_notebook_and_prints_the_table(make_notebook, tmp_path, monkeypatch, capsys):
    parameters = PARAMETERS + '\nWEIGHTS: str = "auto"  # format\nDEVICE: str = "auto"  # where'
    broken = make_notebook("00_a", "1 / 0", parameters=parameters)
    monkeypatch.setattr(workbook, "all_notebooks", lambda: [broken])
    monkeypatch.chdir(tmp_path)
    assert workbook.main(["run", "--out", "here"]) == 1
    said = capsys.readouterr().out
    assert "00_a, In [3]: ZeroDivisionError: division by zero" in said and "1/0" in said.replace(" ", "")
    assert (tmp_path / "here" / "results.json").is_file()


def test_what_an_earlier_run_left_does_not_pass_for_this_one(make_notebook, tmp_path, monkeypatch):
    one, two = make_notebook("00_a", "1"), make_notebook("01_b", "1")
    for name in ("01_b.html", "01_b.json", "07_other.html"):
        (tmp_path / name).write_text("{}")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(workbook, "_execute", interrupted)
    outcomes = workbook.run(workbook.Plan((one, two), {"00_a": {}, "01_b": {}}, tmp_path, None, None))
    assert [outcome.verdict for outcome in outcomes] == ["not run", "not run"]
    assert not (tmp_path / "01_b.html").exists() and not (tmp_path / "01_b.json").exists()
    assert (tmp_path / "07_other.html").exists()


def test_an_interrupt_keeps_the_finished_notebooks(make_notebook, tmp_path):
    notebooks = [make_notebook("00_quick", "1"), make_notebook("01_slow", "import time\ntime.sleep(300)")]
    notebooks.append(make_notebook("02_never", "1"))
    arguments = ["run", "--params", str(tmp_path / "p.yml"), "--out", str(tmp_path / "out")]
    program = (
        "import sys; from pathlib import Path; from helpers import workbook\n"
        f"files = [Path(name) for name in {[str(one) for one in notebooks]}]\n"
        "workbook.all_notebooks = lambda: files\n"
        f"sys.exit(workbook.main({arguments}))"
    )
    (tmp_path / "p.yml").write_text("common: {}\n")
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        # A shell without job control has what it starts in the background ignore the signal, tests and run alike.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(lambda: "01_slow" in read_if_there(tmp_path / "out" / "01_slow.ipynb"), process)
    wait_until(lambda: '"status": "running"' in cell_state(tmp_path / "out" / "01_slow.ipynb"), process)
    os.kill(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)

    assert process.returncode == 130 and "interrupted" in said
    assert [one["verdict"] for one in results(tmp_path)["notebooks"]] == ["passed", "interrupted", "not run"]
    assert results(tmp_path)["run"]["status"] == "interrupted"
    assert nbformat.read(tmp_path / "out" / "00_quick.ipynb", as_version=4).cells[-1].execution_count


def read_if_there(file):
    return file.read_text() if file.is_file() else ""


def cell_state(file):
    """The last cell of a notebook that is being written: half a file says nothing yet."""
    try:
        return json.dumps(json.loads(read_if_there(file))["cells"][-1])
    except (ValueError, KeyError):
        return ""


def wait_until(true, process, limit=90.0):
    end = time.monotonic() + limit
    while not true():
        assert process.poll() is None and time.monotonic() < end, "the run ended or hung before the awaited state"
        time.sleep(0.1)


def test_record_merges_and_takes_numpy(tmp_path):
    workbook.record(tmp_path, "03_x", score=np.float32(0.5), counts=np.arange(3))
    file = workbook.record(tmp_path, "03_x", seconds={"each": [np.float64(1.0)]})
    assert json.loads(file.read_text()) == {"score": 0.5, "counts": [0, 1, 2], "seconds": {"each": [1.0]}}


@pytest.mark.parametrize(("value", "error"), [(float("nan"), ValueError), (object(), TypeError)])
def test_record_refuses_what_json_cannot_hold(tmp_path, value, error):
    with pytest.raises(error, match="03_x: cannot record score="):
        workbook.record(tmp_path, "03_x", score=value)


def test_relative_paths_start_at_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert workbook.anchor("outputs/a") == ROOT / "outputs" / "a"
    assert workbook.anchor(tmp_path) == tmp_path
    assert workbook._portable(ROOT / "outputs" / "a") == "outputs/a"


def test_notebooks_are_chosen_by_name_number_or_file(make_notebook):
    among = [make_notebook("00_a"), make_notebook("01_b")]
    assert workbook.select(["01", "notebooks/00_a.ipynb"], among) == [among[1], among[0]]
    assert workbook.select([], among) == among


def test_put_back_tidies_and_refuses_somebodys_path(make_notebook, tmp_path):
    clean = make_notebook("00_clean", "6 * 7")
    telling = make_notebook("01_telling", "print('/home/' + 'somebody/x')")
    before = telling.read_text()
    ids = [cell.id for cell in nbformat.read(clean, as_version=4).cells]
    todo = plan_of(tmp_path, clean, telling)
    refused = workbook.put_back(todo, workbook.run(todo))

    assert len(refused) == 1 and "/home/somebody/x" in refused[0] and telling.read_text() == before
    stored = nbformat.read(clean, as_version=4)
    assert [cell.id for cell in stored.cells] == ids and stored.cells[-1].outputs[0].data["text/plain"] == "42"
    assert set(stored.metadata) == {"kernelspec", "language_info"}
    assert "papermill" not in clean.read_text() and 'execution"' not in clean.read_text()
