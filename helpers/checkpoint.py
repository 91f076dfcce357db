"""A folder on disk -> a model on a device, in the weight format asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from zlib import crc32

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .bagel.autoencoder import Autoencoder
from .bagel.config import BagelConfig, read_config
from .bagel.decoder import DecoderLayer
from .bagel.layers import join, pack, replace_by_packed, round_to_fp8
from .bagel.model import Bagel
from .bagel.packed import BYTES, PACKERS, Packed, Room
from .bagel.session import Parts
from .bagel.text import TextCodec
from .choices import Choices
from .formats.df11_folder import Df11Folder, is_df11, read_df11
from .formats.gguf import Gguf, open_gguf
from .formats.gguf_weights import GgufReader, bytes_of_a_weight, gguf_file
from .formats.saved import packed_tensors, prepare, saved_format
from .memory import check_room
from .tensors import damaged, read_tensors

MODEL_FILE, AUTOENCODER_FILE = "ema.safetensors", "ae.safetensors"
# What the names of tensors contain that only drawing needs.
GENERATION = ("_moe_gen", "time_embedder.", "vae2llm.", "llm2vae.", "latent_pos_embed.")


def load(folder: Path | str, choices: Choices) -> Parts:
    """The model, autoencoder and text codec of a BAGEL folder, each tensor read straight to the device.

    The folder is an official one, one of packed weights or of DFloat11; or it is a GGUF with the other files beside it.

    Raises FileNotFoundError for a missing file, ValueError for damaged files, unexpected or missing tensors and
    wrong shapes, MemoryError when the weights do not fit.
    """
    source = _Source.of(Path(folder))
    config = read_config(source.folder, source.shapes)
    codec = TextCodec(_tokenizer(source.folder))
    model, autoencoder = _empty_modules(config, codec, choices, source.bytes)
    source.fill(model, choices)
    if autoencoder is not None:
        fill(autoencoder, source.autoencoder, choices.device, torch.float32)
    return _ready(model, autoencoder, codec, choices)


@dataclass(frozen=True)
class _Source:
    """Where the weights of a model come from.

    `kind`: the format that they have already ("gguf", "df11", that of packed ones); None: as they were trained.
    `shapes`: of its tensors by name, of DFloat11 those that are not compressed. `fill(model, choices)` reads them.
    `bytes`: of a weight of the layers, where the format does not tell.
    """

    folder: Path
    kind: str | None
    shapes: dict[str, tuple[int, ...]]
    fill: Callable[[Bagel, Choices], None]
    autoencoder: Path
    bytes: float | None = None

    @classmethod
    def of(cls, model: Path) -> _Source:
        """Raises FileNotFoundError or ValueError for files that are missing or damaged."""
        kind = folder_format(model)
        if kind == "gguf":
            gguf = open_gguf(gguf_file(model))
            folder, fills = gguf.file.parent, partial(fill_gguf, source=gguf)
            return cls(folder, kind, gguf.shapes, fills, folder / AUTOENCODER_FILE, bytes_of_a_weight(gguf))
        if kind == "df11":
            df11 = read_df11(model)
            return cls(model, kind, df11.tensors, partial(fill_df11, source=df11), df11.autoencoder)
        file = model / MODEL_FILE
        fills = partial(fill_packed, file=file) if kind else partial(_fill_plain, file=file)
        return cls(model, kind, tensor_shapes(file), fills, model / AUTOENCODER_FILE)


def folder_format(model: Path) -> str | None:
    """The format in which a folder, or the file of a GGUF, has its weights already; None: as they were trained.

    Raises ValueError for a damaged file, and for a folder with several GGUFs.
    """
    if gguf_file(model):
        return "gguf"
    return "df11" if is_df11(model) else saved_format(model / MODEL_FILE)


def load_random(config: BagelConfig, tokenizer: Path, choices: Choices) -> Parts:
    """A model of these sizes with random weights, made on the device: for measuring, not for use.

    `tokenizer` is a folder with tokenizer files of at most the configuration's vocabulary. Raises MemoryError when
    the weights do not fit.
    """
    codec = TextCodec(_tokenizer(tokenizer))
    model, autoencoder = _empty_modules(config, codec, choices)
    fill_randomly(model, choices.device, choices.dtype, _rounding(choices))
    if autoencoder is not None:
        fill_randomly(autoencoder, choices.device, torch.float32)
    _write_words_alone(model, codec)
    return _ready(model, autoencoder, codec, choices)


def _write_words_alone(model: Bagel, codec: TextCodec) -> None:
    """Let random weights prefer tokens that are words: a text then has its full length, and is not empty."""
    head = model.language_model.lm_head.weight
    special = set(codec.tokenizer.all_special_ids)
    words = [token for token in range(len(codec.tokenizer)) if token not in special and codec.decode([token]).strip()]
    silent = torch.ones(len(head), dtype=torch.bool, device=head.device)
    silent[words] = False
    head[silent] = 0


def _empty_modules(
    config: BagelConfig, codec: TextCodec, choices: Choices, layer_bytes: float | None = None
) -> tuple[Bagel, Autoencoder | None]:
    """Modules without storage. Raises MemoryError when their weights would not fit."""
    draws = choices.experts == "all"
    with torch.device("meta"):
        model = Bagel(config, codec.image_markers, choices.attention, draws)
        autoencoder = Autoencoder(config.autoencoder) if draws else None
    needed = _bytes(model, choices.dtype, choices.weights, layer_bytes)
    needed += _bytes(autoencoder, torch.float32) if draws else 0
    check_room(needed, choices.weights, choices.device)
    return model, autoencoder


def _ready(model: Bagel, autoencoder: Autoencoder | None, codec: TextCodec, choices: Choices) -> Parts:
    model.language_model.model.kernels = _kernels(choices)
    if autoencoder is None:
        return Parts(model.eval(), None, codec)
    if choices.device.type == "cpu":
        # The tiny autoencoder's convolutions take up to a quarter less time there with channels last.
        autoencoder.to(memory_format=torch.channels_last)
    return Parts(model.eval(), autoencoder.eval(), codec)


def _kernels(choices: Choices) -> ModuleType | None:
    if not choices.kernels:
        return None
    from .bagel import kernels

    return kernels


# What rounds the weights of layers that lie together, once they have been read.
Rounding = Callable[[list[nn.Linear]], None]


def _rounding(choices: Choices) -> Rounding | None:
    if choices.weights == "fp8":
        return round_to_fp8
    if choices.weights in PACKERS:
        return partial(pack, packer=PACKERS[choices.weights], room=_room(choices))
    return None


def _room(choices: Choices) -> Room:
    return Room(choices.device, choices.dtype, _kernels(choices))


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, from the header alone. Raises FileNotFoundError or ValueError."""
    with _open(file) as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def fill(
    module: nn.Module, file: Path, device: torch.device, dtype: torch.dtype, rounding: Rounding | None = None
) -> None:
    """Replace the parameters of a module built on the meta device by those of a safetensors file.

    `rounding` is done to the weights of the decoder's layers. Raises ValueError naming the tensors that are missing,
    unexpected or of another shape, or what `read_tensors` does.
    """
    _compare(file, tensor_shapes(file), module.state_dict(), left_out(module))
    _fill(module, partial(read_tensors, file), device, dtype, rounding)


def _fill_plain(model: Bagel, choices: Choices, file: Path) -> None:
    fill(model, file, choices.device, choices.dtype, _rounding(choices))


def fill_packed(model: Bagel, choices: Choices, file: Path) -> None:
    """As `fill`, from a file of weights that were packed before (`formats.saved`)."""
    prepare(choices.weights, _groups(model), _room(choices), choices.dtype)
    parts = packed_tensors(model)
    _compare(file, tensor_shapes(file), model.state_dict() | parts, left_out(model))
    allocate(model, choices.device, choices.dtype)
    read_tensors(file, model.state_dict() | parts)


def fill_gguf(model: Bagel, choices: Choices, source: Gguf) -> None:
    """As `fill`, from a GGUF: with weights="gguf" the layers stay as they are there."""
    _compare(source.file, source.shapes, model.state_dict(), left_out(model))
    reader = GgufReader(source, choices.device)
    if choices.weights == "gguf":
        _keep(model, reader.packed, reader.read, choices)
    _fill(model, reader.read, choices.device, choices.dtype, _rounding(choices))


def fill_df11(model: Bagel, choices: Choices, source: Df11Folder) -> None:
    """As `fill`, from a DFloat11 folder: with weights="df11" and kernels the layers stay compressed on the card."""
    wanted = model.state_dict()
    # Of compressed tensors a folder tells the sizes alone, which are compared when they are read.
    found = {
        name: source.tensors.get(name, tuple(wanted[name].shape) if name in wanted else ()) for name in source.names
    }
    _compare(source.folder, found, wanted, left_out(model))
    if not choices.kernels:
        return _fill(model, source.read, choices.device, choices.dtype, _rounding(choices))
    from .formats.df11_weights import CardReader

    reader = CardReader(source, choices.device)
    if choices.weights == "df11":
        _keep(model, reader.packed, reader.read, choices)
    _fill(model, reader.read, choices.device, choices.dtype, _rounding(choices))


def _keep(
    model: Bagel,
    packed: Callable[[list[str], tuple[int, int], Room], Packed],
    read: Callable[[dict], None],
    choices: Choices,
) -> None:
    """Give the decoder's layers weights as their source has them, which `packed` makes from names, shape and room.

    `read` fills their biases.
    """
    names, room = {layer: name for name, layer in model.named_modules()}, _room(choices)
    for layers in _groups(model):
        shape = sum(layer.out_features for layer in layers), layers[0].in_features
        weight = packed([f"{names[layer]}.weight" for layer in layers], shape, room)
        replace_by_packed(layers, weight, choices.device, choices.dtype)
        read({f"{names[layer]}.bias": layer.bias for layer in layers if layer.bias is not None})


def left_out(module: nn.Module) -> tuple[str, ...]:
    """What the names of tensors contain that a module for understanding alone does without."""
    return () if not isinstance(module, Bagel) or module.draws else GENERATION


def fill_randomly(
    module: nn.Module, device: torch.device, dtype: torch.dtype, rounding: Rounding | None = None, seed: int = 0
) -> None:
    """Give a module built on the meta device random weights that keep activations of one size through its layers.

    Matrices and convolutions are normal with variance 1 / inputs, norms one, biases zero; `rounding` as in `fill`.
    """
    generator = torch.Generator(device)

    def draw(weights: dict[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            if weight.ndim > 1:
                # From its name, so that every format rounds the same weights.
                generator.manual_seed(seed + crc32(name.encode()))
                weight.normal_(std=weight[0].numel() ** -0.5, generator=generator)
            else:
                weight.fill_(float(not name.endswith("bias")))

    _fill(module, draw, device, dtype, rounding)


def _fill(
    module: nn.Module,
    take: Callable[[dict], None],
    device: torch.device,
    dtype: torch.dtype,
    rounding: Rounding | None,
) -> None:
    """Storage for the weights of a module, filled by `take`, which is given them by name."""
    if rounding:
        for name, layer in module.named_modules():
            if isinstance(layer, DecoderLayer):
                # Rounded before the next one comes, so that only one layer stands here in full.
                _fill_part(layer, f"{name}.", take, device, dtype)
                for group in _groups(layer):
                    rounding(group)
    _fill_part(module, "", take, device, dtype)


def _fill_part(
    part: nn.Module, prefix: str, take: Callable[[dict], None], device: torch.device, dtype: torch.dtype
) -> None:
    empty = [name for name, weight in part.state_dict().items() if weight.is_meta]
    allocate(part, device, dtype)
    weights = part.state_dict()
    take({prefix + name: weights[name] for name in empty})


def allocate(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give what lies on the meta device storage, not filled: once, where each weight shall stay."""
    for layers in _groups(module):
        if layers[0].weight is not None and layers[0].weight.is_meta:
            join(layers, device, dtype)
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            if weight.is_meta:
                storage = torch.empty(weight.shape, device=device, dtype=dtype)
                setattr(part, name, nn.Parameter(storage, requires_grad=False))


def _groups(module: nn.Module) -> list[list[nn.Linear]]:
    """The linear layers that lie together, of all parts of a module."""
    parts = (part for part in module.modules() if hasattr(part, "over_one_input"))
    return [group for part in parts for group in part.over_one_input()]


def _compare(file: Path, found: dict, wanted: dict[str, torch.Tensor], ignored: tuple[str, ...]) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    found = {name: shape for name, shape in found.items() if not any(part in name for part in ignored)}
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {list(found[name])} instead of {list(wanted[name])}"
            for name in sorted(wanted.keys() & found.keys())
            if found[name] != wanted[name]
        ],
    }
    lines = [f"{len(names)} {what}: {_some(names)}" for what, names in problems.items() if names]
    if lines:
        raise ValueError(
            f"{file} does not fit the configuration beside it. Tensors {'; '.join(lines)}. "
            "Use weights and JSON files of the same BAGEL checkpoint."
        )


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _open(file: Path):
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: a BAGEL folder holds {MODEL_FILE} and {AUTOENCODER_FILE}; notebook 01 shows how to "
            "fetch them."
        )
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise damaged(file, error) from error


def _tokenizer(folder: Path):
    from transformers import Qwen2Tokenizer

    # Without its words the tokenizer would still load, and turn every text into nothing.
    words = ("tokenizer.json",) if (folder / "tokenizer.json").exists() else ("vocab.json", "merges.txt")
    for name in ("tokenizer_config.json", *words):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: fetch the tokenizer's files again.")
    try:
        return Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more precise for a damaged file
        raise ValueError(
            f"The tokenizer's files in {folder} cannot be read ({error}): fetch tokenizer_config.json and "
            f"{' and '.join(words)} again."
        ) from error


def _bytes(module: nn.Module, dtype: torch.dtype, weights: str = "", layer_bytes: float | None = None) -> int:
    """Of the weights once they are loaded, and of the room in which packed ones are made whole.

    `layer_bytes`: of a weight of the decoder's layers, where the format does not tell.
    """
    each = layer_bytes if weights == "gguf" else BYTES.get(weights)
    groups = [sum(layer.weight.numel() for layer in group) for group in _groups(module)] if each else []
    plain = sum(p.numel() for p in module.parameters()) - sum(groups)
    room = max(groups, default=0) if weights != "fp8" else 0
    return (plain + room) * dtype.itemsize + round(sum(groups) * (each or 0))
