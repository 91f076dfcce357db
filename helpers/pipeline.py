"""The verbs: understand, generate, edit, interleave, predict_frames.

Every verb opens one `Session`, appends its inputs in order and asks for texts or pictures. A list where one value is
expected makes a batch: sample i gives what a single run with its seed gives.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .bagel.decoding import sampling_processors
from .bagel.flow import FlowSettings
from .bagel.images import fitted_size, open_picture
from .bagel.session import Parts, Plan, Session, block_tokens, latent_block
from .bagel.text import THINK_TO_ANSWER, THINK_TO_DRAW, split_thought
from .checkpoint import choose, load

TINY = Path(__file__).parent / "tiny" / "checkpoint"
MAX_NEW_TOKENS = 1000  # the official limit of an answer
NEXT_FRAME = "the next frame"

Picture = Image.Image | Path | str
OnStep = Callable[[int, float, Tensor], None]


@dataclass(frozen=True)
class TextResult:
    """An answer; `thought` is None without think mode (or when the model closed no thought). `seconds`: of the call."""

    text: str
    thought: str | None
    token_ids: list[int]
    seconds: float


@dataclass(frozen=True)
class ImageResult:
    """A picture with all that makes it again: `latent` float32 [tokens, 4 * channels], its seed and settings."""

    image: Image.Image
    latent: Tensor
    thought: str | None
    seed: int
    settings: dict
    seconds: float


@dataclass(frozen=True)
class FramesResult:
    """Predicted frames in order, without the given ones."""

    frames: list[Image.Image]
    seed: int
    settings: dict
    seconds: float


def load_bagel(
    model: Path | str = "tiny", weights: str = "auto", device: str = "auto", attention: str = "auto"
) -> BagelPipeline:
    """A BAGEL that is ready to use: "tiny" (the model in this repository) or an official checkpoint folder.

    `weights`: "auto", "bf16", "fp32". `device`: "auto", "cpu", "cuda", "cuda:N". `attention`: "auto", "sdpa",
    "cudnn", "flash_attn". Prints what "auto" chose and why. Errors: see `helpers.checkpoint.load`.
    """
    folder = TINY if str(model) == "tiny" else Path(model)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{str(model)!r} is neither 'tiny' nor a folder here: name the folder that holds ema.safetensors; "
            "notebook 01 shows how to fetch it."
        )
    choices = choose(device, weights, attention)
    if "auto" in (weights, attention):
        print(f"{folder.name if model != 'tiny' else 'tiny BAGEL'} on {choices.device}: {choices.reason}")
    return BagelPipeline(load(folder, choices), folder)


class BagelPipeline:
    """One loaded model and its verbs. Nothing but the weights survives a call."""

    def __init__(self, parts: Parts, folder: Path):
        self.parts = parts
        self.folder = folder

    @property
    def model(self):
        return self.parts.model

    @property
    def autoencoder(self):
        return self.parts.autoencoder

    @property
    def codec(self):
        return self.parts.codec

    @property
    def config(self):
        return self.parts.config

    @property
    def native_size(self) -> tuple[int, int]:
        """(height, width) of the largest square picture that the model has positions for."""
        return self.config.native_side, self.config.native_side

    def close(self) -> None:
        """Free the weights' memory; the object cannot be used afterwards."""
        del self.parts
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def understand(
        self,
        image_or_images: Picture | Sequence | None,
        question: str | list[str],
        think: bool = False,
        max_new_tokens: int | None = None,
        do_sample: bool = False,
        temperature: float = 0.3,
        top_p: float = 1.0,
        seed: int | list[int] | None = None,
    ) -> TextResult | list[TextResult]:
        """Answer a question about a picture, several pictures, or none.

        A list of questions is a batch: then `image_or_images` is None, one picture for all, or a list with an entry
        (a picture or a list of pictures, equally many for all) for each question. `max_new_tokens` None: 1000.
        """
        batch = len(question) if isinstance(question, list) else None
        inputs = [*_columns(image_or_images, batch), question]
        writing = Writing(max_new_tokens, do_sample, temperature, top_p)
        return _only(self._run(inputs, ["text"], think, writing, None, seed))

    def generate(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        seed: int | list[int] = 42,
        think: bool = False,
        cfg_text_scale: float = 4.0,
        cfg_img_scale: float = 1.0,
        cfg_interval: tuple[float, float] = (0.4, 1.0),
        timestep_shift: float = 3.0,
        num_timesteps: int = 50,
        cfg_renorm_min: float = 0.0,
        cfg_renorm_type: str = "global",
        max_think_tokens: int = 1000,
        step_cache: str | None = None,
        on_step: OnStep | None = None,
    ) -> ImageResult | list[ImageResult]:
        """Make a picture from a text; a list of prompts makes a batch.

        Sizes in pixels (None: the model's native square). `on_step(step, t, latent)` hears of every step.
        """
        flow = FlowSettings(
            cfg_text_scale, cfg_img_scale, tuple(cfg_interval), timestep_shift, num_timesteps, cfg_renorm_min,
            cfg_renorm_type, step_cache,
        )  # fmt: skip
        drawing = Drawing(flow, height, width, "sample", "both", max_think_tokens, on_step)
        return _only(self._run([prompt], ["image"], think, Writing(), drawing, seed))

    def edit(
        self,
        image: Picture | list[Picture],
        instruction: str | list[str],
        seed: int | list[int] = 42,
        think: bool = False,
        cfg_text_scale: float = 4.0,
        cfg_img_scale: float = 2.0,
        cfg_interval: tuple[float, float] = (0.0, 1.0),
        timestep_shift: float = 3.0,
        num_timesteps: int = 50,
        cfg_renorm_min: float = 0.0,
        cfg_renorm_type: str = "text_channel",
        max_think_tokens: int = 1000,
        posterior: str = "sample",
        encoders: str = "both",
        step_cache: str | None = None,
        on_step: OnStep | None = None,
    ) -> ImageResult | list[ImageResult]:
        """Change a picture as told; a list of pictures, of instructions or of both makes a batch.

        `encoders`: "both" (the model's way), or "vae" or "vit" to see what one encoder alone can do.
        """
        flow = FlowSettings(
            cfg_text_scale, cfg_img_scale, tuple(cfg_interval), timestep_shift, num_timesteps, cfg_renorm_min,
            cfg_renorm_type, step_cache,
        )  # fmt: skip
        drawing = Drawing(flow, None, None, posterior, encoders, max_think_tokens, on_step)
        pictures = [_picture(one) for one in image] if isinstance(image, list) else _picture(image)
        return _only(self._run([pictures, instruction], ["image"], think, Writing(), drawing, seed))

    def interleave(
        self,
        inputs: list,
        make: Sequence[str],
        think: bool = False,
        max_new_tokens: int | None = None,
        do_sample: bool = False,
        temperature: float = 0.3,
        top_p: float = 1.0,
        max_think_tokens: int = 1000,
        height: int | None = None,
        width: int | None = None,
        seed: int | list[int] | None = 42,
        cfg_text_scale: float = 4.0,
        cfg_img_scale: float = 2.0,
        cfg_interval: tuple[float, float] = (0.0, 1.0),
        timestep_shift: float = 3.0,
        num_timesteps: int = 50,
        cfg_renorm_min: float = 0.0,
        cfg_renorm_type: str = "text_channel",
        posterior: str = "sample",
        encoders: str = "both",
        step_cache: str | None = None,
        on_step: OnStep | None = None,
    ) -> list:
        """Texts and pictures in, a sequence of texts and pictures out; each result joins the growing context.

        `inputs`: texts and pictures in order (a picture file as a `Path`: a string is a text); an entry that is a
        list holds one value a sample and makes a batch.
        `make`: any sequence of "text" and "image"; one result comes back for each (for a batch: a list of them for
        each sample). Pictures enter as ViT blocks alone when no image is to be made. An image takes the size of the
        last picture before it, else (height, width), else the model's native square. `encoders`: as in `edit`.
        """
        flow = FlowSettings(
            cfg_text_scale, cfg_img_scale, tuple(cfg_interval), timestep_shift, num_timesteps, cfg_renorm_min,
            cfg_renorm_type, step_cache,
        )  # fmt: skip
        writing = Writing(max_new_tokens, do_sample, temperature, top_p)
        drawing = Drawing(flow, height, width, posterior, encoders, max_think_tokens, on_step)
        return self._run(inputs, make, think, writing, drawing, seed)

    def predict_frames(
        self,
        frames: list,
        count: int = 10,
        prompt: str | list[str] | None = None,
        seed: int | list[int] = 42,
        height: int | None = None,
        width: int | None = None,
        cfg_text_scale: float = 4.0,
        cfg_img_scale: float = 2.0,
        cfg_interval: tuple[float, float] = (0.0, 1.0),
        timestep_shift: float = 3.0,
        num_timesteps: int = 50,
        cfg_renorm_min: float = 0.0,
        cfg_renorm_type: str = "text_channel",
        posterior: str = "sample",
        step_cache: str | None = None,
        on_step: OnStep | None = None,
    ) -> FramesResult | list[FramesResult]:
        """Continue a clip: each new frame is drawn after an instruction and appended to one growing context.

        `frames`: the first pictures (a list of clips makes a batch), or [] to make all from the prompt.
        `prompt` None: "the next frame"; it stands before each new frame. `height` and `width` count without frames.
        Experimental on the released weights, which were trained on clips of few frames.
        """
        if not frames and prompt is None:
            raise ValueError("Without frames there must be a prompt that describes the clip.")
        flow = FlowSettings(
            cfg_text_scale, cfg_img_scale, tuple(cfg_interval), timestep_shift, num_timesteps, cfg_renorm_min,
            cfg_renorm_type, step_cache,
        )  # fmt: skip
        drawing = Drawing(flow, height, width, posterior, "both", 0, on_step)
        batch = len(frames) if frames and isinstance(frames[0], (list, tuple)) else None
        instruction = NEXT_FRAME if prompt is None else prompt
        inputs = [*_columns(frames, batch), *([instruction] * _positive("count", count))]
        work = Work.prepare(self, inputs, ["image"] * count, False, Writing(), drawing, seed)
        given, instructions = work.parts[:-count], work.parts[-count:]
        work.append(given)
        results = []
        for texts in instructions:
            work.append([texts])
            results.append(work.image(keep=len(results) + 1 < count))
        clips = [
            FramesResult([result.image for result in clip], clip[0].seed, clip[0].settings, work.seconds())
            for clip in zip(*results, strict=True)
        ]
        return clips if work.batched else clips[0]

    def _run(self, inputs, make, think, writing: Writing, drawing: Drawing | None, seed) -> list:
        work = Work.prepare(self, inputs, make, think, writing, drawing, seed)
        work.append(work.parts)
        results = []
        for kind in make:
            keep = len(results) + 1 < len(make)
            results.append(work.text(keep) if kind == "text" else work.image(keep))
        samples = [list(sample) for sample in zip(*results, strict=True)]
        return samples if work.batched else samples[0]


@dataclass(frozen=True)
class Writing:
    """How text is written. Raises ValueError for values without meaning."""

    max_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 0.3
    top_p: float = 1.0

    @property
    def limit(self) -> int:
        return MAX_NEW_TOKENS if self.max_new_tokens is None else _positive("max_new_tokens", self.max_new_tokens)

    def processors(self):
        return sampling_processors(self.temperature, self.top_p) if self.do_sample else None


@dataclass(frozen=True)
class Drawing:
    """How pictures are made and read: the flow's settings, size in pixels, posterior, encoders, room for a thought."""

    flow: FlowSettings
    height: int | None
    width: int | None
    posterior: str
    encoders: str
    max_think_tokens: int
    on_step: OnStep | None

    def __post_init__(self):
        if self.encoders not in ("both", "vae", "vit"):
            raise ValueError(f"encoders {self.encoders!r} must be 'both', 'vae' or 'vit'.")
        if self.posterior not in ("sample", "mean"):
            raise ValueError(f"posterior {self.posterior!r} must be 'sample' or 'mean'.")


@dataclass
class Work:
    """One call of a verb: its inputs as columns (a value for each sample), its session, what it shall make."""

    pipeline: BagelPipeline
    parts: list[list]
    batched: bool
    session: Session
    think: bool
    writing: Writing
    drawing: Drawing | None
    seeds: list[int]
    size: tuple[int, int]
    started: float

    @classmethod
    def prepare(cls, pipeline, inputs, make, think, writing, drawing, seed) -> Work:
        """Check everything, plan the room, open the session; a think prompt goes in first."""
        started = time.perf_counter()
        _check_make(make)
        parts, batched = _normalise(inputs)
        seeds = _seeds(seed, len(parts[0]))
        size = _size(pipeline.config, drawing) if "image" in make else (0, 0)
        plan = _plan(pipeline.parts, parts, make, think, writing, drawing, size)
        session = Session(pipeline.parts, plan, [torch.Generator().manual_seed(s) for s in seeds])
        if think:
            session.append_text([THINK_TO_DRAW if "image" in make else THINK_TO_ANSWER] * plan.batch, system=True)
        return cls(pipeline, parts, batched, session, think, writing, drawing, seeds, size, started)

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def append(self, parts: list[list]) -> None:
        for part in parts:
            (self.session.append_text if isinstance(part[0], str) else self.session.append_pictures)(part)

    def text(self, keep: bool) -> list[TextResult]:
        """Write a text for each sample; `keep` appends it to the context."""
        ids, texts = self._write(self.writing.limit, self.writing)
        if keep:
            self.session.append_written(texts)
        split = [split_thought(text) if self.think else (None, text) for text in texts]
        seconds = self.seconds()
        return [TextResult(text, thought, row, seconds) for (thought, text), row in zip(split, ids, strict=True)]

    def image(self, keep: bool) -> list[ImageResult]:
        """Draw a picture for each sample, after a thought in think mode; `keep` appends it to the context."""
        thoughts = [None] * len(self.seeds)
        if self.think:
            _, thoughts = self._write(self.drawing.max_think_tokens, Writing())
            self.session.append_written(thoughts)
        size = self.session.image_size or self.size
        pictures, latents = self.session.draw(self.drawing.flow, size, self.drawing.on_step)
        if keep:
            self.session.append_pictures(pictures)
        settings = {**asdict(self.drawing.flow), "height": size[0], "width": size[1], "think": self.think}
        seconds = self.seconds()
        return [
            ImageResult(picture, latent.cpu(), thought, seed, settings, seconds)
            for picture, latent, thought, seed in zip(pictures, latents, thoughts, self.seeds, strict=True)
        ]

    def _write(self, limit: int, writing: Writing) -> tuple[list[list[int]], list[str]]:
        # Words and pixels draw from generators of their own, so that sampling a text leaves the noise alone.
        generators = [torch.Generator().manual_seed(s) for s in self.seeds] if writing.do_sample else None
        ids = self.session.write(limit, writing.processors(), generators)
        return ids, [self.pipeline.codec.decode(row) for row in ids]


def _plan(parts: Parts, inputs, make, think, writing: Writing, drawing: Drawing | None, size) -> Plan:
    """The most tokens that inputs and results can take."""
    config, drawn = parts.config, "image" in make
    tokens, last = 0, size
    if think:
        tokens += max(len(parts.codec.encode(text)) for text in (THINK_TO_DRAW, THINK_TO_ANSWER))
    for part in inputs:
        if isinstance(part[0], str):
            tokens += max(len(parts.codec.encode(text)) for text in part)
        else:
            last = fitted_size(part[0].height, part[0].width, config.vae_transform)
            tokens += block_tokens(config, last, drawn)
    for kind in make:
        limit = writing.limit if kind == "text" else _thought_limit(drawing) if think else 0
        # A written text is encoded again when it is appended: a byte that is no UTF-8 becomes up to three tokens.
        tokens += 3 * limit + 2 + (block_tokens(config, last, True) if kind == "image" else 0)
    guided = drawn and drawing.flow.cfg_text_scale > 1 and drawing.flow.cfg_img_scale > 1
    return Plan(
        batch=len(inputs[0]),
        capacity=tokens,
        block=latent_block(config, last) if drawn else 0,
        image_branch=guided,
        for_drawing=drawn,
        posterior=drawing.posterior if drawn else "mean",
        encoders=drawing.encoders if drawn else "both",
    )


def _thought_limit(drawing: Drawing) -> int:
    return _positive("max_think_tokens", drawing.max_think_tokens)


def _size(config, drawing: Drawing) -> tuple[int, int]:
    """(height, width) of a picture that follows no other. Raises ValueError where the model has no such size."""
    stride, most = config.latent_stride, config.native_side
    size = tuple(most if side is None else side for side in (drawing.height, drawing.width))
    for name, side in zip(("height", "width"), size, strict=True):
        if side < stride or side % stride or side > most:
            near = min(most, max(stride, round(side / stride) * stride))
            raise ValueError(
                f"{name} {side} must be a multiple of {stride}, at most {most} for this model: try {near}."
            )
    return size


def _normalise(inputs: list) -> tuple[list[list], bool]:
    """Inputs -> columns with one value a sample (texts, or RGB pictures), and whether they were a batch at all."""
    if not inputs:
        raise ValueError("There is nothing to work on: give at least one text or picture.")
    lengths = {len(part) for part in inputs if isinstance(part, (list, tuple))}
    if len(lengths) > 1 or 0 in lengths:
        raise ValueError(f"The lists of one batch have lengths {sorted(lengths)}: they must be equal and not empty.")
    batch = next(iter(lengths), 1)
    columns = [list(part) if isinstance(part, (list, tuple)) else [part] * batch for part in inputs]
    return [_column(values, index) for index, values in enumerate(columns)], bool(lengths)


def _column(values: list, index: int) -> list:
    """One input of every sample: texts, or files and PIL pictures opened as RGB."""
    if all(isinstance(value, str) for value in values):
        if not all(value.strip() for value in values):
            raise ValueError(f"Input {index + 1} is an empty text: say what you want.")
        return values
    if any(isinstance(value, str) for value in values):
        raise TypeError(f"Input {index + 1} mixes texts and pictures in one batch: every sample needs the same kind.")
    return [open_picture(value) for value in values]


def _columns(pictures, batch: int | None) -> list:
    """Pictures of a verb as inputs: None, one, several, or (in a batch) an entry or a list of entries a sample."""
    if pictures is None:
        return []
    if not isinstance(pictures, (list, tuple)):
        return [_picture(pictures)]
    if batch is None:
        return [_picture(picture) for picture in pictures]
    if len(pictures) != batch:
        raise ValueError(f"{len(pictures)} pictures for a batch of {batch}: give one entry for each sample.")
    rows = [list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in pictures]
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"The samples have {[len(row) for row in rows]} pictures: every sample needs equally many.")
    return [[_picture(picture) for picture in column] for column in zip(*rows, strict=True)]


def _picture(source: Picture) -> Picture:
    """Where only a picture can stand, a string is a file name."""
    return Path(source) if isinstance(source, str) else source


def _check_make(make: Sequence[str]) -> None:
    unknown = sorted(set(make) - {"text", "image"})
    if unknown or not make or isinstance(make, str):
        raise ValueError(f"make {make!r} must be a sequence of 'text' and 'image', such as ['text', 'image'].")


def _seeds(seed: int | list[int] | None, batch: int) -> list[int]:
    """A seed for each sample: s, s + 1, ... from a number, the list itself, or random ones."""
    if seed is None:
        seed = torch.randint(2**31, ()).item()
    seeds = list(seed) if isinstance(seed, (list, tuple)) else [seed + i for i in range(batch)]
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for a batch of {batch}: give one number, or one for each sample.")
    return seeds


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} {value} must be at least 1.")
    return value


def _only(results: list):
    """The single result of each sample: what verbs that make one thing return."""
    return [sample[0] for sample in results] if isinstance(results[0], list) else results[0]
