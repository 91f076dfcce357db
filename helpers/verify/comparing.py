"""Two sides' vectors, field by field: how far apart, how far they may be, and why so far."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from ..bench.loss import psnr
from ..display import Table, table
from .exchange import Vectors
from .official import kind
from .works import Works

# Of the largest value. Float32 rounds at 6e-8; two correct implementations of this depth lie some 1e-6 apart.
FLOAT32 = 2e-4
# Relative distance of neighbouring numbers in bfloat16, and in the TF32 that cards convolve float32 in.
BFLOAT16, TF32 = 2.0**-7, 2.0**-10
# Convolutions, one behind the other, of the encoder or the decoder of FLUX's autoencoder.
CONVOLUTIONS = 30
# One grey level of rounding, in few values.
LEVELS, LEVELS_SHARE = 1, 0.005
EXPLAINED = {
    "fp32": f"{FLOAT32:g} of the largest value; the reference vectors are held to the same",
    "bf16": (
        "2^-7 x sqrt(layers) of the largest value: bfloat16 keeps 8 binary digits, so each layer's output is off by up "
        "to 2^-8 on either side, and independent errors of so many layers add up as their root. Image guidance with "
        "scale s multiplies the errors of its two branches, by sqrt(s^2 + (s - 1)^2); of text guidance's, "
        "renormalisation leaves about sqrt(s). A picture's error is a root mean square, counted as a quarter of the "
        "largest"
    ),
}
EXACT = ("position_ids", "noise")
AUTOENCODER = ("latent_mean", "decoded")


@dataclass(frozen=True)
class Row:
    """One field of a case: `largest` difference, `relative` to the largest official value, and what is allowed.

    `within`: whether it is. `note`: what the numbers cannot say, such as where two texts part.
    """

    what: str
    largest: float
    relative: float
    tolerance: float
    within: bool
    note: str = ""


def compare(works: Works, theirs: Vectors, ours: Vectors) -> list[Row]:
    """A row for each field that the other side has.

    Raises ValueError where ours lacks one, or where there is nothing to compare.
    """
    missing = sorted(theirs.tensors.keys() - ours.tensors.keys())
    if missing:
        raise ValueError(f"{', '.join(missing[:4])}: the other side has these, and this version makes no such vectors.")
    if not theirs.tensors:
        raise ValueError("The other side holds no vectors: there is nothing to compare.")
    rules = Rules(works, theirs.facts, ours.facts)
    return [rules.row(name, theirs.tensors, ours.tensors) for name in sorted(theirs.tensors, key=_order(works))]


def _order(works: Works):
    places = {name: place for place, name in enumerate(works.cases)}
    return lambda name: (places[name.split(".")[0]], name)


@dataclass(frozen=True)
class Rules:
    """What is compared how, between runs with these facts; the coarser type of the two sides counts."""

    works: Works
    theirs: dict[str, Any]
    ours: dict[str, Any]

    @property
    def weights(self) -> str:
        return "bf16" if "bf16" in (self.theirs["weights"], self.ours["weights"]) else "fp32"

    def tolerance(self, case: str, field: str) -> float:
        """How far a field may be from the other side's, as a part of its largest value."""
        if field in EXACT:
            return 0.0
        if field == "pixels":
            return FLOAT32
        if field in AUTOENCODER:
            on_card = "cuda" in (self.theirs["device_type"], self.ours["device_type"])
            return TF32 * math.sqrt(CONVOLUTIONS) if on_card else FLOAT32
        if self.weights == "fp32":
            return FLOAT32
        return BFLOAT16 * math.sqrt(self.layers(case)) * self.guidance(case)

    def layers(self, case: str) -> int:
        """How many layers a case's numbers have come through."""
        sizes = self.ours["sizes"]
        return sizes["ViT layers"] + (0 if kind(case) == "vit" else sizes["decoder layers"])

    def guidance(self, case: str) -> float:
        """How much guidance enlarges the errors of velocities.

        The official code in bfloat16 against ours, on small models of 6 and of 54 layers: 1.0e-2 at most without
        guidance, 2.1e-2 with text guidance of 4, 4.7e-2 with image guidance of 2 besides.
        """
        options = self.works.cases[case].get("options", {})
        text, image = (max(1.0, options.get(f"cfg_{name}_scale", 1.0)) for name in ("text", "img"))
        return math.sqrt(text) * math.hypot(image, image - 1)

    def row(self, name: str, theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> Row:
        case, field = name.split(".")
        its, mine = theirs[name], ours[name]
        if field == "tokens":
            return self.tokens(name, its, mine, theirs.get(f"{case}.logits"))
        if its.shape != mine.shape:
            note = f"shape {list(mine.shape)}, not {list(its.shape)}"
            return Row(name, math.inf, math.inf, self.tolerance(case, field), False, note)
        if field == "image":
            return self.image(name, its, mine)
        largest, relative = distance(mine, its)
        tolerance = self.tolerance(case, field)
        return Row(name, largest, relative, tolerance, relative <= tolerance)

    def tokens(self, name: str, its: Tensor, mine: Tensor, logits: Tensor | None) -> Row:
        """Equal up to the first difference; in bfloat16 they may part where two tokens' logits are all but equal."""
        count = min(len(its), len(mine))
        differing = (its[:count] != mine[:count]).nonzero()
        equal = differing[0].item() if len(differing) else count
        if equal == len(its) == len(mine):
            return Row(name, 0.0, 0.0, 0.0, True, f"all {equal} equal")
        note = f"{equal} of {len(its)} equal"
        if self.weights == "fp32" or logits is None or not 0 < equal < count:
            return Row(name, math.inf, math.inf, 0.0, False, note)
        return self.parting(name, logits[equal - 1], its[equal].item(), mine[equal].item(), note)

    def parting(self, name: str, logits: Tensor, its: int, mine: int, note: str) -> Row:
        """Two texts that part: the official logits [vocabulary] say how near the two tokens were to each other."""
        gap = (logits[its] - logits[mine]).item()
        relative = gap / logits.abs().max().item()
        tolerance = 2 * self.tolerance(name.split(".")[0], "logits")  # both logits may be off
        return Row(name, gap, relative, tolerance, relative <= tolerance, f"{note}, then the logits of a near tie")

    def image(self, name: str, its: Tensor, mine: Tensor) -> Row:
        """Pictures uint8 [height, width, 3]: grey levels apart, as a part of 255; where latents may differ, by PSNR."""
        apart = (its.int() - mine.int()).abs()
        largest, share = apart.max().item(), (apart > 0).float().mean().item()
        decibels = psnr(Image.fromarray(mine.numpy()), Image.fromarray(its.numpy()))
        note = "the same picture" if decibels is None else f"PSNR {decibels:.1f} dB"
        case = name.split(".")[0]
        tolerance = max(self.tolerance(case, "latent"), self.tolerance(case, "decoded"))
        if tolerance <= FLOAT32:
            within = largest <= LEVELS and share <= LEVELS_SHARE
            return Row(name, largest, largest / 255, LEVELS / 255, within, f"{note}, {share:.2%} of the values differ")
        # A relative error of the latent counts as that part of the grey range. PSNR is -20 log10 of the root mean
        # square; the largest of some thousand errors is about four times that. Rounding to levels comes on top.
        relative, tolerance = 0.0 if decibels is None else 10 ** (-decibels / 20), max(tolerance / 4, LEVELS / 255)
        return Row(name, largest, relative, tolerance, relative <= tolerance, note)


def distance(mine: Tensor, its: Tensor) -> tuple[float, float]:
    """(largest difference, the same as a part of the largest absolute official value); infinite for NaN."""
    largest = (mine.double() - its.double()).abs().max().item()
    most = its.double().abs().max().item()
    if math.isnan(largest):
        return math.inf, math.inf
    return largest, largest / most if most else (math.inf if largest else 0.0)


def different_sizes(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What the two models differ in before anything is computed."""
    known, own = theirs.get("sizes", {}), ours["sizes"]
    differing = [name for name, value in known.items() if own.get(name) != value]
    return [f"{name} is {own.get(name)} here and {known[name]} there" for name in differing]


HEADER = ("what", "largest difference", "relative error", "tolerance", "within", "")


def row_table(rows: list[Row]) -> Table:
    return table(
        HEADER,
        [
            (
                row.what,
                f"{row.largest:.3g}",
                f"{row.relative:.2e}",
                f"{row.tolerance:.2e}",
                "yes" if row.within else "NO",
                row.note,
            )
            for row in rows
        ],
    )


def cost_table(works: Works, theirs: Vectors, ours: Vectors) -> Table:
    """Seconds and peaks of memory of both sides, a row for each work."""

    def cells(case: str) -> Iterator[str]:
        for what, form in (("seconds", "{:.3f}"), ("peaks", "{:.2f}")):
            for facts in (theirs.facts, ours.facts):
                value = facts.get(what, {}).get(case)
                yield "" if value is None else form.format(value / 1e9 if what == "peaks" else value)

    header = ("work", "seconds, other side", "seconds, ours", "peak GB, other side", "peak GB, ours")
    return table(header, [(case, *cells(case)) for case in works.cases])
