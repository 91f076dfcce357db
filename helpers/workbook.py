"""Run the workbook's notebooks through papermill, one after the other, and keep what came of it.

A run fills a folder (`outputs/<name>/`): each executed notebook, saved after every cell, the same as a page,
what it recorded (`<notebook>.json`), `results.json` and `index.html`. `results.json` holds:

    schema      1; raised when a field changes its meaning or goes
    run         name, started and finished (UTC, ISO 8601), seconds,
                status ("passed", "failed" or "interrupted"),
                parameters (name of the file, null for the notebooks' own defaults),
                model (null: the notebooks' own),
                python, torch, transformers, processor, cards (names)
    notebooks   one for each notebook of the run, in order:
        name        file name without .ipynb
        verdict     "passed", "failed", "interrupted" or "not run"
        cells       code cells; cells_run: those that were executed
        seconds     wall time, kernel start included
        parameters  what was injected
        results     what the notebook recorded with `record`, {} if nothing
        error       null, or cell (position in the notebook from 0, null: outside any cell), execution_count
                    (the n of the page's In [n]), ename, evalue, traceback (its last lines)
"""

import argparse
import json
import logging
import os
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SCHEMA = 1
_TRACEBACK_LINES = 12
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
# Folders of somebody's machine. AutoDL's data disks are named the same on every machine, so they may appear.
_SOMEBODYS_PATH = re.compile(
    r"(?<![\w.])(/home/|/Users/|/tmp/|/var/folders/|/root/(?!autodl-)|[A-Z]:\\Users\\)[^\s\"'<>]+"
)


@dataclass
class Outcome:
    """What became of one notebook; the fields are those of `results.json`."""

    name: str
    verdict: str = "not run"
    cells: int = 0
    cells_run: int = 0
    seconds: float = 0.0
    parameters: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None


@dataclass(frozen=True)
class Plan:
    """A run that has been checked: which notebooks, with which values, into which folder.

    `source` names the parameter file (None: the notebooks' own defaults), `model` the MODEL
    of the run (None: the notebooks' own).
    """

    notebooks: tuple[Path, ...]
    values: dict[str, dict[str, Any]]
    out: Path
    source: str | None
    model: str | None


def repository() -> Path:
    """The folder that holds `helpers/` and `notebooks/`, whatever the working directory is."""
    return Path(__file__).resolve().parents[1]


def anchor(path: Path | str) -> Path:
    """An absolute path: a relative one starts at the repository, so that it means the same everywhere."""
    return repository() / Path(path).expanduser()


def record(out: Path | str, notebook: str, **values: Any) -> Path:
    """Add `values` to what `notebook` has recorded in the folder `out`; returns `<out>/<notebook>.json`.

    A relative `out` starts at the repository. NumPy and torch scalars become numbers, arrays become lists.
    Raises TypeError or ValueError, naming the value, for what JSON cannot hold (objects, NaN, infinity).
    """
    file = anchor(out) / f"{notebook}.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kept |= {name: _plain(notebook, name, value) for name, value in values.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    _write_json(file, kept)
    return file


def all_notebooks() -> list[Path]:
    """The workbook's notebooks in order: `notebooks/NN_name.ipynb`."""
    return sorted((repository() / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def select(names: list[str], among: list[Path]) -> list[Path]:
    """The notebooks that `names` mean: file names, with or without folder and suffix, or two-digit numbers.

    No names mean all. Raises ValueError for a name that means none, with those there are.
    """
    if not among:
        raise ValueError(f"there are no notebooks in {repository() / 'notebooks'}: is the clone complete?")
    chosen = []
    for name in names:
        stem = Path(name).stem
        found = [one for one in among if stem == one.stem or stem == one.stem[:2]]
        if not found:
            raise ValueError(f"no notebook {name}; there are {', '.join(one.stem for one in among)}")
        chosen += found
    return list(dict.fromkeys(chosen)) or list(among)


def plan(names: list[str], model: str | None = None, params: str | None = None, out: str | None = None) -> Plan:
    """Check everything that can be wrong before a cell runs, and say what the run will be.

    `params` is a file or the name of one in `notebooks/params`; left out, it is `tiny`, or `7b` when `model`
    is anything else than a tiny one. `model` and `out` start at the working directory when relative. Raises
    ValueError (ParameterError for the parameters).
    """
    from helpers.parameters import read_values, values_for

    notebooks = all_notebooks()
    chosen = select(names, notebooks)
    file = _params_file(params or ("tiny" if model in (None, "tiny", "random-tiny") else "7b"))
    sections = read_values(file)
    common = sections.setdefault("common", {})
    model = _model(model, needs_weights=file.stem == "7b" and "MODEL" not in common)
    folder = Path(out).expanduser().absolute() if out else repository() / "outputs" / file.stem
    common |= {"OUT": _portable(folder)} | ({"MODEL": model} if model else {})
    values = values_for(notebooks, sections)
    for of_one in values.values():
        if "MODEL" in of_one:
            of_one["MODEL"] = _model(of_one["MODEL"], needs_weights=False)
    return Plan(
        notebooks=tuple(chosen),
        values={one.stem: values[one.stem] for one in chosen},
        out=folder,
        source=file.name,
        model=common.get("MODEL"),
    )


def plan_in_place(names: list[str]) -> Plan:
    """The run of `make notebooks`: the notebooks' own defaults, nothing injected."""
    chosen = tuple(select(names, all_notebooks()))
    return Plan(chosen, {one.stem: {} for one in chosen}, repository() / "outputs" / "notebooks", None, None)


def run(todo: Plan) -> list[Outcome]:
    """Execute a plan's notebooks; a failing one does not stop the others, an interrupt keeps what there is.

    `results.json` and `index.html` are written after every notebook. After an interrupt the last verdicts are
    "interrupted" and "not run".
    """
    from helpers.report import write_index

    todo.out.mkdir(parents=True, exist_ok=True)
    os.environ.pop("JPY_SESSION_NAME", None)  # nobody watches these kernels, whoever started this one
    outcomes = [Outcome(one.stem, parameters=todo.values[one.stem]) for one in todo.notebooks]
    about = _about(todo)
    for notebook in todo.notebooks:  # what an earlier run left must not pass for this one's
        for suffix in (".ipynb", ".html", ".json"):
            (todo.out / notebook.name).with_suffix(suffix).unlink(missing_ok=True)
    try:
        for notebook, outcome in zip(todo.notebooks, outcomes, strict=True):
            _execute(notebook, todo.out, outcome)
            _write_results(todo.out, about, outcomes)
            write_index(todo.out)
    except KeyboardInterrupt:
        print("\ninterrupted: the finished notebooks are kept", flush=True)
        _write_results(todo.out, about, outcomes)
        write_index(todo.out)
    return outcomes


def put_back(todo: Plan, outcomes: list[Outcome]) -> list[str]:
    """Replace the committed notebooks by the executed ones that passed, tidied.

    A notebook in which an output names a path of this machine stays as it was; the reasons are returned.
    """
    import nbformat

    refused = []
    for notebook, outcome in zip(todo.notebooks, outcomes, strict=True):
        if outcome.verdict != "passed":
            continue
        executed = tidy(nbformat.read(todo.out / notebook.name, as_version=4))
        found = absolute_paths(executed)
        if found:
            refused.append(f"{notebook.name}: {found[0]}; print a path relative to the repository instead")
        else:
            nbformat.write(executed, notebook)
    return refused


def tidy(executed):
    """An executed notebook without what differs from run to run and from machine to machine; changes and
    returns it.

    Goes: papermill's notes and injected cells, execution times, widget states, versions. Stays: outputs,
    tags, ids.
    """
    executed.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    injected = {"injected-parameters", "papermill-error-cell-tag"}
    executed.cells = [one for one in executed.cells if not injected & set(one.metadata.get("tags", []))]
    for one in executed.cells:
        for volatile in ("papermill", "execution", "ExecuteTime"):
            one.metadata.pop(volatile, None)
    return executed


def absolute_paths(notebook) -> list[str]:
    """Where a notebook's cells or outputs name a folder of somebody's machine: "cell 3: /home/..."
    for each.
    """
    found = []
    for number, cell in enumerate(notebook.cells):
        texts = [cell.source, *(text for output in cell.get("outputs", []) for text in _texts(output))]
        found += [f"cell {number}: {match.group()}" for text in texts for match in _SOMEBODYS_PATH.finditer(text)]
    return found


def main(arguments: list[str] | None = None) -> int:
    """`python -m helpers.workbook run ...`; returns 0, 1 (a notebook failed), 2 (bad input) or 130
    (interrupted).
    """
    given = _parser().parse_args(arguments)
    try:
        todo = (
            plan_in_place(given.notebooks)
            if given.in_place
            else plan(given.notebooks, given.model, given.params, given.out)
        )
        _make_folder(todo.out)
    except ValueError as error:
        print(f"nothing was run: {error}", file=sys.stderr)
        return 2
    _announce(todo)
    outcomes = run(todo)
    _closing(todo, outcomes)
    verdicts = {outcome.verdict for outcome in outcomes}
    refused = put_back(todo, outcomes) if given.in_place else []
    print("".join(f"not put back: {reason}\n" for reason in refused), end="", file=sys.stderr)
    return 130 if verdicts & {"interrupted", "not run"} else 1 if "failed" in verdicts or refused else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m helpers.workbook", description="Run the workbook's notebooks.")
    command = parser.add_subparsers(required=True).add_parser("run", help="execute notebooks into a folder")
    command.add_argument("--model", help="tiny, random-7b, random-tiny, or the folder of the weights")
    command.add_argument("--params", help="a parameter file, or the name of one in notebooks/params (tiny, 7b)")
    command.add_argument("--out", help="the folder for the results (default: outputs/<name of the parameter file>)")
    command.add_argument("--notebooks", nargs="*", default=[], help="names or numbers (default: all)")
    command.add_argument("--in-place", action="store_true", help="execute the committed notebooks with their defaults")
    return parser


def _params_file(name: str) -> Path:
    """A path as given, or the file of that name among the workbook's own."""
    own = repository() / "notebooks" / "params" / f"{name}.yml"
    return own if own.is_file() else Path(name).expanduser().absolute()


def _model(model: str | None, needs_weights: bool) -> str | None:
    """A name that is no folder stays, a folder becomes absolute; None is the usual place if weights are needed."""
    from helpers.hub import RANDOM, fetch_command, usual_places, where

    if model in ("tiny", *RANDOM) or (model is None and not needs_weights):
        return model
    folder = Path(model).expanduser().absolute() if model else where()
    if folder is not None and (folder / "ema.safetensors").is_file():
        return str(folder)
    if model is None:
        places = ", ".join(map(str, usual_places()))
        raise ValueError(
            f"no weights found in {places}. Name their folder with MODEL=..., or fetch them: "
            f"{fetch_command(usual_places()[-1])}"
        )
    raise ValueError(
        f"MODEL={model}: no folder with ema.safetensors in it, and not tiny. To fetch the weights into it: "
        f"{fetch_command(model)}"
    )


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"no results can be put into {out} ({error.strerror}); name a folder with OUT=...") from error


def _portable(folder: Path) -> str:
    """The folder as notebooks get it: relative where it lies in the repository, so that no executed page
    names a home.
    """
    return folder.relative_to(repository()).as_posix() if folder.is_relative_to(repository()) else str(folder)


def _announce(todo: Plan) -> None:
    """Say what will run, and whether there is a card that the installed torch cannot use."""
    from helpers.hardware import inspect, unusable_card

    warning = unusable_card(inspect())
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    values = todo.source or "the notebooks' own defaults"
    count = len(todo.notebooks)
    print(f"{count} notebook{'s' * (count > 1)}, parameters: {values}, into {_portable(todo.out)}", flush=True)


def _execute(notebook: Path, out: Path, outcome: Outcome) -> None:
    """Run one notebook and fill its outcome; KeyboardInterrupt passes through with the outcome filled."""
    from papermill import PapermillExecutionError

    target = out / notebook.name
    recorded = out / f"{notebook.stem}.json"
    # The end of the line follows below; on a terminal a bar takes this place and is wiped, so the line comes whole.
    begun = "" if sys.stderr.isatty() else f"{notebook.stem:<26}"
    print(begun, end="", flush=True)
    start = time.perf_counter()
    try:
        _papermill(notebook, target, outcome.parameters)
        outcome.verdict = "passed"
    except KeyboardInterrupt:
        outcome.verdict = "interrupted"
        raise
    except PapermillExecutionError as error:
        outcome.verdict = "failed"
        cell = _own_position(notebook, error.cell_index, injected=bool(outcome.parameters))
        outcome.error = _error(cell, error.ename, error.evalue, error.traceback, error.exec_count)
    except Exception as error:  # a kernel that died or never came up: one notebook's failure, not the run's
        outcome.verdict = "failed"
        outcome.error = _error(None, type(error).__name__, str(error), [])
    finally:
        outcome.seconds = round(time.perf_counter() - start, 2)
        _finish(target, outcome)
        _count(target, outcome)
        outcome.results = json.loads(recorded.read_text(encoding="utf-8")) if recorded.is_file() else {}
        print(_line(outcome).removeprefix(begun), flush=True)


def _papermill(notebook: Path, target: Path, values: dict[str, Any]) -> None:
    """Execute one notebook with the repository as its folder; a moving bar on a terminal, none elsewhere."""
    from papermill import execute_notebook

    # It warns of parameters that it cannot find, `HEIGHT: int | None` among them; all names were checked before.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    bar = {"desc": f"{notebook.stem:<25}", "leave": False, "ncols": 80} if sys.stderr.isatty() else False
    execute_notebook(
        notebook,
        target,
        values,
        kernel_name="python3",
        cwd=repository(),
        progress_bar=bar,
        autosave_cell_every=10,
        # The kernel would warn that it listens on this machine alone, and say when it is stopped, within our lines.
        extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
    )


def _finish(target: Path, outcome: Outcome) -> None:
    """Tidy the executed notebook and lay its page beside it; where that fails, so has the notebook."""
    try:
        if target.is_file():
            _tidy(target)
    except Exception as error:  # an error of the notebook's own says more
        outcome.error = outcome.error or _error(None, type(error).__name__, str(error), [])
        outcome.verdict = "failed" if outcome.verdict == "passed" else outcome.verdict


def _tidy(target: Path) -> None:
    """Take this machine's paths out of papermill's notes, and write the page."""
    import nbformat

    from helpers.report import write_page

    executed = nbformat.read(target, as_version=4)
    for name in ("input_path", "output_path"):
        executed.metadata.get("papermill", {}).pop(name, None)
    nbformat.write(executed, target)
    write_page(executed, target.with_suffix(".html"))


def _count(target: Path, outcome: Outcome) -> None:
    """Code cells of the executed notebook and how many of them ran; the injected one does not count."""
    import nbformat

    if target.is_file():
        cells = [one for one in nbformat.read(target, as_version=4).cells if one.cell_type == "code"]
        own = [one for one in cells if "injected-parameters" not in one.metadata.get("tags", [])]
        outcome.cells, outcome.cells_run = len(own), sum(one.execution_count is not None for one in own)


def _own_position(notebook: Path, cell: int, injected: bool) -> int:
    """A cell's position in the stored notebook: papermill puts a cell of its own behind the parameters."""
    import nbformat

    cells = nbformat.read(notebook, as_version=4).cells
    at = next((n for n, one in enumerate(cells) if "parameters" in one.metadata.get("tags", [])), len(cells))
    return cell - (injected and cell > at)


def _error(
    cell: int | None, ename: str, evalue: str, traceback: list[str], execution_count: int | None = None
) -> dict[str, Any]:
    """An error as `results.json` holds it: no terminal colours, the last lines only."""
    lines = _COLOR.sub("", "\n".join(traceback)).splitlines()[-_TRACEBACK_LINES:]
    evalue = _COLOR.sub("", evalue)
    return {
        "cell": cell, "execution_count": execution_count, "ename": ename, "evalue": evalue, "traceback": lines,
    }  # fmt: skip


def _line(outcome: Outcome) -> str:
    cells = f"{outcome.cells_run}/{outcome.cells} cells" if outcome.cells else ""
    return f"{outcome.name:<26}{cells:>12}{outcome.seconds:>9.1f} s  {outcome.verdict}"


def _closing(todo: Plan, outcomes: list[Outcome]) -> None:
    """The table at the end, what failed and where, and where to look."""
    from helpers.report import failed_in

    print("\n" + "\n".join(map(_line, outcomes)))
    print(f"{'all':<26}{'':>12}{sum(outcome.seconds for outcome in outcomes):>9.1f} s")
    for outcome in outcomes:
        if outcome.error:
            print(f"\n{outcome.name}, {failed_in(outcome.error)}: {outcome.error['ename']}: {outcome.error['evalue']}")
            print("\n".join(f"    {line}" for line in outcome.error["traceback"]))
    print(f"\nresults: {_portable(todo.out)}/index.html", flush=True)


def _about(todo: Plan) -> dict[str, Any]:
    """The run's own entry of `results.json`, as far as it is known at the start."""
    from helpers.hardware import inspect

    machine = inspect()
    return {
        "name": todo.out.name,
        "started": _now(),
        "parameters": todo.source,
        "model": todo.model,
        "python": machine.python,
        "torch": machine.torch,
        "transformers": machine.transformers,
        "processor": machine.processor,
        "cards": [card.name for card in machine.cards],
    }


def _write_results(out: Path, about: dict[str, Any], outcomes: list[Outcome]) -> None:
    verdicts = {outcome.verdict for outcome in outcomes}
    worst = "interrupted" if verdicts & {"interrupted", "not run"} else "failed" if "failed" in verdicts else "passed"
    seconds = round(sum(outcome.seconds for outcome in outcomes), 2)
    whole = about | {"finished": _now(), "seconds": seconds, "status": worst}
    _write_json(out / "results.json", {"schema": SCHEMA, "run": whole, "notebooks": [asdict(one) for one in outcomes]})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    """Write beside the file and rename: an interrupt leaves the old content, never half of the new."""
    half = file.with_suffix(".json.part")
    half.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    shutil.move(half, file)


def _plain(notebook: str, name: str, value: Any) -> Any:
    """A value as JSON has it; scalars and arrays of NumPy and torch through their `tolist`."""
    value = value.tolist() if hasattr(value, "tolist") else value
    try:
        return json.loads(json.dumps(value, default=lambda one: one.tolist(), allow_nan=False))
    except (AttributeError, TypeError) as error:
        raise TypeError(f"{notebook}: cannot record {name}={value!r}: give numbers, text, lists or dicts") from error
    except ValueError as error:
        raise ValueError(
            f"{notebook}: cannot record {name}={value!r}: JSON has no NaN or infinity; use None"
        ) from error


def _texts(output) -> list[str]:
    """What an output says in text: a stream, an error, or the text forms of a result."""
    if output.output_type == "stream":
        return [output.text]
    if output.output_type == "error":
        return [output.evalue, *output.traceback]
    return [text for kind, text in output.data.items() if kind.startswith("text/") and isinstance(text, str)]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    sys.exit(main())
