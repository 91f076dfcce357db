"""`download`: a repository of the hub into a folder, fetched as far as it is missing, and verified."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import WeakFileLock, build_hf_headers, validate_repo_id

from ..display import ByteProgress, size
from ..hardware import AUTODL_DATA
from ..hub import OFFICIAL_MODEL, REPOSITORIES, free_bytes, proposed_place
from ..workbook import anchor
from .errors import DownloadError, Patience, disk_full, ran_out, unreachable
from .parts import PartFile
from .record import read_record, write_record
from .remote import RemoteFile, Snapshot, look_up
from .transfer import Transfer
from .verification import CheckedFile, Verified, check_content, check_files

LOCK = ".download.lock"


def download(
    repository: str = OFFICIAL_MODEL,
    folder: Path | str | None = None,
    files: Sequence[str] = (),
    revision: str = "main",
    mirror: str | None = None,
    max_workers: int = 8,
    patience: Patience | None = None,
) -> Verified:
    """Fetch what a folder lacks of a repository, and verify all of it; returns what was fetched and compared.

    `repository` is "owner/name" or a short name of `helpers.hub.REPOSITORIES`. `folder` (relative: to the workbook's)
    is by default the repository's name on AutoDL's data disk, or beside the workbook. `files` are names in the
    repository (none: all). `revision` is resolved once to a commit, which is printed and kept in `download.json`.
    `mirror` is an address that is asked instead of HF_ENDPOINT or Hugging Face; no token is ever sent to it.
    `max_workers` connections share the pieces of all files.

    What is in the folder already is verified, not fetched; a file that is too short is continued, one that differs is
    fetched anew and replaced when the new one is right. Raises ValueError for a wrong name or value, DownloadError for
    everything that keeps a file from being complete and verified: the other files are finished and kept.
    """
    repository, endpoint = resolve(repository), address(mirror)
    if max_workers < 1:
        raise ValueError(f"max_workers {max_workers} must be at least 1")
    place = anchor(folder) if folder else proposed_place(repository)
    patience = patience or Patience()
    snapshot = look_up(repository, revision, endpoint, place, False if mirror else None, patience)
    wanted = snapshot.named(tuple(files))
    print(f"{repository}, {revision} = commit {snapshot.commit}, from {endpoint}", flush=True)
    try:
        with _locked(place, repository):
            write_record(place, snapshot)
            return _complete(snapshot, wanted, place, patience, mirror, max_workers)
    except HTTPError as error:
        raise unreachable(endpoint, repository, place, error) from error
    except OSError as error:
        raise ran_out(place, error) from error


def resolve(repository: str) -> str:
    """The repository of a short name. Raises ValueError for what is neither such a name nor "owner/name"."""
    name = REPOSITORIES.get(repository, repository)
    if "/" not in name:
        raise ValueError(f"{repository!r} is no repository: write owner/name, or one of {', '.join(REPOSITORIES)}")
    validate_repo_id(name)
    return name


def address(mirror: str | None) -> str:
    """The server to ask, without a slash at its end. Raises ValueError for what is no address."""
    endpoint = (mirror or constants.ENDPOINT).rstrip("/")
    if not re.fullmatch(r"https?://[^/\s]\S*", endpoint):
        raise ValueError(f"{endpoint!r} is no address of a server: write https://...")
    return endpoint


@contextmanager
def _locked(folder: Path, repository: str) -> Iterator[None]:
    """The folder, made if need be, for this process alone and for one repository alone."""
    known = read_record(folder)
    if known and known.repository != repository:
        raise ValueError(f"{folder} holds {known.repository}: name another folder for {repository} with --to")
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(folder / LOCK, timeout=0.5))
        except TimeoutError as error:
            raise DownloadError(
                f"another download is at work in {folder}; if none is, delete {folder / LOCK} and run this again"
            ) from error
        yield


def _complete(
    snapshot: Snapshot, wanted: Sequence[RemoteFile], folder: Path, patience: Patience, mirror: str | None, workers: int
) -> Verified:
    """Verify what is here, fetch the rest, look at what came."""
    begun = time.perf_counter()
    here, parts = _sort(snapshot, wanted, folder)
    _check_disk(folder, parts, len(wanted))
    faults, fetched_bytes = _fetch(snapshot, parts, patience, mirror, workers) if parts else ({}, 0)
    came = {part.remote.name: _outcome(part, snapshot.repository, faults) for part in parts}
    found = tuple(came.get(file.name) or here[file.name] for file in wanted)
    fetched = tuple(name for name, file in came.items() if not file.fault)
    result = Verified(folder, snapshot, found, fetched, fetched_bytes, time.perf_counter() - begun)
    if result.faults:
        lines = "".join(f"\n  {name}: {fault}" for name, fault in result.faults.items())
        raise DownloadError(f"{result}{lines}\nThe others are verified and kept; run this again for these.")
    return result


def _sort(
    snapshot: Snapshot, wanted: Sequence[RemoteFile], folder: Path
) -> tuple[dict[str, CheckedFile], list[PartFile]]:
    """What is here and right (or right, but not what the workbook expects), and the parts of all that has to come."""
    sized = [file for file in wanted if _bytes_of(folder / file.name) == file.bytes]
    here = {file.name: file for file in check_files(folder, sized, snapshot.repository)}
    parts = []
    for file in wanted:
        if file.name in here and here[file.name].agrees:
            continue
        part, have = PartFile(folder / file.name, file), _bytes_of(folder / file.name)
        if file.name in here:
            print(f"{file.name} is damaged ({here.pop(file.name).fault}): fetching it again", flush=True)
        elif have is not None and have < file.bytes and file.checksum and part.remaining == file.bytes:
            print(f"{file.name} is cut short ({have:,} of {file.bytes:,} bytes): going on from there", flush=True)
            part.adopt()
        elif have is not None:
            print(f"{file.name} has {have:,} bytes instead of {file.bytes:,}: fetching it again", flush=True)
        parts.append(part)
    return here, parts


def _check_disk(folder: Path, parts: Sequence[PartFile], wanted: int) -> None:
    """Say what is to come and where to. Raises DownloadError where it does not fit."""
    missing, free = sum(part.remaining for part in parts), free_bytes(folder)
    if missing > free:
        raise disk_full(folder, missing, free)
    where = f"{folder}{' (the data disk)' if folder.is_relative_to(AUTODL_DATA) else ''}"
    print(f"{len(parts)} of {wanted} files to fetch, {size(missing)}, into {where}: {size(free)} are free", flush=True)


def _fetch(
    snapshot: Snapshot, parts: list[PartFile], patience: Patience, mirror: str | None, workers: int
) -> tuple[dict[str, str], int]:
    """Run the transfer under a bar; (name -> fault, bytes that came)."""
    # Compressed answers could not be continued in the middle.
    headers = build_hf_headers(token=False if mirror else None) | {"Accept-Encoding": "identity"}
    with ByteProgress(sum(part.remaining for part in parts), "fetched") as bar:
        faults = Transfer(snapshot, headers, patience, workers, bar).run(parts)
    return faults, bar.done


def _outcome(part: PartFile, repository: str, faults: dict[str, str]) -> CheckedFile:
    """What became of a file: its fault, or what was compared."""
    name = part.remote.name
    if name in faults:
        return CheckedFile(name, None, fault=faults[name])
    return check_content(part.target, part.remote, repository)


def _bytes_of(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
