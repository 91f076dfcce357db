"""Time and memory of every verb, beside what this machine reached in the same run.

Seconds, bytes and rates are measured here and now; what is computed instead (the arithmetic of a picture, the
bytes that a token reads) says so.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import psutil
import torch
from PIL import Image

from .bagel.config import BagelConfig
from .bagel.flow import FlowSettings, timesteps
from .claims import CLAIMS
from .display import Sheet, Table, figure_sheet, progress, table

if TYPE_CHECKING:
    from .pipeline import BagelPipeline, TextResult

MEMORY = {
    "cuda": "peak of the card's memory that PyTorch held, weights included",
    "cpu": "peak of the process beyond what it held before the first verb, weights not included",
}
# Side of the square matrices and bytes of the copy: large enough that starting the work does not count.
_MATRIX = {"cuda": 8192, "cpu": 1024}
_COPY = {"cuda": 1 << 30, "cpu": 1 << 27}
_TRIES = 5
_BLOG_MEMORY = ("bf16-size", "dfloat11", "int8", "memory-advice")


@dataclass(frozen=True)
class Limits:
    """A device's rates, each a second: `matmul` floating-point operations, `copy` bytes read and written."""

    device: str
    dtype: str
    matmul: float
    copy: float


@dataclass(frozen=True)
class Measured:
    """One call of a verb; `memory` in bytes (see MEMORY), `tokens_per_second` where it wrote only text."""

    verb: str
    made: str
    seconds: float
    memory: int
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Cost:
    """One picture of `side` x `side` pixels: `seconds` measured, the rest computed.

    `forwards`: passes through the decoder; `flop`: floating-point operations of all of them (`forward_flop`).
    """

    side: int
    num_timesteps: int
    tokens: int
    forwards: int
    flop: float
    seconds: float


@torch.inference_mode()
def limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """The rates of a large square matrix product in `dtype` and of a large copy; the best of five tries."""
    side, size = _MATRIX[device.type], _COPY[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    matmul = 2 * side**3 / _fastest(device, lambda: left @ right)
    copy = 2 * size / _fastest(device, lambda: target.copy_(source))
    return Limits(str(device), str(dtype).removeprefix("torch."), matmul, copy)


def verbs(
    bagel: BagelPipeline,
    prompt: str,
    question: str,
    instruction: str,
    side: int,
    num_timesteps: int,
    max_new_tokens: int,
    count: int,
    seed: int,
) -> list[Measured]:
    """Every verb once, each after a short call that warms it up; all work on the picture that is made first.

    `side` in pixels; `max_new_tokens` ends an answer; `count`: frames to predict. The text's speed is that of
    the tokens after the first, so reading the picture does not count in it; None for an answer of one token.
    """
    before = psutil.Process().memory_info().rss
    drawn = {"height": side, "width": side, "seed": seed}
    picture = bagel.generate(prompt, num_timesteps=num_timesteps, **drawn).image
    size = f"{picture.width}x{picture.height}"
    # Verb, what it makes, the call for a number of timesteps.
    calls = (
        ("generate", f"1 picture of {size}", lambda n: bagel.generate(prompt, num_timesteps=n, **drawn)),
        ("edit", f"1 picture of {size}", lambda n: bagel.edit(picture, instruction, seed, num_timesteps=n)),
        ("predict_frames", f"{count} frames of {size}", lambda n: bagel.predict_frames(
            [picture], count, seed=seed, num_timesteps=n)),
        ("interleave", f"1 text, 1 picture of {size}", lambda n: bagel.interleave(
            [picture, question], ["text", "image"], max_new_tokens=max_new_tokens, seed=seed, num_timesteps=n,
        )),
    )  # fmt: skip
    with progress(len(calls) + 1, "verbs") as step:
        found = [_text(bagel, picture, question, max_new_tokens, before)]
        step()
        for verb, made, call in calls:
            call(2)
            found.append(_measure(bagel, verb, made, partial(call, num_timesteps), before))
            step()
    return found


def costs(
    bagel: BagelPipeline, prompt: str, sides: Sequence[int], num_timesteps: Sequence[int], seed: int
) -> list[Cost]:
    """Seconds of a picture from `prompt` for every pair of a side in pixels and a number of timesteps.

    The fastest of three calls counts: the first one warms up, and other work on the machine only adds.
    """
    found = []
    with progress(len(sides) * len(num_timesteps), "pictures") as step:
        for side, count in product(sides, num_timesteps):
            asked = {"height": side, "width": side, "num_timesteps": count, "seed": seed}
            calls = [bagel.generate(prompt, **asked) for _ in range(3)]
            tokens = (side // bagel.config.latent_stride) ** 2
            passes = forwards(calls[0].settings)
            flop = passes * forward_flop(bagel.config, tokens)
            found.append(Cost(side, count, tokens, passes, flop, min(call.seconds for call in calls)))
            step()
    return found


def forwards(settings: dict) -> int:
    """Passes through the decoder for a picture made from text alone; `settings` as an ImageResult holds them.

    One for each step, and one more, without the text, for each step with guidance.
    """
    flow = FlowSettings.among(settings)
    guided = flow.guided(timesteps(flow.num_timesteps, flow.timestep_shift))[:-1]
    return len(guided) + sum(guided)


def forward_flop(config: BagelConfig, tokens: int) -> float:
    """Floating-point operations of one pass over an image block: `tokens` latent tokens and two markers.

    The layers' linear parts and attention within the block; a prompt's few tokens, the embeddings and the
    autoencoder are left out.
    """
    block, decoder = tokens + 2, config.decoder
    attention = 4 * decoder.num_hidden_layers * decoder.hidden_size * block**2
    return 2.0 * expert_parameters(config) * block + attention


def expert_parameters(config: BagelConfig) -> int:
    """Weights in the linear parts of all layers of one expert."""
    decoder = config.decoder
    hidden, kv = decoder.hidden_size, decoder.num_key_value_heads * decoder.head_dim
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * decoder.intermediate_size
    return decoder.num_hidden_layers * layer


def token_bytes(bagel: BagelPipeline) -> int:
    """Bytes of weights that a text token reads: the understanding expert's layers and the output layer."""
    decoder = bagel.config.decoder
    weights = expert_parameters(bagel.config) + decoder.vocab_size * decoder.hidden_size
    return weights * bagel.model.dtype.itemsize


def weight_bytes(bagel: BagelPipeline) -> int:
    """Bytes that the loaded weights take: the model in its format, the autoencoder in float32."""
    modules = (bagel.model, bagel.autoencoder)
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def verb_table(measured: Sequence[Measured]) -> Table:
    """The verbs with seconds, memory in MB of 10^6 bytes, and tokens a second where only text was written."""
    rows = [
        (one.verb, one.made, f"{one.seconds:.2f}", f"{one.memory / 1e6:.0f}", _rounded(one.tokens_per_second))
        for one in measured
    ]
    return table(("verb", "made", "seconds", "memory MB", "tokens/s"), rows)


def _rounded(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.0f}"


def limit_table(found: Limits, bagel: BagelPipeline, measured: Sequence[Measured], picture: Cost) -> Table:
    """The machine's two rates beside the model's: arithmetic while it draws, reading while it writes."""
    pairs = {"arithmetic, GFLOP/s": (found.matmul, picture.flop / picture.seconds)}
    for speed in filter(None, (one.tokens_per_second for one in measured)):
        pairs["memory, GB/s"] = (found.copy, speed * token_bytes(bagel))
    rows = [(what, f"{has / 1e9:.1f}", f"{used / 1e9:.1f}", f"{used / has:.0%}") for what, (has, used) in pairs.items()]
    return table((f"{found.device}, {found.dtype}", "this machine", "the model", "share"), rows)


def blog_table(bagel: BagelPipeline, measured: Sequence[Measured]) -> Table:
    """The blog's rows about memory, what is known of each, and what this run saw."""
    kept = [claim for claim in CLAIMS if claim.key in _BLOG_MEMORY]
    rows = [(claim.claim, claim.note) for claim in sorted(kept, key=lambda one: _BLOG_MEMORY.index(one.key))]
    most = max(measured, key=lambda one: one.memory)
    seen = (
        f"weights {weight_bytes(bagel) / 1e9:.2f} GB in memory; most memory: {most.memory / 1e9:.2f} GB in "
        f"{most.verb} ({MEMORY[bagel.model.device.type]})"
    )
    return table(("the blog says", "known or seen"), [*rows, ("(this run)", seen)])


def plot_costs(found: Sequence[Cost], limit: Limits) -> Sheet:
    """Two plots, seconds against timesteps and against latent tokens.

    Dotted: what the decoder's arithmetic alone would take at the rate of the machine's matrix product.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    by_steps, by_tokens = figure.subplots(1, 2)
    for side in sorted({one.side for one in found}):
        points = [one for one in found if one.side == side]
        _line(by_steps, points, "num_timesteps", f"{side}x{side}", limit)
    for count in sorted({one.num_timesteps for one in found}):
        points = [one for one in found if one.num_timesteps == count]
        _line(by_tokens, points, "tokens", f"{count} timesteps", limit)
    by_steps.set(xlabel="timesteps", ylabel="seconds a picture", title="cost against steps")
    by_tokens.set(xlabel="latent tokens (one is 16x16 pixels)", title="cost against picture size")
    for axes in (by_steps, by_tokens):
        axes.plot([], [], "k:", label="arithmetic alone")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        axes.spines[["top", "right"]].set_visible(False)
    return figure_sheet(figure, dpi=100)


def _line(axes: Any, points: list[Cost], across: str, label: str, limit: Limits) -> None:
    points = sorted(points, key=lambda one: getattr(one, across))
    x = [getattr(one, across) for one in points]
    (line,) = axes.plot(x, [one.seconds for one in points], "o-", label=label)
    axes.plot(x, [one.flop / limit.matmul for one in points], ":", color=line.get_color())


def _text(bagel: BagelPipeline, picture: Image.Image, question: str, limit: int, before: int) -> Measured:
    """An answer, and the speed of its tokens after the first: the difference to a call that stops there."""

    def answer(tokens: int) -> TextResult:
        return bagel.understand(picture, question, max_new_tokens=tokens)

    answer(2)
    first, answers = answer(1).seconds, []
    measured = _measure(bagel, "understand", "", lambda: answers.append(answer(limit)), before)
    tokens, rest = len(answers[0].token_ids), measured.seconds - first
    speed = (tokens - 1) / rest if tokens > 1 and rest > 0 else None
    return replace(measured, made=f"{tokens} tokens", tokens_per_second=speed)


def _measure(bagel: BagelPipeline, verb: str, made: str, call: Callable[[], Any], before: int) -> Measured:
    """Seconds and memory of one call; it hands back pictures or texts, so the device is done at its end."""
    gc.collect()
    with _Memory(bagel.model.device, before) as memory:
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
    return Measured(verb, made, seconds, memory.bytes)


class _Memory:
    """Measures a block's memory as MEMORY says; `bytes` is set at its end.

    `before`: what the process held, in bytes; it is left out on a processor.
    """

    def __init__(self, device: torch.device, before: int):
        self.device, self.before, self.bytes = device, before, 0
        self._stop = threading.Event()
        self._process = psutil.Process()

    def __enter__(self) -> _Memory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self._stop.set()
            self._watcher.join()

    def _watch(self) -> None:
        """The operating system keeps no peak that can be reset, so look often; a shorter peak is missed."""
        while not self._stop.wait(0.002):
            self.bytes = max(self.bytes, self._process.memory_info().rss - self.before)


def _fastest(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds of the fastest of several tries, after one that does not count."""
    seconds = []
    for _ in range(_TRIES + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
