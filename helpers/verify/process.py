"""The official side as a process of its own: what it is given, what it says, what is said when it dies."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE, STDOUT
from tempfile import TemporaryDirectory

from safetensors.torch import load_file, save_file
from torch import Tensor

from . import official
from .exchange import Vectors, pictures_as_tensors
from .works import Works

LAST_LINES = 12


class WrongUseError(ValueError):
    """Something that the caller has to set right before anything can be compared."""


class NotProvenError(RuntimeError):
    """A run that ended without an answer."""


def check_checkout(folder: Path) -> None:
    """Raise WrongUseError, naming the first missing file, for a folder that is no official checkout."""
    missing = [name for name in official.FILES if not (folder / name).is_file()]
    if missing:
        raise WrongUseError(
            f"{folder} is no checkout of the official code: it has no {missing[0]}"
            + (f" (and {len(missing) - 1} other files)" if missing[1:] else "")
            + ". Clone github.com/ByteDance-Seed/Bagel and name that folder."
        )


def commit_of(checkout: Path) -> str:
    """The commit that a checkout stands at, "unknown" where git does not tell."""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    return said or "unknown"


def run_official(
    checkout: Path,
    python: str,
    model: Path,
    weights: str,
    device: str,
    works: Works,
    noises: dict[str, Tensor],
    say: Callable[[str], None] = print,
) -> Vectors:
    """The official code's vectors, from a process of `python` that ends before this returns.

    Raises WrongUseError for a folder that is no checkout, a Python that cannot be run and an environment that lacks a
    package; NotProvenError, with the last lines, for a run that dies.
    """
    check_checkout(checkout)
    request = {"checkout": str(checkout.resolve()), "model": str(model.resolve()), "weights": weights, "device": device}
    with TemporaryDirectory(prefix="bagel-verify-") as exchange:
        folder = Path(exchange)
        (folder / official.REQUEST).write_text(json.dumps({**request, "cases": works.cases}), encoding="utf8")
        save_file({**noises, **pictures_as_tensors(works)}, folder / official.INPUTS)
        _run([python, official.__file__, exchange], say)
        facts = json.loads((folder / official.FACTS).read_text(encoding="utf8"))
        vectors = Vectors(load_file(folder / official.VECTORS), facts)
    vectors.facts["versions"]["checkout"] = commit_of(checkout)
    return vectors


def _run(command: list[str], say: Callable[[str], None]) -> None:
    try:
        process = subprocess.Popen(command, stdout=PIPE, stderr=STDOUT, text=True, errors="replace")
    except OSError as error:
        raise WrongUseError(
            f"--python {command[0]} cannot be run ({error}): name the official environment's."
        ) from error
    last: deque[str] = deque(maxlen=LAST_LINES)
    with process:
        for line in process.stdout:
            last.append(line.rstrip())
            if line.startswith("official: "):
                say(line.rstrip())
    if process.returncode:
        raise _explained(command[0], process.returncode, list(last))


def _explained(python: str, code: int, last: list[str]) -> WrongUseError | NotProvenError:
    """The error for a run that ended with `code`, by what its last lines say."""
    said = "\n".join(last)
    lacking = re.search(r"ModuleNotFoundError: No module named '([\w.]+)'", said)
    if lacking:
        return WrongUseError(
            f"The official environment ({python}) lacks the package {lacking[1]}: install the checkout's "
            "requirements.txt there, or name another Python with --python."
        )
    if code == -9 or "OutOfMemoryError" in said or "can't allocate memory" in said:
        return NotProvenError(
            "The official code ran out of memory: make the works smaller (--size), choose another device, or run it on "
            f"a larger machine with --save and compare here with --vectors. Its last lines:\n{said}"
        )
    ended = f"was stopped by signal {-code}" if code < 0 else f"ended with code {code}"
    return NotProvenError(
        f"The official code {ended}. It wants the versions in the checkout's requirements.txt (transformers 4.49); "
        f"--python names the Python of such an environment. Its last lines:\n{said}"
    )


def this_python() -> str:
    return sys.executable
