"""A file on its way: `<name>.part`, and beside it how much of each of its pieces is there.

The final name appears when the bytes have been verified, never before. The pieces are what several connections fetch at
the same time; each grows from its start, so that one number says what of it is there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from .errors import WrongAnswerError
from .remote import RemoteFile

_STEP = 4 * 2**20  # bytes after which the count on the disk is renewed: what a killed process loses of each piece


class PartFile:
    """The unfinished form of one remote file in a folder; continues what an earlier process left."""

    PIECE = 256 * 2**20  # bytes: seconds to minutes of one connection

    def __init__(self, target: Path, remote: RemoteFile) -> None:
        self.target, self.remote = target, remote
        self.path = target.with_name(f"{target.name}.part")
        self.journal = target.with_name(f"{target.name}.part.json")
        self.lengths = [min(self.PIECE, remote.bytes - start) for start in range(0, remote.bytes, self.PIECE)]
        self._identity = {"checksum": remote.checksum, "bytes": remote.bytes, "piece": self.PIECE}
        self._lock = Lock()
        self.done = self._remembered()

    @property
    def remaining(self) -> int:
        """Bytes that are still to be fetched."""
        return self.remote.bytes - sum(self.done)

    def missing(self) -> list[int]:
        """The numbers of the pieces that are not whole."""
        return [index for index, length in enumerate(self.lengths) if self.done[index] < length]

    def start(self, index: int) -> int:
        """Where a piece begins in the file."""
        return sum(self.lengths[:index])

    def adopt(self) -> None:
        """Go on from a file under the final name that is too short, as programs that were stopped leave it."""
        have = self.target.stat().st_size
        os.replace(self.target, self.path)
        self.done = [max(0, min(length, have - self.start(i))) for i, length in enumerate(self.lengths)]
        self.prepare()

    def prepare(self) -> None:
        """Make the file (sparse, so it takes no room yet) and the count."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.truncate(self.remote.bytes)
        self._remember()

    def forget(self, index: int) -> int:
        """Count a piece as not there; returns how many bytes that were."""
        lost, self.done[index] = self.done[index], 0
        return lost

    def discard(self) -> None:
        """Remove what is there: it is not what was asked for."""
        self.done = [0] * len(self.lengths)
        self.journal.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Give the verified file its name."""
        os.replace(self.path, self.target)
        self.journal.unlink(missing_ok=True)

    @contextmanager
    def writer(self, index: int) -> Iterator[Callable[[bytes], None]]:
        """A function that appends to a piece. It raises WrongAnswerError for more bytes than the piece has."""
        saved = self.done[index]
        with self.path.open("r+b") as file:
            file.seek(self.start(index) + saved)

            def write(data: bytes) -> None:
                nonlocal saved
                if self.done[index] + len(data) > self.lengths[index]:
                    raise WrongAnswerError("the server sends more bytes than it was asked for")
                file.write(data)
                self.done[index] += len(data)
                if self.done[index] - saved >= _STEP:
                    file.flush()
                    self._remember()
                    saved = self.done[index]

            try:
                yield write
            finally:
                # First the bytes, then the count: it must never claim what is not there.
                try:
                    file.flush()
                except OSError:
                    self.done[index] = saved
                    raise
                self._remember()

    def _remember(self) -> None:
        half = self.journal.with_name(f"{self.journal.name}.new")
        with self._lock:
            half.write_text(json.dumps(self._identity | {"done": self.done}), encoding="utf-8")
            os.replace(half, self.journal)

    def _remembered(self) -> list[int]:
        """What the count says, if it is about this very content; else nothing is there."""
        none = [0] * len(self.lengths)
        try:
            known = json.loads(self.journal.read_text(encoding="utf-8"))
            done = known.pop("done")
            fits = known == self._identity and len(done) == len(none) and self.path.stat().st_size == self.remote.bytes
            return done if fits and self.remote.checksum else none
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return none
