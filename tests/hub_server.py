"""A server on the loopback that speaks the part of the hub's API that a download uses, and fails when told to.

`GET /api/models/<repository>/revision/<revision>?blobs=...` tells the commit and every file's size and checksum.
`/<repository>/resolve/<revision>/<file>` has small files itself and redirects to another host for large ones, as the
hub does, with ETag, Range and the headers that `hf_hub_download` reads.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

LARGE = 100_000  # bytes from which a file counts as stored with Git LFS


class HubServer(ThreadingHTTPServer):
    """Serves the files of `folder` as `repository`; use it as a context manager.

    `faults[name]` (a file's name, or "api") is a list of functions that each spoil one request: they are given the
    handler and the bytes that would be sent, and return True if they answered in its place, or other bytes to send.
    `log` holds (method, name, Range) of every request, `paths` its path, `tokens` (first folder of it, authorisation).
    """

    daemon_threads = True

    def __init__(self, folder: Path, repository: str = "test/tiny", revisions: tuple[str, ...] = ("main", "v1")):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repository, self.revisions = repository, revisions
        self.files = {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}
        self.listed = dict(self.files)  # what the API describes
        self.faults: dict[str, list[Callable]] = defaultdict(list)
        self.log: list[tuple[str, str, str | None]] = []
        self.paths: list[str] = []
        self.tokens: set[tuple[str, str | None]] = set()
        self.without_range = False
        self.without_checksums = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(map(self.etag, self.listed))).encode()).hexdigest()

    def etag(self, name: str) -> str:
        content = self.listed[name]
        if len(content) >= LARGE:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def asked(self, name: str) -> list[str | None]:
        """The Range of every request for a file's bytes, in order."""
        place = "cdn" if len(self.files[name]) >= LARGE else "resolve"
        return [asked for method, path, asked in self.log if method == "GET" and path == f"{place}/{name}"]

    def describe(self) -> dict:
        siblings = []
        for name, content in self.listed.items():
            one = {"rfilename": name, "size": len(content)}
            if self.without_checksums:
                pass
            elif len(content) >= LARGE:
                one["blobId"] = hashlib.sha1(b"a pointer to " + name.encode()).hexdigest()
                one["lfs"] = {"sha256": self.etag(name), "size": len(content), "pointerSize": 134}
            else:
                one["blobId"] = self.etag(name)
            siblings.append(one)
        return {"id": self.repository, "sha": self.commit, "siblings": siblings, "private": False, "tags": []}

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_error) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_ignored) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):
            self._answer()

    def refuse(self, status: int, code: str = "", headers: dict[str, str] | None = None) -> None:
        """An error as the hub gives it, with a small JSON body."""
        body = json.dumps({"error": code or "broken"}).encode()
        self.send_response(status)
        told = {"Content-Length": str(len(body))} | ({"X-Error-Code": code} if code else {}) | (headers or {})
        for name, value in told.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.server.paths.append(self.path)
        self.server.tokens.add((path.rpartition("/")[0].partition("/")[0], self.headers.get("Authorization")))
        api = re.fullmatch(r"api/models/(.+?)(?:/revision/(.+))?", path)
        file = re.fullmatch(r"(.+?/.+?)/resolve/([^/]+)/(.+)", path)
        if api:
            self.server.log.append((self.command, "api", None))
            self._api(api[1], api[2] or "main")
        elif file:
            self.server.log.append((self.command, f"resolve/{file[3]}", self.headers.get("Range")))
            self._resolve(*file.groups())
        elif path.startswith("cdn/"):
            self.server.log.append((self.command, path, self.headers.get("Range")))
            self._bytes(path.removeprefix("cdn/"), {})
        else:
            self.refuse(404)

    def _known(self, repository: str, revision: str) -> bool:
        if repository != self.server.repository:
            self.refuse(401, "RepoNotFound")  # as the hub answers whoever shows no token
        elif revision not in (*self.server.revisions, self.server.commit):
            self.refuse(404, "RevisionNotFound")
        else:
            return True
        return False

    def _api(self, repository: str, revision: str) -> None:
        body = json.dumps(self.server.describe()).encode()
        if self._spoiled("api", body) or not self._known(repository, revision):
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _resolve(self, repository: str, revision: str, name: str) -> None:
        if not self._known(repository, revision):
            return
        if name not in self.server.files:
            self.refuse(404, "EntryNotFound")
            return
        about = {"X-Repo-Commit": self.server.commit, "ETag": f'"{self.server.etag(name)}"'}
        if len(self.server.files[name]) < LARGE:
            self._bytes(name, about)
            return
        self.send_response(302)
        about |= {"X-Linked-Etag": about["ETag"], "X-Linked-Size": str(len(self.server.files[name]))}
        about |= {"Location": f"http://localhost:{self.server.server_port}/cdn/{quote(name)}", "Content-Length": "0"}
        for key, value in about.items():
            self.send_header(key, value)
        self.end_headers()

    def _bytes(self, name: str, headers: dict[str, str]) -> None:
        content, size = self.server.files[name], len(self.server.files[name])
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        status = 200
        if asked and not self.server.without_range:
            first, last = int(asked[1]), int(asked[2] or size - 1)
            if first >= size:
                self.refuse(416, headers={"Content-Range": f"bytes */{size}"})
                return
            last = min(last, size - 1)
            headers = headers | {"Content-Range": f"bytes {first}-{last}/{size}"}
            content, status = content[first : last + 1], 206
        spoiled = self._spoiled(name, content) if self.command == "GET" else None
        if spoiled is True:
            return
        content = content if spoiled is None else spoiled
        self.send_response(status)
        for key, value in ({"Accept-Ranges": "bytes", "Content-Length": str(len(content))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _spoiled(self, name: str, content: bytes) -> bytes | bool | None:
        faults = self.server.faults[name]
        return faults.pop(0)(self, content) if faults else None


def cut(after: int) -> Callable:
    """Promise the whole answer, send `after` bytes of it, and close the connection."""

    def spoil(handler: _Handler, content: bytes) -> bool:
        handler.send_response(206 if handler.headers.get("Range") else 200)
        if handler.headers.get("Range"):
            first = int(re.search(r"\d+", handler.headers["Range"])[0])
            handler.send_header("Content-Range", f"bytes {first}-{first + len(content) - 1}/*")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:after])
        handler.wfile.flush()
        handler.close_connection = True
        return True

    return spoil


def hang(after: int, until: threading.Event) -> Callable:
    """Send `after` bytes, then nothing until the event is set; then close."""

    def spoil(handler: _Handler, content: bytes) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:after])
        handler.wfile.flush()
        until.wait(30)
        handler.close_connection = True
        return True

    return spoil


def corrupt(at: int = 1000) -> Callable:
    """One byte of the answer is another one."""

    def spoil(_handler: _Handler, content: bytes) -> bytes:
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    return spoil


def length(change: int) -> Callable:
    """The answer is so many bytes longer or shorter, and says so."""
    return lambda _handler, content: content + b"\0" * change if change > 0 else content[:change]


def status(code: int, **headers: str) -> Callable:
    """An error in place of the answer."""

    def spoil(handler: _Handler, _content: bytes) -> bool:
        handler.refuse(code, headers={name.replace("_", "-"): value for name, value in headers.items()})
        return True

    return spoil


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Until the condition holds; AssertionError if it does not come to that."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)
