"""Nothing happens at import: a notebook's first line must not wait for torch."""

import subprocess
import sys

import pytest
from conftest import ROOT

import helpers

HEAVY = ("torch", "transformers", "matplotlib", "papermill")
LIGHT = ["helpers", "helpers.workbook", "helpers.parameters", "helpers.report", "helpers.display"]
LIGHT += ["helpers.claims", "helpers.hardware", "helpers.hub", "helpers.download"]


@pytest.mark.parametrize("module", LIGHT)
def test_importing_loads_nothing_heavy(module):
    program = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_every_public_name_is_found():
    for name in helpers.__all__:
        assert callable(getattr(helpers, name)), name
    assert dir(helpers) == sorted(helpers.__all__)


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(AttributeError, match="no name 'load_bagle'; it has load_bagel"):
        helpers.load_bagle  # noqa: B018
