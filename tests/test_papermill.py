"""papermill's own command line: every notebook, from another directory, with other values than its
defaults.
"""

import subprocess
import sys

import nbformat
import pytest
import yaml
from conftest import ROOT, SEVEN

from helpers.parameters import check_parameters, parameters_of

# Other than the defaults and cheaper; a notebook takes those that it knows, and SEED and OUT always.
OTHER = {"NUM_TIMESTEPS": 8, "COUNT": 2}


@pytest.mark.parametrize("name", SEVEN)
def test_papermill_runs_the_notebook_from_another_directory(name, tmp_path):
    notebook = ROOT / "notebooks" / f"{name}.ipynb"
    known = parameters_of(notebook)
    values = {"SEED": known["SEED"].default + 1, "OUT": str(tmp_path / "out")}
    values |= {key: value for key, value in OTHER.items() if key in known}
    check_parameters(notebook, values)
    (tmp_path / "values.yml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "papermill", notebook, "executed.ipynb", "-f", "values.yml"]
    options = ["--no-progress-bar", "--execution-timeout", "300"]
    ran = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]

    assert "Passed unknown parameter" not in ran.stderr
    cells = nbformat.read(tmp_path / "executed.ipynb", as_version=4).cells
    assert all(cell.execution_count for cell in cells if cell.cell_type == "code" and cell.source)
    assert (tmp_path / "out" / f"{name}.json").is_file(), "the notebook records nothing in OUT"
