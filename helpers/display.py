"""What a notebook shows: sheets of pictures, strips, differences, animations, tables, a progress bar, the
versions line.

Everything here is static and small, so that an executed notebook can be read on a page that runs nothing, and
stays well under 1.5 MB: a sheet is one PNG, pictures smaller than their place are enlarged by whole factors
(crisp pixels).
"""

import base64
import io
import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps

_WIDEST = 1120  # pixels of a sheet: about the width of a notebook's output area
_GAP = 8
_INK, _PAPER, _FRAME = (40, 40, 40), (255, 255, 255), (200, 200, 200)
_FONT_SIZE = 13


@dataclass(frozen=True)
class Sheet:
    """A picture that shows itself once, as PNG, as a cell's last expression; `image` is the RGB picture."""

    image: Image.Image

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        text = f"picture of {self.image.width}x{self.image.height} pixels"
        return {"image/png": base64.b64encode(_png(self.image)).decode(), "text/plain": text}


@dataclass(frozen=True)
class Animation:
    """A GIF and, below it, its still strip: a page that cannot play the first shows the second."""

    gif: bytes
    still: Sheet
    frames: int
    fps: float

    def _ipython_display_(self) -> None:
        from IPython.display import display

        text = f"animation of {self.frames} frames, {self.fps:g} a second"
        display({"image/gif": base64.b64encode(self.gif).decode(), "text/plain": text}, raw=True)
        display(self.still)


def figure_sheet(figure, dpi: int = 90) -> Sheet:
    """A matplotlib figure as a picture of its size in inches times `dpi` pixels.

    For figures made with `matplotlib.figure.Figure`: without pyplot no figure stays open behind anyone's back.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    return Sheet(Image.open(drawn).convert("RGB"))


def grid(
    pictures: Sequence[Image.Image],
    titles: Sequence[str] | None = None,
    columns: int | None = None,
    size: int = 256,
) -> Sheet:
    """One sheet with all pictures in rows of `columns`, each under its title.

    `size` is the longest side of a picture's place in pixels; it shrinks where a row would not fit a page.
    Raises ValueError for no pictures, or for titles that are not as many as the pictures.
    """
    if not pictures:
        raise ValueError("grid: there are no pictures to show; give at least one")
    titles = list(titles) if titles is not None else [""] * len(pictures)
    if len(titles) != len(pictures):
        raise ValueError(f"grid: {len(titles)} titles for {len(pictures)} pictures; give one each, or none")
    columns = min(columns or max(1, (_WIDEST + _GAP) // (size + _GAP)), len(pictures))
    size = min(size, (_WIDEST + _GAP) // columns - _GAP)
    return Sheet(_lay_out([_fit(picture, size) for picture in pictures], titles, columns))


def strip(pictures: Sequence[Image.Image], titles: Sequence[str] | None = None, size: int = 128) -> Sheet:
    """All pictures in one row, as `grid` draws them: steps of a denoising path, frames of a clip."""
    return grid(pictures, titles, columns=max(1, len(pictures)), size=size)


def difference(before: Image.Image, after: Image.Image) -> Image.Image:
    """Where two pictures of one size differ: white where they are the same, darker the further apart.

    A pixel's darkness is the largest of its channels' differences. Raises ValueError if the sizes differ.
    """
    if before.size != after.size:
        raise ValueError(
            f"difference: the pictures are {before.size} and {after.size} pixels; resize one of them first"
        )
    red, green, blue = ImageChops.difference(before.convert("RGB"), after.convert("RGB")).split()
    return ImageOps.invert(ImageChops.lighter(ImageChops.lighter(red, green), blue)).convert("RGB")


def animation(
    frames: Sequence[Image.Image], fps: float = 4.0, size: int = 256, titles: Sequence[str] | None = None
) -> Animation:
    """Frames as a GIF that repeats, `fps` frames a second, with the same frames as a titled strip under it.

    Raises ValueError for no frames, or for a rate that is not above 0.
    """
    if not frames:
        raise ValueError("animation: there are no frames to show; give at least one")
    if not fps > 0:
        raise ValueError(f"animation: {fps} frames a second is not above 0; try fps=4")
    fitted = [_fit(frame, size) for frame in frames]
    buffer = io.BytesIO()
    fitted[0].save(buffer, "GIF", save_all=True, append_images=fitted[1:], duration=round(1000 / fps), loop=0)
    return Animation(buffer.getvalue(), strip(frames, titles), len(frames), fps)


@dataclass(frozen=True)
class Table:
    """Rows under a header, as an HTML table on a page and as aligned columns in text."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        def row(cells: Iterable[str], tag: str) -> str:
            style = ' style="text-align:left"'
            return "<tr>" + "".join(f"<{tag}{style}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(row(cells, "td") for cells in self.rows)
        html = f"<table><thead>{row(self.header, 'th')}</thead><tbody>{body}</tbody></table>"
        return {"text/html": html, "text/plain": str(self)}


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table to show or print, values written with str(). Raises ValueError for a row of another length."""
    lines = tuple(tuple(str(value) for value in row) for row in rows)
    for line in lines:
        if len(line) != len(header):
            raise ValueError(f"table: row {line} has {len(line)} values for {len(header)} columns")
    return Table(tuple(header), lines)


class Progress:
    """A bar for a loop of `total` steps; quiet where nobody watches, one summary line at the end everywhere.

    Calling it, with any arguments, is one step, so it can be handed over as `on_step=bar`. Someone watches
    when the output is a terminal or a notebook server started the kernel; papermill and nbval get the last
    line alone.
    """

    def __init__(self, total: int, label: str) -> None:
        self.total, self.label, self.done = total, label, 0
        self._start = time.perf_counter()
        self._drawn = 0
        self._handle = None

    def __enter__(self) -> "Progress":
        self._show()
        return self

    def __call__(self, *_ignored: object) -> None:
        self.done += 1
        self._show()

    def __exit__(self, kind, _value, _traceback) -> None:
        seconds = time.perf_counter() - self._start
        summary = self._summary(seconds, "" if kind is None else f", stopped by {kind.__name__}")
        if self._handle is not None:
            self._handle.update({"text/plain": summary}, raw=True)
        else:
            print(f"\r{summary:<{self._drawn}}" if sys.stdout.isatty() else summary, flush=True)

    def _summary(self, seconds: float, end: str) -> str:
        return f"{self.label}: {self.done} steps{end and f' of {self.total}{end}'} in {seconds:.1f} s"

    def _state(self) -> str:
        return f"{self.done}/{self.total}"

    def _show(self) -> None:
        """Draw the bar where it can be drawn over: on a terminal, or in a live notebook's output."""
        filled = min(20, round(20 * self.done / max(self.total, 1)))
        line = f"{self.label} [{'#' * filled}{'.' * (20 - filled)}] {self._state()}"
        if sys.stdout.isatty():
            # One that is wider than the terminal could not be drawn over, one that got shorter must cover the last.
            line = line[: shutil.get_terminal_size().columns - 1]
            print(f"\r{line:<{self._drawn}}", end="", flush=True)
            self._drawn = len(line)
        elif "JPY_SESSION_NAME" in os.environ:  # set by a notebook server for the kernels it starts, by nothing else
            from IPython.display import display

            if self._handle is None:
                self._handle = display({"text/plain": line}, raw=True, display_id=True)
            else:
                self._handle.update({"text/plain": line}, raw=True)


def progress(total: int, label: str) -> Progress:
    """A progress bar: `with progress(49, "denoising") as step: bagel.generate(prompt, on_step=step)`."""
    return Progress(total, label)


class ByteProgress(Progress):
    """The same for `total` bytes, with the rate: calling it with a number counts so many bytes, from any thread.

    It draws only when the thread that owns it calls `draw`, as often as it likes.
    """

    _WINDOW = 10.0  # seconds over which the shown rate is measured

    def __init__(self, total: int, label: str) -> None:
        super().__init__(total, label)
        self.note = ""  # what is shown behind the numbers
        self._lock = threading.Lock()
        self._seen = deque([(self._start, 0)])

    def __call__(self, count: int) -> None:
        with self._lock:
            self.done += count

    def say(self, text: str) -> None:
        """Print a line of its own, in the place of the bar, which is drawn again below."""
        print(f"\r{text:<{self._drawn}}" if sys.stdout.isatty() else text, flush=True)

    def draw(self) -> None:
        now = time.perf_counter()
        self._seen.append((now, self.done))
        while len(self._seen) > 2 and now - self._seen[0][0] > self._WINDOW:
            self._seen.popleft()
        self._show()

    def _summary(self, seconds: float, end: str) -> str:
        part = end and f" of {size(self.total)}{end}"
        return f"{self.label}: {size(self.done)}{part} in {seconds:.1f} s ({size(self.done / max(seconds, 1e-3))}/s)"

    def _state(self) -> str:
        (before, had), (now, have) = self._seen[0], self._seen[-1]
        rate = (have - had) / max(now - before, 1e-3)
        left = f", {(self.total - self.done) / rate / 60:.0f} min left" if rate > 0 else ""
        return f"{size(self.done)} of {size(self.total)}, {size(rate)}/s{left}{self.note}"


def size(count: float) -> str:
    """Bytes as people read them, in steps of 1000: "29.6 GB", "13.6 MB", "385 B"."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def versions() -> str:
    """One line: Python, torch, transformers, and the card torch can use or the processor."""
    from helpers.hardware import inspect

    machine = inspect()
    device = f"{machine.cores:g} CPU cores"
    if machine.torch_sees_card:
        device = f"{machine.cards[0].name} (CUDA {machine.torch_cuda})"
    parts = [
        f"Python {machine.python}",
        f"torch {machine.torch}",
        f"transformers {machine.transformers}",
        device,
    ]
    return " | ".join(parts)


def _fit(picture: Image.Image, size: int) -> Image.Image:
    """The picture, its longest side at most `size`: enlarged by a whole factor, or reduced smoothly."""
    picture = picture.convert("RGB")
    if max(picture.size) > size:
        picture = ImageOps.contain(picture, (size, size), Image.Resampling.LANCZOS)
    factor = size // max(picture.size)
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    # A hairline, or a white picture would have no edge on a white page.
    ImageDraw.Draw(picture).rectangle((0, 0, picture.width - 1, picture.height - 1), outline=_FRAME)
    return picture


def _lay_out(pictures: list[Image.Image], titles: Sequence[str], columns: int) -> Image.Image:
    """Draw pictures of at most one place's size in rows, wrapped titles above them."""
    font = ImageFont.load_default(_FONT_SIZE)
    width, height = (max(sides) for sides in zip(*(p.size for p in pictures), strict=True))
    wrapped = [_wrap(title, font, width) for title in titles]
    line = _FONT_SIZE + 4
    head = max(len(lines) for lines in wrapped) * line
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + _GAP) - _GAP, rows * (head + height + _GAP) - _GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (picture, lines) in enumerate(zip(pictures, wrapped, strict=True)):
        left, top = number % columns * (width + _GAP), number // columns * (head + height + _GAP)
        for row, text in enumerate(lines):
            pen.text((left, top + row * line), text, _INK, font)
        sheet.paste(picture, (left, top + head))
    return sheet


def _wrap(title: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """A title's lines, broken between words so that each fits `width` pixels if its words do."""
    lines: list[str] = []
    for word in title.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
