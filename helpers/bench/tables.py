"""The measured rows as tables and as a picture."""

from __future__ import annotations

from collections.abc import Sequence

from ..claims import CLAIMS
from ..display import Sheet, Table, figure_sheet, table
from ..pipeline import BagelPipeline
from .floors import weight_bytes
from .loss import Loss
from .measuring import MEMORY, Row

HEADER = (
    *("work", "weights", "seconds", "each", "first call", "prefill", "denoise", "decode"),
    *("tokens/s", "peak GB", "reserved GB", "floor", "share"),
)
_BLOG_MEMORY = ("bf16-size", "dfloat11", "int8", "memory-advice")
_PARTS = {"prefill": "#4477aa", "denoise": "#ee8833", "decode": "#228855"}
_WHOLE = "#999999"


def cells(row: Row) -> tuple[str, ...]:
    """A row's texts under HEADER: times in seconds, memory in 10^9 bytes; empty where there is nothing to say."""
    each = row.seconds / row.count if row.seconds and row.count > 1 and row.tokens_per_second is None else None
    return (
        row.work,
        row.weights,
        row.error or _seconds(row.seconds),
        *map(_seconds, (each, row.first_seconds, row.prefill, row.denoise, row.decode)),
        "" if row.tokens_per_second is None else f"{row.tokens_per_second:.1f}",
        *("" if peak is None else f"{peak / 1e9:.2f}" for peak in (row.peak_allocated, row.peak_reserved)),
        _seconds(row.floor_seconds),
        "" if row.share is None else f"{row.share:.0%}",
    )


def row_table(rows: Sequence[Row]) -> Table:
    return table(HEADER, map(cells, rows))


def loss_table(losses: Sequence[Loss]) -> Table:
    """Faster modes beside the exact picture: PSNR in dB, relative errors of the velocity (see Loss)."""
    header = ("work", "weights", "against", "PSNR, dB", "velocity, first step", "velocity, mean of the path")
    return table(header, [
        (
            *(one.work, one.weights, one.against),
            "the same picture" if one.psnr is None else f"{one.psnr:.1f}",
            *(f"{error:.2%}" for error in (one.first_velocity, one.mean_velocity)),
        )
        for one in losses
    ])  # fmt: skip


def plot_rows(rows: Sequence[Row]) -> Sheet:
    """A bar for each row with a floor: where its seconds went, and a black line where the floor is."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.seconds is not None and row.floor_seconds is not None]
    figure = Figure((10, 1.2 + 0.4 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for height, row in enumerate(shown):
        parts = [(getattr(row, name), color) for name, color in _PARTS.items()]
        left = 0.0
        for seconds, color in parts if row.denoise is not None else [(row.seconds, _WHOLE)]:
            axes.barh(height, seconds, left=left, color=color)
            left += seconds
        axes.plot([row.floor_seconds] * 2, [height - 0.4, height + 0.4], color="black", linewidth=2)
        axes.text(max(left, row.floor_seconds), height, f" {row.share:.0%}", va="center", fontsize=9)
    for label, color in {**_PARTS, "not split": _WHOLE}.items():
        axes.barh(0, 0, color=color, label=label)
    axes.plot([], [], color="black", linewidth=2, label="floor, in percent of the bar")
    axes.set(yticks=range(len(shown)), yticklabels=[row.work for row in shown], xlabel="seconds of a call")
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(_PARTS) + 2, frameon=False)
    return figure_sheet(figure, dpi=100)


def blog_table(bagel: BagelPipeline, rows: Sequence[Row]) -> Table:
    """The blog's rows about memory, what is known of each, and what this run saw."""
    kept = [claim for claim in CLAIMS if claim.key in _BLOG_MEMORY]
    known = [(claim.claim, claim.note) for claim in sorted(kept, key=lambda one: _BLOG_MEMORY.index(one.key))]
    most = max(rows, key=lambda row: row.peak_allocated or 0)
    seen = (
        f"weights {weight_bytes(bagel) / 1e9:.2f} GB in memory; most memory: {(most.peak_allocated or 0) / 1e9:.2f} GB "
        f"in {most.work} ({MEMORY[bagel.model.device.type]})"
    )
    return table(("the blog says", "known or seen"), [*known, ("(this run)", seen)])


def _seconds(seconds: float | None) -> str:
    """Three digits that count."""
    return "" if seconds is None else f"{seconds:.2f}" if seconds >= 10 else f"{seconds:.3f}"
