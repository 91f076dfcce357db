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

from .bagel.checks import whole_number
from .bagel.config import RELEASED, read_config
from .bagel.context import check_length
from .bagel.decoding import sampling_processors
from .bagel.flow import FlowSettings
from .bagel.images import fitted_size, open_picture
from .bagel.packed import PACKERS
from .bagel.session import Parts, Plan, Session, block_tokens, latent_block
from .bagel.text import THINK_TO_ANSWER, THINK_TO_DRAW, split_thought
from .checkpoint import MODEL_FILE, folder_format, load, load_random, tensor_shapes
from .choices import BROUGHT, choose
from .formats.saved import save
from .hub import RANDOM
from .memory import explained

TINY = Path(__file__).parent / "tiny" / "checkpoint"
MAX_NEW_TOKENS = 1000  # the official limit of an answer
MOST_SEED = 2**63  # seeds of a batch count up, and torch takes 64 bits
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
    model: Path | str = "tiny",
    weights: str = "auto",
    device: str = "auto",
    attention: str = "auto",
    experts: str = "all",
) -> BagelPipeline:
    """A BAGEL that is ready to use: "tiny" (the model in this repository) or an official checkpoint folder.

    "random-7b" and "random-tiny" have the sizes of the released and of the tiny model and random weights, made on the
    device: they show speed and memory, and draw noise.

    `weights`: "auto", "bf16", "fp16" (for cards without bfloat16), "fp32", or with the decoder's layers in fewer bits,
    smaller, with a loss: "fp8" (faster too, from compute capability 8.9), "int8", "nf4", "int4".
    `device`: "auto", "cpu", "cuda", "cuda:N". `attention`: "auto", "sdpa", "cudnn", "flash_attn". Prints what "auto"
    chose and why. `experts`: "all", or "understanding": half the memory, and questions alone.

    A folder that `BagelPipeline.save` or DFloat11 wrote and a GGUF (a file, or a folder with one) have their format
    already, and "auto" keeps it. Errors: see `helpers.checkpoint.load`.
    """
    if not isinstance(model, (str, Path)):
        raise TypeError(f"model {model!r} ({type(model).__name__}) must be 'tiny' or the name of a folder.")
    name = str(model)
    folder = TINY if name in ("tiny", *RANDOM) else Path(name)
    if not (folder.is_dir() or (folder.suffix == ".gguf" and folder.is_file())):
        raise FileNotFoundError(
            f"{name!r} is neither 'tiny' nor a folder here: name the folder that holds ema.safetensors; "
            "notebook 01 shows how to fetch it."
        )
    choices = choose(device, _format(weights, folder), attention, experts)
    if "auto" in (weights, attention):
        print(f"{'tiny BAGEL' if name == 'tiny' else Path(name).name} on {choices.device}: {choices.reason}")
    if name not in RANDOM:
        return BagelPipeline(load(folder, choices), name, choices.weights, folder)
    print(f"{name} has random weights: the time and memory of the real ones, and noise instead of pictures and words")
    config = RELEASED if name == "random-7b" else read_config(TINY, tensor_shapes(TINY / MODEL_FILE))
    return BagelPipeline(load_random(config, TINY, choices), name, choices.weights)


def _format(weights: str, folder: Path) -> str:
    """What "auto" means where a folder has its weights in a format of its own. Raises ValueError for another wish."""
    found = folder_format(folder)
    if found in PACKERS and weights not in ("auto", found):
        raise ValueError(
            f"{folder} holds weights packed as {found}, which cannot become {weights!r}: leave weights out, or name "
            "the folder of the original weights."
        )
    if weights in BROUGHT and weights != found:
        raise ValueError(
            f"{folder} is no folder of {weights!r} weights: leave weights out, or make one of it first "
            "(python -m helpers convert)."
        )
    return found or weights if weights == "auto" else weights


class BagelPipeline:
    """One loaded model and its verbs. Nothing but the weights survives a call.

    `weights` is their format, `folder` where they came from (None: random ones).
    """

    def __init__(self, parts: Parts, name: str, weights: str, folder: Path | None = None):
        self._parts: Parts | None = parts
        self.name, self.weights, self.folder = name, weights, folder

    @property
    def parts(self) -> Parts:
        """Model, autoencoder and text codec. Raises RuntimeError once they are freed."""
        if self._parts is None:
            raise RuntimeError(f"This model of {self.name} was closed: load it again with load_bagel.")
        return self._parts

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

    def save(self, folder: Path | str) -> None:
        """Write a model with packed weights (int8, int4, nf4) to a new folder, which loads without the original.

        Raises ValueError for other formats, random weights and those of a GGUF or of DFloat11, FileExistsError where
        the folder holds anything, OSError where the disk has too little room.
        """
        official = self.folder is not None and (self.folder / MODEL_FILE).is_file()
        if self.weights not in PACKERS or not official or not self.model.draws:
            told = "random weights" if self.folder is None else f"weights={self.weights!r} of {self.folder}"
            raise ValueError(f"{told} cannot be saved: load a folder whole, as one of {', '.join(PACKERS)}.")
        save(self.model, self.weights, self.folder, Path(folder))

    def close(self) -> None:
        """Free the weights' memory; the object cannot be used afterwards."""
        self._parts = None
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
        (a picture or a list of pictures, equally many for all) for each question. `max_new_tokens` None: 1000; an
        answer also ends where the model's context is full.
        """
        question = _texts("question", question)
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
        flow = FlowSettings.among(locals())
        drawing = Drawing(flow, height, width, "sample", "both", max_think_tokens, on_step)
        return _only(self._run([_texts("prompt", prompt)], ["image"], think, Writing(), drawing, seed))

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
        flow = FlowSettings.among(locals())
        drawing = Drawing(flow, None, None, posterior, encoders, max_think_tokens, on_step)
        pictures = [_picture(one) for one in image] if isinstance(image, (list, tuple)) else _picture(image)
        inputs = [pictures, _texts("instruction", instruction)]
        return _only(self._run(inputs, ["image"], think, Writing(), drawing, seed))

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
        flow = FlowSettings.among(locals())
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
        flow = FlowSettings.among(locals())
        drawing = Drawing(flow, height, width, posterior, "both", 0, on_step)
        frames = frames if isinstance(frames, (list, tuple)) else [] if frames is None else [frames]
        batch = len(frames) if frames and isinstance(frames[0], (list, tuple)) else None
        given = _columns(frames, batch)
        if not given and prompt is None:
            raise ValueError("Without frames there must be a prompt that describes the clip.")
        instruction = NEXT_FRAME if prompt is None else _texts("prompt", prompt)
        if batch and isinstance(instruction, str):
            instruction = [instruction] * batch
        count = whole_number("count", count, least=1)
        return explained(lambda: self._film(given, instruction, count, drawing, seed), self.model.device)

    def _film(self, given, instruction, count, drawing: Drawing, seed) -> FramesResult | list[FramesResult]:
        inputs = [*given, *([instruction] * count)]
        work = Work.prepare(self, inputs, ["image"] * count, False, Writing(), drawing, seed)
        work.append(work.parts[:-count])
        results = []
        for texts in work.parts[-count:]:
            work.append([texts])
            results.append(work.image(keep=len(results) + 1 < count))
        clips = [
            FramesResult([result.image for result in clip], clip[0].seed, clip[0].settings, work.seconds())
            for clip in zip(*results, strict=True)
        ]
        return clips if work.batched else clips[0]

    def _run(self, inputs, make, think, writing: Writing, drawing: Drawing | None, seed) -> list:
        return explained(lambda: self._made(inputs, make, think, writing, drawing, seed), self.model.device)

    def _made(self, inputs, make, think, writing: Writing, drawing: Drawing | None, seed) -> list:
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
    """How text is written. Raises ValueError for values without meaning, TypeError for what is no number."""

    max_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 0.3
    top_p: float = 1.0

    def __post_init__(self):
        if self.max_new_tokens is not None:
            whole_number("max_new_tokens", self.max_new_tokens, least=1)
        self.processors()

    @property
    def limit(self) -> int:
        return MAX_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens

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
    """One call of a verb: its inputs as columns (a value for each sample), its session, what it shall make.

    `words`: where sampled texts draw from, a generator a sample: not from that of the pixels, so that sampling a text
    leaves the noise alone. `size`: (height, width) of all pictures to make.
    """

    pipeline: BagelPipeline
    parts: list[list]
    batched: bool
    session: Session
    think: bool
    writing: Writing
    drawing: Drawing | None
    seeds: list[int]
    words: list[torch.Generator]
    size: tuple[int, int]
    started: float

    @classmethod
    def prepare(cls, pipeline, inputs, make, think, writing, drawing, seed) -> Work:
        """Check everything, plan the room, open the session; a think prompt goes in first."""
        started = time.perf_counter()
        _check_make(make)
        parts, batched = _normalise(inputs)
        seeds = _seeds(seed, len(parts[0]))
        if "image" in make and not pipeline.model.draws:
            raise ValueError("This model was loaded with experts='understanding': for pictures load it with 'all'.")
        size = _size(pipeline.config, parts, drawing) if "image" in make else (0, 0)
        plan = _plan(pipeline.parts, parts, make, think, writing, drawing, size)
        noise, words = ([torch.Generator().manual_seed(s) for s in seeds] for _ in range(2))
        session = Session(pipeline.parts, plan, noise)
        if think:
            session.append_text([THINK_TO_DRAW if "image" in make else THINK_TO_ANSWER] * plan.batch, system=True)
        return cls(pipeline, parts, batched, session, think, writing, drawing, seeds, words, size, started)

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def append(self, parts: list[list]) -> None:
        for part in parts:
            (self.session.append_text if isinstance(part[0], str) else self.session.append_pictures)(part)

    def text(self, keep: bool) -> list[TextResult]:
        """Write a text for each sample; `keep` appends it to the context."""
        ids, texts = self._write(self.writing.limit)
        if keep:
            self.session.append_written(texts)
        split = [split_thought(text) if self.think else (None, text) for text in texts]
        seconds = self.seconds()
        return [TextResult(text, thought, row, seconds) for (thought, text), row in zip(split, ids, strict=True)]

    def image(self, keep: bool) -> list[ImageResult]:
        """Draw a picture for each sample, after a thought in think mode; `keep` appends it to the context."""
        thoughts = [None] * len(self.seeds)
        if self.think:
            _, thoughts = self._write(self.drawing.max_think_tokens)
            self.session.append_written(thoughts)
        pictures, latents = self.session.draw(self.drawing.flow, self.size, self.drawing.on_step)
        if keep:
            self.session.append_pictures(pictures)
        settings = {**asdict(self.drawing.flow), "height": self.size[0], "width": self.size[1], "think": self.think}
        seconds = self.seconds()
        return [
            ImageResult(picture, latent.cpu(), thought, seed, settings, seconds)
            for picture, latent, thought, seed in zip(pictures, latents, thoughts, self.seeds, strict=True)
        ]

    def _write(self, limit: int) -> tuple[list[list[int]], list[str]]:
        generators = self.words if self.writing.do_sample else None
        ids = self.session.write(limit, self.writing.processors(), generators)
        return ids, [self.pipeline.codec.decode(row) for row in ids]


def _plan(parts: Parts, inputs, make, think, writing: Writing, drawing: Drawing | None, size) -> Plan:
    """The most tokens that inputs and results can take. Raises ValueError when the inputs alone are too many."""
    config, drawn = parts.config, "image" in make
    batch, longest = len(inputs[0]), config.decoder.max_position_embeddings
    texts = [[THINK_TO_DRAW if drawn else THINK_TO_ANSWER] * batch] if think else []
    widths = []  # of each part, the tokens of every sample
    for part in [*texts, *inputs]:
        if isinstance(part[0], str):
            widths.append([len(parts.codec.encode(text)) for text in part])
        else:
            widths.append([block_tokens(config, (part[0].height, part[0].width), drawn)] * batch)
    # Before buffers are made for them: a text that is far too long would otherwise run out of memory.
    check_length(max(map(sum, zip(*widths, strict=True))), longest)
    tokens = sum(map(max, widths))
    for number, kind in enumerate(make, start=1):
        kept = number < len(make)  # the last result is not appended
        # A written text is encoded again when it is appended: a byte that is no UTF-8 becomes up to three tokens.
        if kind == "text":
            tokens += 3 * writing.limit + 2 if kept else writing.limit
        else:
            tokens += 3 * _thought_limit(drawing) + 2 if think else 0
            tokens += block_tokens(config, size, True) if kept else 0
    guided = drawn and drawing.flow.cfg_text_scale > 1 and drawing.flow.cfg_img_scale > 1
    return Plan(
        batch=batch,
        capacity=min(tokens, batch * longest),
        block=latent_block(config, size) if drawn else 0,
        image_branch=guided,
        for_drawing=drawn,
        posterior=drawing.posterior if drawn else "mean",
        encoders=drawing.encoders if drawn else "both",
    )


def _thought_limit(drawing: Drawing) -> int:
    return whole_number("max_think_tokens", drawing.max_think_tokens, least=1)


def _size(config, parts: list[list], drawing: Drawing) -> tuple[int, int]:
    """(height, width) of the pictures to make: of the last picture given, else as asked, else the native square.

    It stays the same for all of one call, also where a made picture is enlarged to enter the context.
    Raises ValueError for a size that the model does not have.
    """
    stride, most = config.latent_stride, config.native_side
    size = tuple(most if side is None else side for side in (drawing.height, drawing.width))
    size = tuple(whole_number(name, side) for name, side in zip(("height", "width"), size, strict=True))
    for name, side in zip(("height", "width"), size, strict=True):
        if side < stride or side % stride or side > most:
            near = min(most, max(stride, round(side / stride) * stride))
            raise ValueError(
                f"{name} {side} must be a multiple of {stride}, at most {most} for this model: try {near}."
            )
    pictures = [part[0] for part in parts if not isinstance(part[0], str)]
    return fitted_size(pictures[-1].height, pictures[-1].width, config.vae_transform) if pictures else size


def _normalise(inputs: list) -> tuple[list[list], bool]:
    """Inputs -> columns with one value a sample (texts, or RGB pictures), and whether they were a batch at all."""
    if not isinstance(inputs, (list, tuple)):
        raise TypeError(f"inputs must be a list of texts and pictures, not {type(inputs).__name__}.")
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
        try:
            "".join(values).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"Input {index + 1} holds characters that are no text ({error}): remove them.") from error
        return list(values)
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
        if any(isinstance(picture, (list, tuple)) for picture in pictures):
            raise ValueError("A list of lists of pictures makes a batch: then every entry must be a list.")
        return [_picture(picture) for picture in pictures]
    if len(pictures) != batch:
        raise ValueError(f"{len(pictures)} pictures for a batch of {batch}: give one entry for each sample.")
    rows = [list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in pictures]
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"The samples have {[len(row) for row in rows]} pictures: every sample needs equally many.")
    return [[_picture(picture) for picture in column] for column in zip(*rows, strict=True)]


def _texts(name: str, value: str | Sequence[str]) -> str | list[str]:
    """A text, or the list of texts that makes a batch; a picture here would be read as one more input."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    wrong = [type(one).__name__ for one in values if not isinstance(one, str)]
    if wrong:
        raise TypeError(f"{name} must be a text or a list of texts, not {wrong[0]}.")
    return value if isinstance(value, str) else values


def _picture(source: Picture) -> Picture:
    """Where only a picture can stand, a string is a file name."""
    return Path(source) if isinstance(source, str) else source


def _check_make(make: Sequence[str]) -> None:
    if not isinstance(make, (list, tuple)) or not make or any(kind not in ("text", "image") for kind in make):
        raise ValueError(f"make {make!r} must be a sequence of 'text' and 'image', such as ['text', 'image'].")


def _seeds(seed: int | list[int] | None, batch: int) -> list[int]:
    """A seed for each sample: s, s + 1, ... from a number, the list itself, or random ones."""
    if seed is None:
        seed = torch.randint(2**31, ()).item()
    given = [whole_number("seed", one, least=0) for one in (seed if isinstance(seed, (list, tuple)) else [seed])]
    if max(given, default=0) >= MOST_SEED:
        raise ValueError(f"seed {max(given)} must be below 2**63 = {MOST_SEED}.")
    seeds = given if isinstance(seed, (list, tuple)) else [given[0] + i for i in range(batch)]
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for a batch of {batch}: give one number, or one for each sample.")
    return seeds


def _only(results: list):
    """The single result of each sample: what verbs that make one thing return."""
    return [sample[0] for sample in results] if isinstance(results[0], list) else results[0]
