"""What can go wrong on the way, how long it is worth trying again, and what to tell whoever waits."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # of the library that carries the requests: httpx in huggingface_hub 1, httpx2 in 2
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from ..display import size
from ..hardware import AUTODL_DATA

_LONGEST_ASKED = 600  # seconds; a server that asks for more is left alone


class DownloadError(RuntimeError):
    """A download that did not end well. The message names the files and the cure; what was right is kept."""


class WrongAnswerError(Exception):
    """An answer with fewer, more or other bytes than were asked for, or twice with wrong ones."""


@dataclass(frozen=True)
class Patience:
    """How often in a row something may fail without a byte of progress, and how long is waited before each new try.

    `wait` is the first pause in seconds; each further one is twice as long, up to `longest`.
    """

    retries: int = 8
    wait: float = 1.0
    longest: float = 60.0

    def pause(self, failures: int, error: Exception) -> float | None:
        """Seconds until the next try after so many failures in a row; None where there is no use in another."""
        # A wrong answer comes from something in between that may forget it, and seldom does.
        most = min(self.retries, 2) if isinstance(error, WrongAnswerError) else self.retries
        if failures > most or not _passes(error):
            return None
        asked = _asked_pause(error)
        if asked is not None:
            return asked if asked <= _LONGEST_ASKED else None
        return min(self.wait * 2 ** (failures - 1), self.longest)


def _passes(error: Exception) -> bool:
    """Whether it may be gone after a while: a busy or broken server, a lost connection."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code in (408, 429)
    return isinstance(error, (HTTPError, WrongAnswerError))


def _asked_pause(error: Exception) -> float | None:
    """Seconds that the server's answer asks to wait, as `Retry-After` or as the hub's own rate limit."""
    if not isinstance(error, HfHubHTTPError):
        return None
    limit = parse_ratelimit_headers(error.response.headers)
    if error.response.status_code == 429 and limit and limit.remaining == 0:
        return limit.reset_in_seconds
    asked = error.response.headers.get("Retry-After", "")
    return float(asked) if asked.isdigit() else None


def unreachable(endpoint: str, repository: str, folder: object, why: object) -> DownloadError:
    """For a server that does not answer: what to try, and how to do it by hand."""
    return DownloadError(
        f"{endpoint} cannot be reached ({type(why).__name__}: {why}). Nothing that is in {folder} was lost.\n"
        "  - Where Hugging Face is blocked, ask the mirror: add --mirror\n"
        "  - Behind a proxy, set https_proxy; on AutoDL: source /etc/network_turbo\n"
        f"  - By hand: open {endpoint}/{repository}/tree/main on any machine, copy its files to {folder}, then let\n"
        f"    python -m helpers download --check --repo {repository} --to {folder}\n"
        "    say whether they are whole"
    )


def refused(error: HfHubHTTPError, repository: str, revision: str) -> Exception:
    """An answer of the hub that no retry changes, in words: ValueError for a wrong name, else DownloadError."""
    if isinstance(error, RevisionNotFoundError):
        return ValueError(f"{repository} has no revision {revision!r}: name a branch, a tag or a commit of it")
    if isinstance(error, GatedRepoError):
        return DownloadError(
            f"{repository} is gated: accept its conditions on its page, then `hf auth login`, and run this again"
        )
    if isinstance(error, RepositoryNotFoundError) or error.response.status_code == 404:
        return ValueError(f"there is no repository {repository!r} (or it is private: `hf auth login`)")
    return DownloadError(f"{repository}: the server answers {_status(error)}; try again later, or --mirror")


def disk_full(folder: object, missing: int, free: int) -> DownloadError:
    """For a disk that has less room than what is still to fetch."""
    proposal = f", such as {AUTODL_DATA} (AutoDL's data disk)" if AUTODL_DATA.is_dir() else ""
    return DownloadError(
        f"not enough disk: {size(missing)} are still to fetch and {size(free)} are free at {folder}. Free "
        f"{size(missing - free)}, or choose a larger disk with --to{proposal}. What is there is kept."
    )


def ran_out(folder: object, error: OSError) -> DownloadError:
    """For an error of the disk itself while the download runs."""
    cause = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"{error.strerror or error}"
    return DownloadError(f"{folder} cannot be written: {cause}. What is there is kept: make room and run this again.")


def said(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, HfHubHTTPError):
        return f"the server answers {_status(error)}"
    return str(error) if isinstance(error, WrongAnswerError) else f"{type(error).__name__}: {error}"


def _status(error: HfHubHTTPError) -> str:
    return f"HTTP {error.response.status_code}"
