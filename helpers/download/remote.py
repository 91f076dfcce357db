"""What a repository on the hub holds at one commit: names, sizes and checksums, known before a byte is fetched."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from .errors import DownloadError, Patience, refused, unreachable

_TIMEOUT = 30.0  # seconds


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub describes it.

    `checksum` is "sha256:..." of its bytes for large files (Git LFS), "git:..." (the SHA-1 of its git blob) for small
    ones, and empty where the hub gives none.
    """

    name: str
    bytes: int
    checksum: str = ""


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit: what `revision` meant when `endpoint` was asked."""

    repository: str
    revision: str
    commit: str
    endpoint: str
    files: tuple[RemoteFile, ...]

    def url(self, name: str) -> str:
        """Where a file of exactly this commit is fetched."""
        return hf_hub_url(self.repository, name, revision=self.commit, endpoint=self.endpoint)

    def named(self, names: tuple[str, ...]) -> tuple[RemoteFile, ...]:
        """The files of these names, all if there are none. Raises ValueError for a name that it does not hold."""
        unknown = sorted(set(names) - {file.name for file in self.files})
        if unknown:
            there = ", ".join(file.name for file in self.files)
            raise ValueError(f"{self.repository} holds no {', '.join(unknown)}; it holds {there}")
        return tuple(file for file in self.files if not names or file.name in names)


def look_up(
    repository: str, revision: str, endpoint: str, folder: Path, token: bool | None, patience: Patience
) -> Snapshot:
    """Ask the hub once what `revision` is and what it holds.

    `token` False sends none. A busy server is asked again; one that cannot be reached is reported at once. Raises
    ValueError for a repository or revision that does not exist, DownloadError for everything else.
    """
    api = HfApi(endpoint=endpoint, token=token)
    failures = 0
    while True:
        try:
            info = api.model_info(repository, revision=revision, files_metadata=True, timeout=_TIMEOUT)
            files = tuple(_described(one) for one in info.siblings)
            return Snapshot(repository, revision, info.sha, endpoint, files)
        except HfHubHTTPError as error:
            failures += 1
            pause = patience.pause(failures, error)
            if pause is None:
                raise refused(error, repository, revision) from error
            time.sleep(pause)
        except (HTTPError, ConnectionError) as error:
            raise unreachable(endpoint, repository, folder, error) from error
        except (ValueError, KeyError, TypeError) as error:
            raise DownloadError(
                f"{endpoint} does not answer as the hub does ({error}): is the address right, and does a login page or "
                "proxy stand in between?"
            ) from error


def _described(sibling) -> RemoteFile:
    """One entry of the hub's list. Raises ValueError for a name that leads out of the folder, or a missing size."""
    name, large = sibling.rfilename, sibling.lfs
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise ValueError(f"the file name {name!r} leads out of the folder")
    length = large.size if large else sibling.size
    if length is None:
        raise ValueError(f"no size is given for {name}")
    checksum = f"sha256:{large.sha256}" if large else f"git:{sibling.blob_id}" if sibling.blob_id else ""
    return RemoteFile(name, length, checksum)
