"""`python -m helpers download`: fetches the weights into a folder, goes on where it stopped, verifies what is there."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..display import table
from ..hub import MIRROR, REPOSITORIES, proposed_place
from .errors import DownloadError
from .fetching import download, resolve
from .verification import Verified, verify

EXAMPLES = """examples:
  python -m helpers download                                    the released weights, 29.6 GB
  python -m helpers download --mirror                           the same, from hf-mirror.com
  python -m helpers download --to weights llm_config.json       one file of them
  python -m helpers download --repo df11                        the weights that DFloat11 compressed
  python -m helpers download --check --to weights               verify a folder, without the network
Run the same line again after an interruption: it goes on where it stopped.
exit code: 0 all is there and verified, 1 something failed, 2 wrong use, 130 interrupted
"""


def main(arguments: list[str]) -> int:
    """Returns 0 when everything is there and verified, 1 when not, 2 for wrong names or values, 130 if interrupted."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.check and (given.files or given.mirror or given.revision or given.max_workers):
        parser.error("--check looks at the whole folder and asks nobody: give it --to and --repo alone")
    try:
        result = _check(given) if given.check else _download(given)
    except ValueError as error:
        print(f"nothing was fetched: {error}", file=sys.stderr)
        return 2
    except DownloadError as error:
        print(f"not done: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: what came is kept; run the same line again to go on", file=sys.stderr)
        return 130
    return _report(result)


def _parser() -> argparse.ArgumentParser:
    names = ", ".join(f"{short} ({full})" for short, full in REPOSITORIES.items())
    parser = argparse.ArgumentParser(
        prog="python -m helpers download",
        description="Fetch the weights, go on where it stopped, and verify every byte.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="names in the repository (default: all)")
    parser.add_argument("--repo", default="bagel", help=f"owner/name, or a short name: {names} (default: bagel)")
    parser.add_argument(
        "--to", type=Path, metavar="FOLDER", help=f"the folder (default for this machine: {proposed_place()})"
    )
    parser.add_argument("--revision", help="branch, tag or commit (default: main)")
    parser.add_argument(
        "--mirror", nargs="?", const=MIRROR, metavar="URL", help=f"ask a mirror (default: {MIRROR}); it gets no token"
    )
    parser.add_argument("--max-workers", type=int, metavar="N", help="connections at the same time (default: 8)")
    parser.add_argument("--check", action="store_true", help="only verify what the folder holds, without the network")
    return parser


def _download(given: argparse.Namespace) -> Verified:
    chosen = {"revision": given.revision, "max_workers": given.max_workers}
    named = {name: value for name, value in chosen.items() if value is not None}
    return download(given.repo, _folder(given), given.files, mirror=given.mirror, **named)


def _check(given: argparse.Namespace) -> Verified:
    return verify(_folder(given), resolve(given.repo))


def _folder(given: argparse.Namespace) -> Path:
    """Relative to where the command was called, as the shell completes it."""
    return (given.to or proposed_place(resolve(given.repo))).expanduser().absolute()


def _report(result: Verified) -> int:
    """Every file with what was compared, and the verdict."""
    rows = [(file.name, f"{file.bytes or 0:,}", file.fault or ", ".join(file.by)) for file in result.files]
    print(table(("file", "bytes", "compared"), rows))
    if result.snapshot is None:
        print(f"{result.folder} has no download.json: without the hub's checksums only the files' form was looked at")
    if result.faults:
        print(f"not right: {result}", file=sys.stderr)
        return 1
    print(f"{'done and verified' if result.snapshot else 'whole'}: {result}")
    return 0
