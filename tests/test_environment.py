"""environment.yml, pyproject.toml and constraints.txt must not drift apart."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, metadata

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from helpers.hardware import TORCH
from helpers.hub import OFFICIAL_FILES

TEN = [
    "pytorch",
    "transformers",
    "accelerate",
    "flash-attn",
    "jupyterlab",
    "ipywidgets",
    "matplotlib",
    "pillow",
    "nbval",
    "papermill",
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEXT = (ROOT / "environment.yml").read_text()


def pip_name(name: str) -> str:
    return {"pytorch": "torch"}.get(name, name).lower().replace("_", "-")


def conda() -> dict[str, SpecifierSet]:
    """Package -> version bounds of environment.yml, under the names pip uses; conda's build strings are cut
    off.
    """
    found = {}
    for line in yaml.safe_load(TEXT)["dependencies"]:
        if isinstance(line, str):
            name, bounds, _build = re.fullmatch(r"([a-z0-9_-]+)([<>=0-9.,]*?)(=\*cuda\*)?", line).groups()
            bounds = re.sub(r"^=(?=\d)", "==", bounds)
            found[pip_name(name)] = SpecifierSet(bounds + ".*" if bounds.startswith("==") else bounds)
    return found


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def requirements(*extras: str) -> list[Requirement]:
    lines = PROJECT["dependencies"] + [line for e in extras for line in PROJECT["optional-dependencies"][e]]
    return [Requirement(line) for line in lines]


def test_the_ten_packages_are_there():
    assert {pip_name(name) for name in TEN} <= conda().keys()


def test_conda_installs_all_that_pip_would():
    missing = [one.name for one in requirements("test") if one.name not in conda()]
    assert not missing, f"add them to environment.yml, or pip will fetch them: {missing}"


@pytest.mark.parametrize("one", requirements("flash", "test"), ids=lambda one: one.name)
def test_bounds_agree(one):
    """The pinned version lies within both bounds, and conda allows nothing older than pip does."""
    bounds = conda()[one.name]
    oldest = max(spec.version for spec in bounds if spec.operator == ">=")
    assert one.specifier.contains(oldest), f"environment.yml allows {oldest}, pyproject.toml {one.specifier}"
    if one.name != "flash-attn":  # an extra, not among what is installed here
        pinned = constraints()[one.name]
        assert one.specifier.contains(pinned) and bounds.contains(pinned), (one.name, pinned)


@pytest.mark.parametrize("name", sorted(constraints()))
def test_every_pin_takes_the_oldest_python_of_the_project(name):
    """One that does not sends pip searching without end, and `make` prints nothing meanwhile."""
    try:
        known = metadata(name)
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed in this environment")
    if known["Version"].partition("+")[0] != constraints()[name]:
        pytest.skip(f"{name} is installed here in another version than the pinned one")
    needed = known.get("Requires-Python")
    oldest = next(iter(SpecifierSet(PROJECT["requires-python"]))).version
    assert needed is None or SpecifierSet(needed).contains(f"{oldest}.0"), f"{name} needs Python {needed}"


def test_python_and_torch_are_those_the_project_names():
    python = next(iter(conda()["python"])).version.removesuffix(".*")
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    assert constraints()["torch"] == TORCH == "2.13.0"
    assert conda()["torch"].contains("2.11.0") and not conda()["torch"].contains("2.10.0")


def test_every_line_of_environment_yml_has_its_reason():
    lines = [line for line in TEXT.splitlines() if line.startswith("  - ") and line != "  - pip:"]
    assert lines and all(re.search(r"  # \S+ \S+", line) for line in lines), lines


def test_environment_yml_says_what_was_not_tried_and_installs_this_package():
    assert "has not been resolved by conda here" in TEXT
    assert {"pip": ["-e ."]} in yaml.safe_load(TEXT)["dependencies"]


def test_constraints_pin_every_line_exactly_and_name_no_build():
    assert all(re.fullmatch(r"\d[\w.]*", version) for version in constraints().values())
    assert {one.name for one in requirements("test")} <= constraints().keys()


def test_the_embedded_checkpoint_is_package_data():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    suffixes = {pattern.rpartition(".")[2] for pattern in patterns["helpers.tiny"]}
    assert {file.name.rpartition(".")[2] for file in OFFICIAL_FILES} <= suffixes
