"""Whether files are what they should be: size and checksum of the hub, whole headers, the official tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from ..display import ByteProgress, size
from ..hub import OFFICIAL_FILES, OFFICIAL_MODEL, manifest, read_header
from ..workbook import anchor
from .record import read_record
from .remote import RemoteFile, Snapshot

_CHUNK = 4 * 2**20  # bytes
_TICK = 0.2  # seconds between two looks at the bar
_UNKNOWN = -1  # bytes of a file that nothing is known of
_KINDS = {"sha256": "SHA-256", "git": "git SHA-1"}
# The only official file that a BAGEL folder may lack: its values are the same for every release.
_MAY_BE_MISSING = {"config.json"}


@dataclass(frozen=True)
class CheckedFile:
    """A file and what was compared; `bytes` is None where it is missing, `fault` empty where all is right.

    `by` names what agreed: "size", "SHA-256" or "git SHA-1" with the hub's list, "header" (as long as its own header
    says), "JSON" (can be read), "not empty", "manifest" (the tensors of the released model and no others). `tensors` is
    their number in a safetensors file.
    """

    name: str
    bytes: int | None
    by: tuple[str, ...] = ()
    fault: str = ""
    tensors: int | None = None

    @property
    def agrees(self) -> bool:
        """Whether it is what the hub's list says; a `fault` is then one of its content, which no new fetch changes."""
        return "size" in self.by


@dataclass(frozen=True)
class Verified:
    """A folder, what it should be (`snapshot`, None: nobody knows), its files, and what this call fetched for it."""

    folder: Path
    snapshot: Snapshot | None
    files: tuple[CheckedFile, ...]
    fetched: tuple[str, ...] = ()
    fetched_bytes: int = 0
    seconds: float = 0.0

    @property
    def faults(self) -> dict[str, str]:
        """Name -> what is wrong with it; empty when everything is right."""
        return {file.name: file.fault for file in self.files if file.fault}

    def __str__(self) -> str:
        """One line: how much was compared, and with what."""
        if self.faults:
            return f"{len(self.faults)} of {len(self.files)} files are not right: {', '.join(self.faults)}"
        kinds = [kind for file in self.files for kind in file.by]
        counts = ", ".join(f"{kind} of {kinds.count(kind)}" for kind in dict.fromkeys(kinds))
        return f"{size(sum(file.bytes or 0 for file in self.files))} in {len(self.files)} files are right: {counts}"


def verify(folder: Path | str, repository: str = "") -> Verified:
    """Compare a folder with what is known of it, without the network.

    A folder that `download` made holds the hub's sizes and checksums. Of any other one, headers and JSON are read, and
    for the official `repository` the tensors are compared with the released ones. A relative name is anchored on the
    workbook's folder. Nothing is raised for files that are missing or wrong: `faults` names them.
    """
    folder = anchor(folder)
    snapshot = read_record(folder)
    repository = snapshot.repository if snapshot else repository
    remote = snapshot.files if snapshot else tuple(RemoteFile(name, _UNKNOWN) for name in _expected(folder, repository))
    return Verified(folder, snapshot, check_files(folder, remote, repository))


def _expected(folder: Path, repository: str) -> list[str]:
    """The files to look at where no record is: the official ones, or what another repository's folder holds."""
    official = [file.name for file in OFFICIAL_FILES]
    if repository in ("", OFFICIAL_MODEL):
        return official
    found = [file for pattern in ("*.safetensors", "*.json") for file in folder.rglob(pattern)]
    return sorted(file.relative_to(folder).as_posix() for file in found) or official


def check_files(folder: Path, remote: Sequence[RemoteFile], repository: str) -> tuple[CheckedFile, ...]:
    """All files in full, several at a time; a bar where checksums are computed."""
    total = sum(file.bytes for file in remote if file.checksum and (folder / file.name).is_file())
    bar, stop = ByteProgress(total, "checked"), Event()

    def count(read: int) -> None:
        if stop.is_set():
            raise InterruptedError
        bar(read)

    with ThreadPoolExecutor(4) as pool, bar if total else nullcontext():
        tasks = [pool.submit(_check, folder / file.name, file, repository, count) for file in remote]
        try:
            _draw_until_done(tasks, bar if total else None)
        except BaseException:
            stop.set()  # or an interrupt would wait until the last byte has been read
            raise
    return tuple(task.result() for task in tasks)


def _draw_until_done(tasks: Sequence[Future], bar: ByteProgress | None) -> None:
    waiting = set(tasks)
    while waiting:
        _, waiting = wait(waiting, _TICK)
        if bar:
            bar.draw()


def _check(path: Path, remote: RemoteFile, repository: str, count: Callable[[int], None]) -> CheckedFile:
    if not path.is_file():
        needed = remote.bytes != _UNKNOWN or remote.name not in _MAY_BE_MISSING
        return CheckedFile(remote.name, None, fault="missing" if needed else "")
    fault = checksum_fault(path, remote, count) if remote.bytes != _UNKNOWN else ""
    if fault:
        return CheckedFile(remote.name, path.stat().st_size, fault=fault)
    return check_content(path, remote, repository)


def check_content(path: Path, remote: RemoteFile, repository: str) -> CheckedFile:
    """A file that agrees with the hub's list, or that no list is known for: does it hold what it should?"""
    by = ["size"] if remote.bytes != _UNKNOWN else []
    by += [_KINDS[remote.checksum.partition(":")[0]]] if remote.checksum else []
    tensors, fault = None, ""
    try:
        if path.suffix == ".safetensors":
            tensors = _check_header(path)
            by.append("header")
        elif not remote.checksum:
            by.append(_check_text(path))
        if repository == OFFICIAL_MODEL and manifest(remote.name):
            _check_manifest(path)
            by.append("manifest")
    except ValueError as error:
        fault = str(error)
    return CheckedFile(remote.name, path.stat().st_size, tuple(by), fault, tensors)
    return CheckedFile(remote.name, path.stat().st_size, tuple(by), tensors=tensors)


def checksum_fault(path: Path, remote: RemoteFile, count: Callable[[int], None] = lambda read: None) -> str:
    """What differs from the hub's size and checksum, in words; empty if nothing does. `count` gets the bytes read."""
    have = path.stat().st_size
    if have != remote.bytes:
        return f"{have:,} bytes instead of {remote.bytes:,}"
    kind, _, wanted = remote.checksum.partition(":")
    if not wanted:
        return ""
    found = _digest(path, kind, count)
    return "" if found == wanted else f"{_KINDS[kind]} {found[:12]}... instead of {wanted[:12]}..."


def _digest(path: Path, kind: str, count: Callable[[int], None]) -> str:
    """SHA-256 of a file, or the SHA-1 that git gives it: that of "blob <length>", a zero byte and the bytes."""
    state = hashlib.sha256() if kind == "sha256" else hashlib.sha1(usedforsecurity=False)
    if kind == "git":
        state.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            state.update(data)
            count(len(data))
    return state.hexdigest()


def _check_header(path: Path) -> int:
    """The number of tensors. Raises ValueError for a safetensors file that is not as long as its header says."""
    tensors, whole = read_header(path)
    have = path.stat().st_size
    if have != whole:
        raise ValueError(f"{have:,} bytes, but its header describes {whole:,}")
    return len(tensors)


def _check_text(path: Path) -> str:
    """What can be seen of a file without a checksum. Raises ValueError for an empty file or JSON that is none."""
    if not path.stat().st_size:
        raise ValueError("empty")
    if path.suffix != ".json":
        return "not empty"
    try:
        json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"no valid JSON ({error})") from error
    return "JSON"


def _check_manifest(path: Path) -> None:
    """Raises ValueError where names or shapes of the tensors are not those of the released model."""
    found = {name: tuple(entry["shape"]) for name, entry in read_header(path)[0].items()}
    wanted = manifest(path.name)
    differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if differing:
        raise ValueError(
            f"not the released model's: {len(differing)} tensors are missing, unknown or of another shape, "
            f"{differing[0]} among them"
        )
