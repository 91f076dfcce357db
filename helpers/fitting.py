"""What the 7B model takes in each weight format, for each kind of work, and what of that fits a card.

An estimate from the model's sizes and from what works took beside the weights on one H200 (outputs/h200), with their
largest inputs: a question about a picture of 980x980, a picture and an edit of 1024x1024.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from math import prod

from .hardware import GB, Card
from .hub import official_shapes

# Work -> GB beside the weights, on one H200 in bfloat16 and FP8: 1.3 and 1.2, 2.4 and 2.3, 3.7 and 3.6.
BESIDE = {"understanding": 1.3, "text-to-image 1024x1024": 2.4, "editing 1024x1024": 3.7}
# What the driver, CUDA's libraries and gaps between tensors take of a card, in GB.
OVERHEAD = 0.9
LAYER_MATRIX = re.compile(r"language_model\.model\.layers\.\d+\..*_proj(_moe_gen)?\.weight")
GENERATION = re.compile(r"_moe_gen|time_embedder\.|vae2llm\.|llm2vae\.|latent_pos_embed\.|^(encoder|decoder)\.")


@dataclass(frozen=True)
class Format:
    """A weight format: bytes of a weight in the decoder's layers, the least compute capability, what it costs.

    `room`: its layers become whole in a buffer for each product.
    """

    name: str
    bytes: float
    capability: tuple[int, int]
    loss: str
    speed: str
    room: bool = True


# The first that fits is recommended: what loses nothing, then what is fast, then what is small.
FORMATS = (
    Format("bf16", 2, (8, 0), "nothing", "full", room=False),
    Format("fp16", 2, (7, 0), "nothing, unless it overflows", "plain layers", room=False),
    Format("df11", 1.37, (8, 0), "nothing", "decodes every layer for every pass"),
    Format("fp8", 1, (8, 9), "rounding to 8 bits", "the fastest", room=False),
    Format("int8", 1, (7, 0), "rounding to 8 bits", "makes every layer whole for every pass"),
    Format("nf4", 0.53125, (7, 0), "rounding to 4 bits", "makes every layer whole for every pass"),
    Format("int4", 0.53125, (7, 0), "rounding to 4 bits", "makes every layer whole for every pass"),
)


@dataclass(frozen=True)
class Fit:
    """A format on a card: expected peaks by work in bytes, and whether card and memory are enough for each work."""

    format: Format
    peaks: dict[str, float]
    fits: dict[str, bool]

    @property
    def works(self) -> list[str]:
        """What fits."""
        return [work for work, fits in self.fits.items() if fits]


def expected_peak(form: Format, work: str, experts: str = "all") -> float:
    """Bytes that a call holds at most, weights included; compare `torch.cuda.max_memory_allocated`."""
    return weight_bytes(form, experts) + BESIDE[work] * GB


def weight_bytes(form: Format, experts: str = "all") -> float:
    """Bytes of the loaded weights: layers in the format, the autoencoder in float32, the rest in 16 bits."""
    layers, rest, autoencoder, largest = _sizes(experts)
    return layers * form.bytes + 2 * rest + 4 * autoencoder + (2 * largest if form.room else 0)


def fits(card: Card) -> list[Fit]:
    """Every format on a card that has nothing else to do."""
    return [_fit(form, card) for form in FORMATS]


def recommended(card: Card) -> Fit | None:
    """The first format with which most kinds of work fit; None where none does."""
    best = max(fits(card), key=lambda fit: len(fit.works))
    return best if best.works else None


def _fit(form: Format, card: Card) -> Fit:
    peaks = {work: expected_peak(form, work) for work in BESIDE}
    able = card.capability >= form.capability
    return Fit(form, peaks, {work: able and peak + OVERHEAD * GB <= card.memory for work, peak in peaks.items()})


@cache
def _sizes(experts: str) -> tuple[int, int, int, int]:
    """Numbers in the layers' matrices, the rest of the model, the autoencoder, the weights of the largest product."""
    counts = {"layers": 0, "rest": 0, "autoencoder": 0}
    largest = 0
    for name, shape in official_shapes().items():
        if experts == "understanding" and GENERATION.search(name):
            continue
        part = "autoencoder" if name.startswith(("encoder.", "decoder.")) else "rest"
        part = "layers" if LAYER_MATRIX.fullmatch(name) else part
        counts[part] += prod(shape)
        largest = max(largest, 2 * prod(shape) if ".gate_proj." in name else 0)  # gate and up are one product
    return *counts.values(), largest
