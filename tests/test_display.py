"""What notebooks show: sizes, titles, pixels kept crisp, and a bar that is quiet where nobody watches."""

import base64
import io
import re
import threading

import pytest
from PIL import Image

from helpers.display import ByteProgress, animation, difference, grid, progress, size, strip, table, versions

RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(color=RED, size=(32, 32)):
    return Image.new("RGB", size, color)


def test_a_grid_shows_one_png_and_no_memory_address():
    shown = grid([picture()] * 3, ["a", "b", "c"], columns=2, size=64)._repr_mimebundle_()
    assert set(shown) == {"image/png", "text/plain"} and "0x" not in shown["text/plain"]
    image = Image.open(io.BytesIO(base64.b64decode(shown["image/png"])))
    assert image.format == "PNG" and image.width == 2 * 64 + 8


def test_small_pictures_are_enlarged_by_whole_factors():
    checker = Image.new("RGB", (32, 32), RED)
    checker.paste(BLUE, (16, 0, 32, 32))
    sheet = grid([checker], size=100).image
    assert sheet.size == (96, 96)
    assert (sheet.getpixel((47, 50)), sheet.getpixel((48, 50))) == (RED, BLUE)


def test_large_pictures_are_reduced_and_a_row_fits_the_page():
    assert grid([picture(size=(1024, 512))], size=256).image.size == (256, 128)
    assert strip([picture(size=(64, 64))] * 20).image.width <= 1120
    assert grid([picture()] * 30, size=256).image.width <= 1120


def test_titles_take_their_own_lines_above_the_pictures():
    plain, titled = (
        grid([picture()], size=64),
        grid([picture()], ["a red circle left of a green star"], size=64),
    )
    assert titled.image.height > plain.image.height + 30
    assert titled.image.getpixel((32, titled.image.height - 5)) == RED


def test_wrong_counts_are_refused():
    with pytest.raises(ValueError, match="1 titles for 2 pictures"):
        grid([picture(), picture()], ["a"])
    with pytest.raises(ValueError, match="no pictures"):
        grid([])
    with pytest.raises(ValueError, match="no frames"):
        animation([])
    with pytest.raises(ValueError, match="0 frames a second"):
        animation([picture()], fps=0)


def test_a_difference_is_white_where_nothing_changed():
    after = picture()
    after.paste(BLUE, (0, 0, 8, 8))
    shown = difference(picture(), after)
    assert shown.getpixel((20, 20)) == (255, 255, 255) and shown.getpixel((2, 2)) == (0, 0, 0)
    with pytest.raises(ValueError, match=r"\(32, 32\) and \(16, 16\)"):
        difference(picture(), picture(size=(16, 16)))


def test_an_animation_holds_every_frame_and_a_strip():
    frames = [picture((shade, 0, 0)) for shade in range(0, 250, 25)]
    moving = animation(frames, fps=5)
    gif = Image.open(io.BytesIO(moving.gif))
    assert (gif.n_frames, gif.info["duration"], gif.info["loop"]) == (10, 200, 0)
    assert moving.still.image.width > moving.still.image.height


def test_a_table_is_text_and_html():
    shown = table(["what", "n"], [["<a>", 1], ["bb", 22]])
    assert str(shown).splitlines() == ["what  n", "<a>   1", "bb    22"]
    assert "&lt;a&gt;" in shown._repr_mimebundle_()["text/html"]
    with pytest.raises(ValueError, match="1 values for 2 columns"):
        table(["what", "n"], [["a"]])


def test_the_bar_prints_one_line_where_nobody_watches(capsys, monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    with progress(3, "denoising") as step:
        for number in range(3):
            step(number, 0.5, None)
    assert re.fullmatch(r"denoising: 3 steps in \d+\.\d s\n", capsys.readouterr().out)


def test_a_bar_of_bytes_counts_from_any_thread_and_says_the_rate(capsys, monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    with ByteProgress(16_000_000, "fetched") as bar:
        threads = [threading.Thread(target=lambda: [bar(1000) for _ in range(4000)]) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        bar.draw()
    assert bar.done == 16_000_000
    assert re.fullmatch(r"fetched: 16\.0 MB in \d+\.\d s \(\d+\.\d [kMG]B/s\)\n", capsys.readouterr().out)


def test_a_bar_of_bytes_shows_what_is_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    bar = ByteProgress(50_000_000_000, "fetched")
    for _ in range(30):  # a second each: first 1 GB, then 100 MB
        now[0] += 1
        bar(10**9 if now[0] <= 115 else 10**8)
        bar.draw()
    bar.note = ", checking a"
    assert bar._state() == "16.5 GB of 50.0 GB, 100.0 MB/s, 6 min left, checking a"


def test_a_shorter_line_covers_the_last_one(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with ByteProgress(1000, "x") as bar:
        bar.note = ", a long note that goes away"
        bar.draw()
        bar.note = ""
        bar.draw()
        last = capsys.readouterr().out.split("\r")[-2:]
    assert len(last[0]) == len(last[1]) and "note" not in last[1]


def test_a_line_is_no_wider_than_the_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "50")
    with ByteProgress(1000, "x") as bar:
        bar.note = ", " + "a long note" * 9
        bar.draw()
        assert max(map(len, capsys.readouterr().out.split("\r"))) == 49


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (385, "385 B"), (13_627_440, "13.6 MB"), (29_549_798_988, "29.5 GB"), (2e12, "2000.0 GB")],
)
def test_sizes_are_those_of_steps_of_1000(count, said):
    assert size(count) == said


def test_the_bar_says_where_an_error_stopped_it(capsys, monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    with pytest.raises(KeyError), progress(3, "denoising") as step:
        step()
        raise KeyError
    assert "1 steps of 3, stopped by KeyError" in capsys.readouterr().out


def test_the_versions_fit_one_line():
    assert re.fullmatch(r"Python 3\.\S+ \| torch \S+ \| transformers \S+ \| [^\n]+", versions())
