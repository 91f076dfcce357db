"""What every committed notebook must be: one parameters cell, small cells, executed, nothing of anybody's
machine.
"""

import ast
import re
import statistics

import nbformat
import pytest
from conftest import ROOT, SEVEN

from helpers.parameters import ParameterError, parameters_of
from helpers.workbook import absolute_paths, all_notebooks

COMMON = {"MODEL", "WEIGHTS", "DEVICE", "SEED", "OUT"}
CHECKED = "nbval-check-output"
MOST_LINES, MEDIAN_LINES, MOST_OUTPUT_LINES, MOST_BYTES = 25, 6, 100, 1_500_000


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def faults_of(file):
    """Every rule that a notebook file breaks, in words."""
    notebook = nbformat.read(file, as_version=nbformat.NO_CONVERT)
    return [
        *_parameters(file),
        *_cells(notebook),
        *_texts(notebook),
        *_outputs(notebook),
        *_machine(notebook),
        *([f"{file.stat().st_size} bytes, at most {MOST_BYTES}"] if file.stat().st_size > MOST_BYTES else []),
    ]


def _parameters(file):
    try:
        parameters = parameters_of(file)
    except ParameterError as error:
        return [str(error)]
    missing = COMMON - parameters.keys()
    bare = [name for name, one in parameters.items() if not one.description]
    odd = [name for name, one in parameters.items() if ast.parse(name) and not name.isupper()]
    return [
        *([f"parameters {sorted(missing)} are missing"] if missing else []),
        *[f"parameter {name} has no comment" for name in bare],
        *[f"parameter {name} is not in capitals" for name in odd],
    ]


def _cells(notebook):
    lines = [len(cell.source.splitlines()) for cell in code_cells(notebook)]
    long = [f"a cell of {count} lines, at most {MOST_LINES}" for count in lines if count > MOST_LINES]
    median = statistics.median(lines or [0])
    ids = [cell.get("id") for cell in notebook.cells]
    return [
        *long,
        *([f"the median cell has {median} lines, at most {MEDIAN_LINES}"] if median > MEDIAN_LINES else []),
        *([] if None not in ids and len(set(ids)) == len(ids) else ["cells without an id, or with the same"]),
    ]


def _texts(notebook):
    """A text says something: it is a heading, or ends as a sentence or a listing does."""
    ends = [cell.source.rstrip().splitlines()[-1:] for cell in notebook.cells if cell.cell_type == "markdown"]
    return [f"a text that ends in {end}" for end in ends if not re.search(r"^#|[.:?!)|`*。：]$", "".join(end))]


def _outputs(notebook):
    faults = []
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        if cell.execution_count is None and cell.source.strip():
            faults.append(f"cell {number} was not executed")
        if CHECKED in cell.metadata.get("tags", []) and not cell.outputs:
            faults.append(f"cell {number} is checked but has no output")
        if any(output.output_type == "error" for output in cell.outputs):
            faults.append(f"cell {number} ended in an error")
        count = sum(len(output.get("text", "").splitlines()) for output in cell.outputs)
        if count > MOST_OUTPUT_LINES:
            faults.append(f"cell {number} prints {count} lines, at most {MOST_OUTPUT_LINES}")
    if not any(CHECKED in cell.metadata.get("tags", []) for cell in notebook.cells):
        faults.append(f"no cell is tagged {CHECKED}")
    return faults


def _machine(notebook):
    kernel = notebook.metadata.get("kernelspec", {})
    volatile = [
        f"cell {number} holds {key}"
        for number, cell in enumerate(notebook.cells)
        for key in ("papermill", "execution", "ExecuteTime")
        if key in cell.metadata
    ]
    return [
        *([] if kernel.get("name") == "python3" else [f"kernel {kernel.get('name')!r} instead of 'python3'"]),
        *(["papermill's notes in the metadata"] if "papermill" in notebook.metadata else []),
        *volatile,
        *absolute_paths(notebook),
    ]


def test_the_seven_notebooks_are_there():
    assert [file.stem for file in all_notebooks()] == SEVEN


@pytest.mark.parametrize("name", SEVEN)
def test_the_notebook_keeps_the_rules(name):
    file = ROOT / "notebooks" / f"{name}.ipynb"
    assert file.is_file(), f"{file.name} is missing"
    assert faults_of(file) == []


@pytest.mark.parametrize("name", SEVEN)
def test_the_notebook_ends_with_its_rows_of_the_ledger(name):
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    headings = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert any("What the blog says, what we saw" in text for text in headings)
    assert any(f'show("{name}"' in cell.source for cell in code_cells(notebook))


GOOD = "\n".join(f'{name}: str = "x"  # what it does' for name in sorted(COMMON))


def keep(file, change=lambda notebook: None):
    """Make the small notebook one that keeps every rule, then change it."""
    notebook = nbformat.read(file, as_version=4)
    for number, cell in enumerate(code_cells(notebook)):
        cell.execution_count = number + 1
    last = notebook.cells[-1]
    last.metadata["tags"] = [CHECKED]
    last.outputs = [nbformat.v4.new_output("stream", text="2\n")]
    change(notebook)
    nbformat.write(notebook, file)
    return faults_of(file)


def test_a_good_notebook_has_no_faults(make_notebook):
    assert keep(make_notebook("00_a", "print(2)", parameters=GOOD)) == []


def set_last(name, value):
    return lambda notebook: notebook.cells[-1].__setitem__(name, value)


def output(text):
    return [nbformat.v4.new_output("stream", text=text)]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda nb: nb.cells[1].metadata.pop("tags"), "0 cells tagged `parameters`"),
        (
            lambda nb: nb.cells[1].__setitem__("source", GOOD.replace("  # what it does", "")),
            "has no comment",
        ),
        (
            lambda nb: nb.cells[1].__setitem__("source", GOOD.replace("SEED", "seed")),
            "parameters ['SEED'] are missing",
        ),
        (set_last("source", "\n".join(["1"] * 26)), "a cell of 26 lines"),
        (set_last("execution_count", None), "was not executed"),
        (set_last("outputs", []), "is checked but has no output"),
        (set_last("outputs", output("line\n" * 101)), "prints 101 lines"),
        (set_last("outputs", output("saved in /home/somebody/out")), "/home/somebody/out"),
        (
            set_last("outputs", [nbformat.v4.new_output("error", ename="E", evalue="x", traceback=[])]),
            "an error",
        ),
        (lambda nb: nb.cells[-1].metadata.pop("tags"), "no cell is tagged"),
        (
            lambda nb: nb.cells[-1].metadata.__setitem__("execution", {"iopub.status.busy": "2026"}),
            "holds execution",
        ),
        (lambda nb: nb.metadata.__setitem__("papermill", {}), "papermill's notes"),
        (
            lambda nb: nb.metadata.kernelspec.__setitem__("name", "bagel"),
            "kernel 'bagel' instead of 'python3'",
        ),
        (set_last("outputs", output("x" * MOST_BYTES)), "at most 1500000"),
        (lambda nb: nb.cells.insert(2, nbformat.v4.new_markdown_cell("RESULTTEXT")), "ends in ['RESULTTEXT']"),
    ],
)
def test_each_broken_rule_is_found(make_notebook, change, fault):
    faults = keep(make_notebook("00_a", "print(2)", parameters=GOOD), change)
    assert any(fault in one for one in faults), faults


def test_large_cells_throughout_are_found(make_notebook):
    file = make_notebook("00_a", *["\n".join(["1"] * 8)] * 4, parameters=GOOD)
    assert any("the median cell has 8" in one for one in keep(file))


def test_the_paths_of_a_rented_machine_are_no_fault(make_notebook):
    text = "/root/autodl-tmp/BAGEL-7B-MoT, source /etc/network_turbo, /usr/bin/shutdown, https://x.org/home/a"
    assert keep(make_notebook("00_a", "print(2)", parameters=GOOD), set_last("outputs", output(text))) == []
