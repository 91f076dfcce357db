"""`python -m helpers download` against a real server on the loopback: every way in which a download can go wrong."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT
from hub_server import HubServer, corrupt, cut, hang, length, status, wait_for
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import WeakFileLock
from safetensors.torch import save_file

from helpers import hub
from helpers.download import DownloadError, download, errors, fetching, verify
from helpers.download.command import main
from helpers.download.errors import Patience
from helpers.download.parts import PartFile

TINY = ROOT / "helpers" / "tiny" / "checkpoint"
EMA = "ema.safetensors"
QUICK = Patience(retries=3, wait=0.01, longest=0.02)


@pytest.fixture
def server():
    with HubServer(TINY) as one:
        yield one


@pytest.fixture
def fetch(server, tmp_path):
    """`download` of what the server has, into `<tmp_path>/model`, without long waits."""

    def call(**named):
        return download(server.repository, tmp_path / "model", mirror=server.address, **{"patience": QUICK} | named)

    return call


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "model"


def same_as_served(server, folder, names=None):
    """Whether the folder holds the files as the server lists them, and nothing unfinished."""
    left = [file.name for file in folder.iterdir() if ".part" in file.name]
    return not left and all((folder / name).read_bytes() == server.listed[name] for name in names or server.listed)


def start(server, folder, *words, **variables):
    """The command in a process of its own, with HF_ENDPOINT as a user sets it."""
    # A hanging connection is not to end by itself: what a killed process kept must have been kept before.
    settings = {**os.environ, "HF_ENDPOINT": server.address, "HF_HUB_DOWNLOAD_TIMEOUT": "60", **variables}
    command = [sys.executable, "-m", "helpers", "download", "--repo", server.repository, "--to", str(folder), *words]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell without job control has what it starts in the background ignore the signal, tests and command alike.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_the_server_is_one_that_the_official_client_understands(server, tmp_path):
    """Else the tests below would only show that two pieces of our own agree."""
    for name in (EMA, "merges.txt"):
        got = hf_hub_download(server.repository, name, local_dir=tmp_path, endpoint=server.address)
        assert Path(got).read_bytes() == server.files[name]


def test_everything_is_fetched_once_and_verified(server, fetch, folder, capsys):
    result = fetch()
    assert same_as_served(server, folder)
    assert result.faults == {} and sorted(result.fetched) == sorted(server.files)
    assert result.fetched_bytes == sum(map(len, server.files.values()))
    compared = {file.name: file.by for file in result.files}
    assert compared[EMA] == ("size", "SHA-256", "header") and compared["vocab.json"] == ("size", "git SHA-1")
    assert all(server.asked(name) == [None] for name in server.files)
    assert f"{server.repository}, main = commit {server.commit}, from {server.address}" in capsys.readouterr().out


def test_a_second_run_verifies_and_fetches_nothing(server, fetch, folder):
    fetch()
    server.log.clear()
    result = fetch()
    assert result.fetched == () and result.fetched_bytes == 0 and len(result.files) == len(server.files)
    assert {name for _, name, _ in server.log} == {"api"}


def test_the_record_lets_a_folder_be_verified_without_the_network(server, fetch, folder):
    fetch(revision="v1")
    record = json.loads((folder / "download.json").read_text())
    assert (record["repository"], record["revision"]) == (server.repository, "v1")
    assert record["commit"] == server.commit and record["endpoint"] == server.address
    server.log.clear()
    assert verify(folder).faults == {} and "SHA-256 of 2" in str(verify(folder))
    content = bytearray((folder / EMA).read_bytes())
    content[-1] ^= 1
    (folder / EMA).write_bytes(content)
    (folder / "merges.txt").unlink()
    assert re.fullmatch(r"SHA-256 \w{12}\.\.\. instead of \w{12}\.\.\.", verify(folder).faults[EMA])
    assert verify(folder).faults["merges.txt"] == "missing" and len(verify(folder).faults) == 2
    assert server.log == []


def test_a_commit_is_fetched_and_not_what_main_became_meanwhile(server, fetch):
    """The revision is resolved once: every file is asked for by its commit."""
    fetch()
    paths = {path for path in server.paths if "/resolve/" in path}
    assert paths and all(f"/resolve/{server.commit}/" in path for path in paths)


def test_one_file_can_be_fetched_alone(server, fetch, folder):
    result = fetch(files=["merges.txt"])
    assert result.fetched == ("merges.txt",) and not (folder / EMA).exists()
    assert [name for _, name, _ in server.log] == ["api", "resolve/merges.txt"]


def test_a_cut_connection_goes_on_with_the_rest(server, fetch, folder):
    whole = len(server.files[EMA])
    server.faults[EMA] = [cut(5_000_000), cut(3_000_000)]
    result = fetch()
    first, second, third = server.asked(EMA)
    assert first is None and same_as_served(server, folder)
    starts = [int(re.fullmatch(rf"bytes=(\d+)-{whole - 1}", asked)[1]) for asked in (second, third)]
    assert starts == [5_000_000, 8_000_000]
    assert result.fetched_bytes == sum(map(len, server.files.values()))


def test_a_killed_download_is_continued_by_the_next(server, folder):
    hold = threading.Event()
    server.faults[EMA] = [hang(9_000_000, hold)]
    journal = folder / f"{EMA}.part.json"
    process = start(server, folder)
    wait_for(lambda: journal.is_file() and sum(json.loads(journal.read_text())["done"]) >= 8_000_000)
    process.kill()
    process.communicate()
    hold.set()
    assert not (folder / EMA).exists(), "what is not whole must not have the file's name"
    there = sum(json.loads(journal.read_text())["done"])
    again = start(server, folder)
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert server.asked(EMA) == [None, f"bytes={there}-{len(server.files[EMA]) - 1}"]
    assert same_as_served(server, folder) and "done and verified" in out


def test_an_interrupt_keeps_what_came(server, folder):
    hold = threading.Event()
    server.faults[EMA] = [hang(9_000_000, hold)]
    process = start(server, folder)
    part, journal = folder / f"{EMA}.part", folder / f"{EMA}.part.json"
    wait_for(lambda: journal.is_file() and sum(json.loads(journal.read_text())["done"]) >= 8_000_000)
    process.send_signal(signal.SIGINT)
    hold.set()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "run the same line again" in err and "Traceback" not in err
    there = sum(json.loads(journal.read_text())["done"])
    assert there >= 8_000_000 and part.read_bytes()[:there] == server.files[EMA][:there]


@pytest.mark.parametrize("finished", [True, False])
def test_an_interrupt_does_not_wait_for_a_checksum(server, fetch, folder, monkeypatch, finished):
    """29 GB take a minute to read. Neither of a finished file nor of one that has just come."""
    if finished:
        fetch()
    begun, read = threading.Event(), []

    def endless(_path, _kind, count):
        while len(read) < 500:
            read.append(1)
            begun.set()
            time.sleep(0.01)
            count(1)
        return ""

    def pressed(*_ignored):
        if begun.is_set():
            raise KeyboardInterrupt

    monkeypatch.setattr("helpers.download.verification._digest", endless)
    monkeypatch.setattr("helpers.display.ByteProgress.draw", pressed)
    with pytest.raises(KeyboardInterrupt):
        fetch(files=[EMA])
    assert len(read) < 500


def test_several_connections_share_a_file(server, fetch, folder, monkeypatch):
    monkeypatch.setattr(PartFile, "PIECE", 2**20)
    server.faults[EMA] = [cut(500_000), status(503), cut(0)]
    fetch(max_workers=4)
    assert same_as_served(server, folder)
    first = {int(asked.split("=")[1].split("-")[0]) for asked in server.asked(EMA)}
    assert set(range(0, len(server.files[EMA]), 2**20)) <= first
    assert len(server.asked(EMA)) == 13 + 3


def test_pieces_of_a_killed_download_are_not_fetched_again(server, fetch, folder, monkeypatch):
    monkeypatch.setattr(PartFile, "PIECE", 2**20)
    server.faults[EMA] = [lambda handler, content: content] * 5 + [cut(300_000), *[status(403)] * 99]
    with pytest.raises(DownloadError, match=rf"1 of {len(server.files)} files are not right: {EMA}"):
        fetch(max_workers=1)
    done = json.loads((folder / f"{EMA}.part.json").read_text())["done"]
    assert done[:7] == [2**20] * 5 + [300_000, 0]
    server.faults.clear()
    server.log.clear()
    result = fetch(max_workers=1)
    assert same_as_served(server, folder) and server.asked(EMA)[0] == f"bytes={5 * 2**20 + 300_000}-{6 * 2**20 - 1}"
    assert result.fetched_bytes == len(server.files[EMA]) - 5 * 2**20 - 300_000


def test_a_server_that_sends_everything_again_is_taken_from_the_start(server, fetch, folder):
    server.without_range = True
    server.faults[EMA] = [cut(5_000_000)]
    result = fetch()
    assert same_as_served(server, folder)
    assert result.fetched_bytes == sum(map(len, server.files.values())) + 5_000_000


def test_a_server_without_ranges_cannot_mix_up_the_pieces(server, fetch, folder, monkeypatch):
    monkeypatch.setattr(PartFile, "PIECE", 2**20)
    server.without_range = True
    with pytest.raises(DownloadError, match=r"ema.safetensors: .*was asked for the bytes from .* and sends others"):
        fetch()
    assert not (folder / EMA).exists()


def test_a_file_that_comes_damaged_is_named_and_fetched_again_alone(server, fetch, folder, capsys):
    server.faults[EMA] = [corrupt()]
    fetch()
    assert same_as_served(server, folder)
    assert re.search(rf"{EMA} came damaged \(SHA-256 .* instead of .*\): fetching it again", capsys.readouterr().out)
    assert len(server.asked(EMA)) == 2 and all(server.asked(name) == [None] for name in server.files if name != EMA)


@pytest.mark.parametrize("name", [EMA, "vocab.json"])
def test_a_file_that_stays_damaged_is_no_success(server, fetch, folder, name):
    server.faults[name] = [corrupt()] * 9
    with pytest.raises(DownloadError, match=rf"{name}: came damaged twice .*--mirror\nThe others are verified"):
        fetch()
    assert not (folder / name).exists() and not (folder / f"{name}.part").exists()
    assert same_as_served(server, folder, server.files.keys() - {name})
    assert len(server.asked(name)) == 2


def test_a_file_that_is_shorter_than_listed_is_no_success(server, fetch, folder):
    server.files[EMA] = server.files[EMA][:-1000]
    with pytest.raises(
        DownloadError, match=rf"{EMA}: the server's file is shorter than the 13,627,440 bytes of its list"
    ):
        fetch()
    assert not (folder / EMA).exists()
    assert same_as_served_apart_from(server, folder, EMA)


def same_as_served_apart_from(server, folder, name):
    return all((folder / one).read_bytes() == server.listed[one] for one in server.listed if one != name)


@pytest.mark.parametrize("change", [700, -700])
def test_one_answer_of_a_wrong_length_is_outlived(server, fetch, folder, change):
    server.faults[EMA] = [length(change)]
    fetch()
    assert same_as_served(server, folder)
    first, second = server.asked(EMA)
    assert first is None and int(re.fullmatch(r"bytes=(\d+)-13627439", second)[1]) > 13_000_000


def test_answers_without_a_byte_are_not_asked_for_forever(server, fetch, folder):
    server.faults[EMA] = [length(-len(server.files[EMA]))] * 9
    with pytest.raises(DownloadError, match=rf"{EMA}: the answer ended 13,627,440 bytes too early"):
        fetch()
    assert len(server.asked(EMA)) == 3 and same_as_served_apart_from(server, folder, EMA)


def test_a_busy_server_is_given_the_time_it_asks_for(server, fetch, folder, monkeypatch):
    pauses = []

    def pause(self, failures, error, original=Patience.pause):
        pauses.append(original(self, failures, error))
        return pauses[-1] and 0.0

    monkeypatch.setattr(Patience, "pause", pause)
    server.faults["api"] = [status(429, Retry_After="7"), status(503)]
    server.faults[EMA] = [status(429, RateLimit='"resolvers";r=0;t=55'), status(500), status(502)]
    fetch(patience=Patience(wait=3.0, longest=5.0), max_workers=1)
    assert pauses == [7.0, 5.0, 55, 5.0, 5.0] and same_as_served(server, folder)


def test_patience_ends(server):
    """With what it may be tried again, and for how long; an error that no time cures is not waited for."""
    few = Patience(retries=4, wait=1.0, longest=6.0)
    lost = errors.HTTPError("lost")
    assert [few.pause(count, lost) for count in range(1, 6)] == [1.0, 2.0, 4.0, 6.0, None]
    assert [few.pause(count, errors.WrongAnswerError()) for count in (1, 2, 3)] == [1.0, 2.0, None]
    assert few.pause(1, KeyError()) is None


@pytest.mark.parametrize("code", [503, 403])
def test_what_the_server_refuses_is_named_and_the_others_are_kept(server, fetch, folder, code):
    server.faults["vocab.json"] = [status(code)] * 9
    with pytest.raises(DownloadError, match=f"vocab.json: the server answers HTTP {code}"):
        fetch()
    assert same_as_served_apart_from(server, folder, "vocab.json")
    assert len(server.asked("vocab.json")) == (4 if code == 503 else 1)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"repository": "test/none"}, "there is no repository 'test/none'"),
        ({"repository": "df12"}, "'df12' is no repository: write owner/name, or one of bagel, df11"),
        ({"repository": "a/b/c"}, "Repo id must"),
        ({"revision": "v9"}, "test/tiny has no revision 'v9'"),
        ({"files": ["ema.bin"]}, "test/tiny holds no ema.bin; it holds .*ema.safetensors"),
        ({"max_workers": 0}, "max_workers 0 must be at least 1"),
        ({"mirror": "hf-mirror.com"}, "'hf-mirror.com' is no address of a server: write https://"),
    ],
)
def test_wrong_names_and_values_are_refused(server, folder, named, said):
    usual = {"repository": server.repository, "mirror": server.address, "patience": QUICK}
    with pytest.raises(ValueError, match=said):
        download(folder=folder, **usual | named)
    assert not folder.exists()


def test_the_short_name_means_the_repository():
    assert fetching.resolve("df11") == "DFloat11/BAGEL-7B-MoT-DF11" and fetching.resolve("bagel") == hub.OFFICIAL_MODEL


def test_a_full_disk_is_known_before_anything_is_fetched(server, fetch, folder, monkeypatch):
    monkeypatch.setattr(fetching, "free_bytes", lambda folder: 16_000_000)
    with pytest.raises(
        DownloadError, match=r"not enough disk: 16.7 MB are still to fetch and 16.0 MB are free at .*Free "
    ):
        fetch()
    assert {name for _, name, _ in server.log} == {"api"}


def test_what_is_there_already_needs_no_room(server, fetch, folder, monkeypatch):
    server.faults[EMA] = [cut(12_000_000), *[status(403)] * 9]
    with pytest.raises(DownloadError):
        fetch()
    server.faults.clear()
    monkeypatch.setattr(fetching, "free_bytes", lambda folder: 1_700_000)
    fetch(max_workers=1)
    assert same_as_served(server, folder)


def test_a_disk_that_fills_up_in_the_middle_stops_and_keeps(server, fetch, folder, monkeypatch):
    @contextmanager
    def writer(self, piece, original=PartFile.writer):
        with original(self, piece) as write:

            def full(data):
                if self.remote.name == EMA and self.done[piece] > 4_000_000:
                    raise OSError(errno.ENOSPC, "No space left on device")
                write(data)

            yield full

    with monkeypatch.context() as patch:
        patch.setattr(PartFile, "writer", writer)
        with pytest.raises(DownloadError, match=r"cannot be written: the disk is full. What is there is kept"):
            fetch(max_workers=1)
    assert (folder / "ae.safetensors").read_bytes() == server.files["ae.safetensors"]
    server.log.clear()
    fetch()
    assert same_as_served(server, folder)
    assert int(re.search(r"\d+", server.asked(EMA)[0])[0]) > 4_000_000 and server.asked("ae.safetensors") == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="makes a small disk of memory with Linux' mount")
def test_a_small_disk_really_runs_full(server, folder):
    """The same with a disk of 8 MB, told beforehand that it were larger."""
    folder.mkdir()
    words = ["--repo", server.repository, "--to", str(folder), "--mirror", server.address, "--max-workers", "1"]
    program = f"""
import sys
from helpers.download import command, fetching
fetching.free_bytes = lambda folder: 10**9
sys.exit(command.main({words}))
"""
    (folder.parent / "run.py").write_text(program)
    settings = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = (
        f"mount -t tmpfs -o size=8m tmpfs {folder} && {sys.executable} {folder.parent}/run.py; echo rc=$?; ls {folder}"
    )
    ran = subprocess.run(["unshare", "-rm", "sh", "-c", script], env=settings, capture_output=True, text=True)
    if "mount:" in ran.stderr or "unshare:" in ran.stderr:
        pytest.skip("this machine lets nobody mount")
    assert "rc=1" in ran.stdout and "the disk is full" in ran.stderr and "Traceback" not in ran.stderr
    assert f"{EMA}.part" in ran.stdout and "ae.safetensors\n" in ran.stdout


def test_without_a_server_it_says_what_to_do(folder, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert main(["--repo", "test/tiny", "--to", str(folder), "--mirror", closed]) == 1
    said = capsys.readouterr().err
    assert f"{closed} cannot be reached" in said and "--mirror" in said and "source /etc/network_turbo" in said
    assert f"download --check --repo test/tiny --to {folder}" in said


def test_a_network_that_goes_away_for_good_keeps_what_came(server, fetch, folder):
    server.faults[EMA] = [cut(5_000_000), *[cut(0)] * 50]
    with pytest.raises(DownloadError, match="cannot be reached"):
        fetch()
    assert sum(json.loads((folder / f"{EMA}.part.json").read_text())["done"]) == 5_000_000
    assert len(server.asked(EMA)) == 1 + QUICK.retries


def test_a_login_page_is_not_taken_for_the_hub(server, fetch):
    def page(handler, _content):
        handler.send_response(200)
        handler.send_header("Content-Length", "6")
        handler.end_headers()
        handler.wfile.write(b"<html>")
        return True

    server.faults["api"] = [page]
    with pytest.raises(DownloadError, match="does not answer as the hub does"):
        fetch()


@pytest.mark.parametrize("name", ["../out.txt", "/out.txt", "a\\b", "c:x"])
def test_a_name_that_leads_out_of_the_folder_is_refused(server, fetch, folder, name):
    server.listed[name] = server.files[name] = b"x"
    with pytest.raises(DownloadError, match="leads out of the folder"):
        fetch()
    assert not folder.exists()


def test_a_file_that_another_program_left_half_is_continued(server, fetch, folder, capsys):
    folder.mkdir()
    (folder / EMA).write_bytes(server.files[EMA][:7_000_000])
    fetch()
    assert server.asked(EMA) == [f"bytes=7000000-{len(server.files[EMA]) - 1}"] and same_as_served(server, folder)
    assert f"{EMA} is cut short (7,000,000 of 13,627,440 bytes): going on from there" in capsys.readouterr().out


def test_a_half_file_of_other_content_is_found_out(server, fetch, folder):
    folder.mkdir()
    (folder / EMA).write_bytes(bytes(7_000_000))
    fetch()
    assert same_as_served(server, folder) and len(server.asked(EMA)) == 2


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda content: corrupt()(None, content), r"is damaged \(SHA-256 .* instead of"),
        (lambda content: content + b"?", "has 2,962,191 bytes instead of 2,962,190"),
    ],
)
def test_a_damaged_file_is_named_and_fetched_again_alone(server, fetch, folder, capsys, spoil, said):
    fetch()
    server.log.clear()
    (folder / "ae.safetensors").write_bytes(spoil(server.files["ae.safetensors"]))
    result = fetch()
    assert result.fetched == ("ae.safetensors",) and same_as_served(server, folder)
    assert re.search(rf"ae.safetensors {said}.*: fetching it again", capsys.readouterr().out)
    assert server.asked(EMA) == []


def test_a_file_is_replaced_only_by_one_that_is_right(server, fetch, folder):
    folder.mkdir()
    mine = bytes(len(server.files[EMA]))
    (folder / EMA).write_bytes(mine)
    server.faults[EMA] = [corrupt()] * 2
    with pytest.raises(DownloadError):
        fetch()
    assert (folder / EMA).read_bytes() == mine


def test_the_part_of_another_commit_is_not_continued(server, fetch, folder):
    server.faults[EMA] = [cut(5_000_000), *[status(403)] * 9]
    with pytest.raises(DownloadError):
        fetch()
    server.faults.clear()
    server.log.clear()
    server.listed[EMA] = server.files[EMA] = corrupt(5_000_000)(None, server.files[EMA])
    fetch()
    assert server.asked(EMA) == [None] and same_as_served(server, folder)


def test_without_checksums_sizes_are_compared_and_nothing_is_continued(server, fetch, folder):
    """Nobody could tell whether the two halves belong together."""
    server.without_checksums = True
    server.faults[EMA] = [cut(5_000_000), *[status(403)] * 9]
    with pytest.raises(DownloadError):
        fetch()
    server.faults.clear()
    server.log.clear()
    result = fetch()
    assert server.asked(EMA) == [None] and same_as_served(server, folder)
    compared = {file.name: file.by for file in result.files}
    assert compared[EMA] == ("size", "header") and compared["vocab.json"] == ("size", "JSON")
    (folder / "merges.txt").write_bytes(server.files["merges.txt"] + b"x")
    assert verify(folder).faults == {"merges.txt": "3,341 bytes instead of 3,340"}


def test_a_spoiled_count_is_not_believed(server, fetch, folder):
    folder.mkdir()
    (folder / f"{EMA}.part.json").write_text('{"done": [5')
    (folder / f"{EMA}.part").write_bytes(b"x")
    fetch()
    assert server.asked(EMA) == [None] and same_as_served(server, folder)


def test_an_empty_file_is_fetched_too(server, fetch, folder):
    server.files["empty.txt"] = server.listed["empty.txt"] = b""
    fetch()
    assert (folder / "empty.txt").read_bytes() == b""


def test_files_lie_in_folders_as_they_do_on_the_hub(server, fetch, folder):
    server.files["vae/a b.json"] = server.listed["vae/a b.json"] = b"{}"
    fetch()
    assert (folder / "vae" / "a b.json").read_bytes() == b"{}" and verify(folder).faults == {}


def test_two_downloads_into_one_folder_are_one_too_many(fetch, folder):
    folder.mkdir()
    with WeakFileLock(folder / fetching.LOCK), pytest.raises(DownloadError, match="another download is at work"):
        fetch()


def test_a_folder_holds_one_repository(server, fetch, folder):
    fetch(files=["merges.txt"])
    server.repository = "test/other"
    with pytest.raises(ValueError, match=r"holds test/tiny: name another folder for test/other with --to"):
        fetch()


def test_the_official_repository_must_hold_the_official_tensors(server, fetch, folder):
    """Its tensors are known; a file that came as the hub lists it, and holds others, is kept, and named."""
    server.repository = hub.OFFICIAL_MODEL
    for _ in range(2):
        with pytest.raises(
            DownloadError, match=rf"{EMA}: not the released model's: 12\d\d tensors are missing, unknown"
        ):
            fetch()
    assert len(server.asked(EMA)) == 1 and (folder / EMA).read_bytes() == server.files[EMA]


def test_with_the_official_tensors_it_is_well(server, fetch, monkeypatch):
    server.repository = hub.OFFICIAL_MODEL
    monkeypatch.setattr("helpers.download.verification.manifest", tiny_manifest)
    assert {file.name: file.by for file in fetch().files}[EMA] == ("size", "SHA-256", "header", "manifest")


def tiny_manifest(name):
    file = TINY / name
    return {one: tuple(entry["shape"]) for one, entry in hub.read_header(file)[0].items()} if "safe" in name else {}


def sparse(file, shapes, bytes_each=2):
    """A safetensors file of these tensors whose values take no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = bytes_each
        for side in shape:
            size *= side
        header[name] = {
            "dtype": "BF16" if bytes_each == 2 else "F32",
            "shape": shape,
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)
    return end


def test_a_folder_brought_by_hand_is_compared_with_the_released_tensors(tmp_path):
    for file in TINY.glob("*"):
        if file.suffix in (".json", ".txt"):
            shutil.copy(file, tmp_path)
    assert sparse(tmp_path / EMA, hub.manifest(EMA)) == 29_214_520_256
    assert sparse(tmp_path / "ae.safetensors", hub.manifest("ae.safetensors"), 4) == 335_278_732
    found = verify(tmp_path, hub.OFFICIAL_MODEL)
    assert found.faults == {} and found.snapshot is None
    assert {file.name: (file.by, file.tensors) for file in found.files}[EMA] == (("header", "manifest"), 1223)
    sparse(tmp_path / EMA, hub.manifest(EMA) | {"latent_pos_embed.pos_embed": (1024, 3584)})
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "llm_config.json").unlink()
    (tmp_path / "config.json").unlink()
    faults = verify(tmp_path, hub.OFFICIAL_MODEL).faults
    assert faults.pop(EMA).endswith(
        "1 tensors are missing, unknown or of another shape, latent_pos_embed.pos_embed among them"
    )
    assert faults.pop("vocab.json").startswith("no valid JSON")
    assert faults == {"merges.txt": "empty", "llm_config.json": "missing"}


@pytest.mark.parametrize("change", [b"", b"more"])
def test_a_weight_file_of_another_length_than_its_header_says_is_a_fault(tmp_path, change):
    import torch

    save_file({"a": torch.zeros(3)}, tmp_path / EMA)
    content = (tmp_path / EMA).read_bytes()
    (tmp_path / EMA).write_bytes(content + change if change else content[:-1])
    assert re.match(r"[\d,]+ bytes, but its header describes [\d,]+", verify(tmp_path).faults[EMA])


def test_nothing_at_all_is_missing_everywhere(tmp_path):
    assert set(verify(tmp_path / "none").faults.values()) == {"missing"} and len(verify("random-7b").faults) == 8


def test_no_token_goes_to_a_mirror(server, fetch, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(files=["merges.txt", EMA])
    assert server.tokens == {("api", None), ("test", None), ("cdn", None)}


def test_the_hub_itself_gets_the_token_and_the_host_of_its_files_does_not(server, folder):
    process = start(server, folder, "merges.txt", EMA, HF_TOKEN="hf_secret")
    assert process.wait(60) == 0
    assert server.tokens == {("api", "Bearer hf_secret"), ("test", "Bearer hf_secret"), ("cdn", None)}


def test_the_command_says_little_where_nobody_watches(server, folder):
    process = start(server, folder, "--max-workers", "2")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == "" and "\r" not in out
    lines = out.splitlines()
    assert re.fullmatch(r"fetched: 16\.7 MB in \d+\.\d s \(\d+\.\d [kMG]?B/s\)", lines[2])
    assert len(lines) == 3 + 1 + len(server.files) + 1
    assert lines[-1].startswith("done and verified: 16.7 MB in 12 files are right: size of 12, SHA-256 of 2, ")


def test_the_command_checks_a_folder_without_the_network(server, fetch, folder, capsys):
    fetch()
    server.log.clear()
    assert main(["--check", "--to", str(folder)]) == 0 and server.log == []
    (folder / EMA).write_bytes(b"x")
    assert main(["--check", "--to", str(folder)]) == 1
    assert f"1 of {len(server.files)} files are not right: {EMA}" in capsys.readouterr().err
    assert main(["--check", "--to", str(TINY), "--repo", "test/tiny"]) == 0
    assert "without the hub's checksums only the files' form was looked at" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--check", "--revision", "v1"], "--check looks at the whole folder"),
        (["--max-workers", "many"], "invalid int value"),
    ],
)
def test_the_command_refuses_wrong_use(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_the_command_ends_with_2_for_wrong_names_and_1_for_what_fails(server, folder, capsys):
    usual = ["--to", str(folder), "--mirror", server.address]
    assert main([*usual, "--repo", "test/tiny", "--revision", "v9"]) == 2
    assert "nothing was fetched: test/tiny has no revision 'v9'" in capsys.readouterr().err
    server.faults["vocab.json"] = [corrupt()] * 9
    assert main([*usual, "--repo", "test/tiny"]) == 1
    assert "not done: 1 of 12 files are not right: vocab.json" in capsys.readouterr().err
    assert main([*usual, "--repo", "test/tiny"]) == 1  # again damaged; then the fault is gone
    server.faults.clear()
    assert main([*usual, "--repo", "test/tiny"]) == 0


def test_on_autodl_the_data_disk_is_proposed(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "AUTODL_DATA", tmp_path / "none")
    assert hub.proposed_place() == ROOT.parent / "BAGEL-7B-MoT"
    monkeypatch.setattr(hub, "AUTODL_DATA", tmp_path)
    assert hub.proposed_place("DFloat11/BAGEL-7B-MoT-DF11") == tmp_path / "BAGEL-7B-MoT-DF11"
    assert fetching.free_bytes(hub.proposed_place()) > 0
