"""Pieces of files from the hub to the disk: several connections, tried again as long as there is hope, verified.

A file whose checksum differs is fetched again once, alone. What cannot be fetched is named and does not stop the
others; a lost network or a full disk stops all.
"""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from threading import Event, Lock

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import get_session, hf_raise_for_status

from ..display import ByteProgress
from .errors import Patience, WrongAnswerError, said
from .parts import PartFile
from .remote import Snapshot
from .verification import checksum_fault

_TICK = 0.2  # seconds between two looks at the bar


class _StoppedError(Exception):
    """The transfer, or that of this file, has ended: the thread leaves."""


@dataclass
class _File:
    """A file and what is being done about it: tasks under way, whether it came damaged, whether to fetch it again."""

    part: PartFile
    tasks: int = 0
    came_damaged: bool = False
    again: bool = False
    lock: Lock = field(default_factory=Lock)


class Transfer:
    """One run over some files of a snapshot. `headers` go with every request (the token); `bar` counts what comes."""

    def __init__(
        self, snapshot: Snapshot, headers: dict[str, str], patience: Patience, max_workers: int, bar: ByteProgress
    ) -> None:
        self.snapshot, self.headers, self.patience, self.bar = snapshot, headers, patience, bar
        self.max_workers = max_workers
        self.faults: dict[str, str] = {}
        self._stop = Event()
        self._work: dict[Future, _File] = {}

    def run(self, parts: list[PartFile]) -> dict[str, str]:
        """Fetch and verify all; returns name -> fault of those that could not be.

        Raises what the network or the disk raised after the last try, with everything fetched so far kept.
        """
        with ThreadPoolExecutor(self.max_workers) as pool:
            try:
                for part in parts:
                    self._hand_out(pool, _File(part))
                while self._work:
                    ready, _ = wait(self._work, _TICK, FIRST_COMPLETED)
                    self.bar.draw()
                    for task in ready:
                        self._ended(pool, task)
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        return self.faults

    def _hand_out(self, pool: ThreadPoolExecutor, file: _File) -> None:
        """Make tasks of the pieces that a file lacks, or of its verification alone when it lacks none."""
        file.part.prepare()
        pieces = file.part.missing()
        file.tasks = max(1, len(pieces))
        tasks = [pool.submit(self._do, file, piece) for piece in pieces] or [pool.submit(self._do, file)]
        self._work |= dict.fromkeys(tasks, file)

    def _ended(self, pool: ThreadPoolExecutor, task: Future) -> None:
        """Take a finished task: note a fault, or begin anew with a file that came damaged."""
        file, error = self._work.pop(task), task.exception()
        if isinstance(error, (HfHubHTTPError, WrongAnswerError)):
            self.faults.setdefault(file.part.remote.name, said(error))
        elif error is not None and not isinstance(error, _StoppedError):
            raise error
        elif file.again:
            file.again = False
            self._hand_out(pool, file)

    def _do(self, file: _File, piece: int | None = None) -> None:
        """One task: a piece; and after the last of a file its verification, before pieces of others are begun."""
        if piece is not None:
            self._fetch(file.part, piece)
        with file.lock:
            file.tasks -= 1
            last = file.tasks == 0
        if last:
            self._settle(file)

    def _fetch(self, part: PartFile, piece: int) -> None:
        """One piece, to its end: failures in a row without a byte are counted and waited for."""
        failures = 0
        while part.done[piece] < part.lengths[piece]:
            before = part.done[piece]
            try:
                self._stream(part, piece)
                self.bar.note = ""
            except (HTTPError, WrongAnswerError) as error:
                failures = 1 if part.done[piece] > before else failures + 1
                pause = self.patience.pause(failures, error)
                if pause is None:
                    raise
                self.bar.note = f", {said(error)}: again in {pause:.0f} s"
                if self._stop.wait(pause):
                    raise _StoppedError from error

    def _stream(self, part: PartFile, piece: int) -> None:
        """One request for the rest of a piece, written as it comes."""
        name, start = part.remote.name, part.start(piece)
        first, last = start + part.done[piece], start + part.lengths[piece] - 1
        asked = {} if (first, last) == (0, part.remote.bytes - 1) else {"Range": f"bytes={first}-{last}"}
        with get_session().stream(
            "GET", self.snapshot.url(name), headers=self.headers | asked, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        ) as answer:
            self._check(answer, part, piece, first if asked else None)
            with part.writer(piece) as write:
                for data in answer.iter_bytes():
                    self._go_on()
                    if name in self.faults:
                        raise _StoppedError
                    write(data)
                    self.bar(len(data))
        if part.done[piece] < part.lengths[piece]:
            raise WrongAnswerError(f"the answer ended {part.lengths[piece] - part.done[piece]:,} bytes too early")

    def _go_on(self, _read: int = 0) -> None:
        """Leave the thread if the transfer has ended."""
        if self._stop.is_set():
            raise _StoppedError

    def _check(self, answer, part: PartFile, piece: int, first: int | None) -> None:
        """Whether the answer is what was asked for: the file's bytes from `first` on (None: the whole file)."""
        if answer.status_code == 416:
            raise WrongAnswerError(f"the server's file is shorter than the {part.remote.bytes:,} bytes of its list")
        hf_raise_for_status(answer)
        if first is None or answer.headers.get("Content-Range", "").startswith(f"bytes {first}-"):
            return
        if answer.status_code != 200 or len(part.lengths) > 1:
            raise WrongAnswerError(f"the server was asked for the bytes from {first:,} on and sends others")
        # The whole file instead of its rest: it is taken from the start.
        self.bar.total += part.forget(piece)

    def _settle(self, file: _File) -> None:
        """Verify a file that lacks nothing and give it its name; if it is wrong, drop what came."""
        part = file.part
        self.bar.note = f", checking {part.remote.name}"
        fault = checksum_fault(part.path, part.remote, self._go_on)
        self.bar.note = ""
        if not fault:
            part.finish()
            return
        part.discard()
        if file.came_damaged:
            raise WrongAnswerError(f"came damaged twice ({fault}): try again later, or from elsewhere with --mirror")
        self.bar.say(f"{part.remote.name} came damaged ({fault}): fetching it again")
        self.bar.total += part.remote.bytes
        file.came_damaged = file.again = True
