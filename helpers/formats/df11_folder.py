"""Folders in DFloat11's own format, read tensor by tensor, and made from folders of bfloat16 weights.

As in DFloat11/BAGEL-7B-MoT-DF11: `config.json` says under `dfloat11_config` which modules are compressed (patterns of
their names -> their layers, in order; none where the module is a layer itself). Each has a file of its own, named
after it with `_` for `.`, which holds the block's tensors and whatever else the module has. The rest is in
`model.safetensors`, the autoencoder, uncompressed, in `vae/`; tokenizer and sizes lie beside as in the official folder.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..tensors import damaged
from .df11 import BYTES, THREADS, Block, compress, decompress

VERSION = "0.5.0"
READABLE = ("0.2", "0.3", "0.4", "0.5")  # the package's versions that write the same tensors
MODEL_FILE, AUTOENCODER_FILE = "ema.safetensors", "vae/ae.safetensors"
# Weights of trained models take 0.68 of their bfloat16 size.
_MOST_OF_IT = 0.75
# Pattern of modules' names -> layers in these, whose weights become one block; none: the module's own.
Patterns = dict[str, list[str]]
_PARTS = [part.name for part in fields(Block)]
_PROJECTIONS = [f"self_attn.{name}_proj{suffix}" for suffix in ("", "_moe_gen") for name in "qkvo"]
_FEED_FORWARDS = [f"mlp{suffix}.{name}_proj" for suffix in ("", "_moe_gen") for name in ("gate", "up", "down")]
_VIT_LAYER = ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]


@dataclass(frozen=True)
class Df11Folder:
    """What a DFloat11 folder holds; nothing but headers is read until a block or a tensor is asked for.

    `blocks`: compressed module -> its layers' weights, by name, in their order. `tensors`: name -> shape of what is
    not compressed. `files`: every name in the files -> its file.
    """

    folder: Path
    blocks: dict[str, list[str]]
    tensors: dict[str, tuple[int, ...]]
    files: dict[str, Path]

    def block(self, module: str) -> Block:
        """The block of a module. Raises ValueError where its parts, or their number and the layers', do not fit."""
        parts = {part: self.tensor(f"{module}.{part}") for part in _PARTS}
        block, names = Block(**parts), self.blocks[module]
        try:
            block.check()
        except ValueError as error:
            raise damaged(self.files[f"{module}.luts"], f"{module}: {error}") from error
        if len(block.sizes) != len(names):
            raise ValueError(
                f"{self.files[f'{module}.luts']}: {module} has {len(block.sizes)} tensors, config.json tells of "
                f"{len(names)}: use files of the same DFloat11 folder."
            )
        return block

    def tensor(self, name: str) -> Tensor:
        """One tensor as the file has it. Raises KeyError for an unknown name, ValueError for a damaged file."""
        file = self.files[name]
        with _open(file) as tensors:
            return tensors.get_tensor(name)

    @property
    def names(self) -> set[str]:
        """Of all weights, compressed or not."""
        return {*self.tensors, *(name for names in self.blocks.values() for name in names)}

    def read(self, targets: dict[str, Tensor]) -> None:
        """Fill the targets with tensors of these names, decoded by the processor."""
        for module, names in self.blocks.items():
            if any(name in targets for name in names):
                for name, numbers in zip(names, decompress(self.block(module)), strict=True):
                    if name in targets:
                        check_size(name, numbers.numel(), targets[name])
                        targets[name].copy_(numbers.view(targets[name].shape))
        for name in self.tensors.keys() & targets.keys():
            targets[name].copy_(self.tensor(name))

    @property
    def autoencoder(self) -> Path:
        return self.folder / AUTOENCODER_FILE


def check_size(name: str, weights: int, target: Tensor) -> None:
    """Raise ValueError where a compressed tensor has not as many weights as the one that takes them."""
    if weights != target.numel():
        raise ValueError(
            f"{name} has {weights} weights in its DFloat11 block instead of {target.numel()} ({list(target.shape)}): "
            "use the configuration that belongs to these weights."
        )


def is_df11(folder: Path | str) -> bool:
    """Whether a folder's configuration says that its weights are compressed."""
    try:
        return "dfloat11_config" in json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def read_df11(folder: Path | str) -> Df11Folder:
    """A folder in DFloat11's format.

    Raises FileNotFoundError without its configuration or weights, ValueError for another version or layout, for a
    truncated file and for modules of which the configuration and the files disagree.
    """
    folder = Path(folder)
    patterns = _patterns(folder / "config.json")
    files, shapes = {}, {}
    for file in sorted(folder.glob("*.safetensors")):
        with _open(file) as tensors:
            names = list(tensors.keys())
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
            files |= dict.fromkeys(names, file)
    modules = [name.rpartition(".")[0] for name in files if name.endswith(".encoded_exponent")]
    if not modules:
        raise FileNotFoundError(f"{folder} has no compressed weights: fetch the DFloat11 folder's *.safetensors again.")
    blocks = {module: _layers(module, patterns) for module in modules}
    missing = [name for module in modules for part in _PARTS if (name := f"{module}.{part}") not in files]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing[:4])}: fetch the DFloat11 folder again.")
    for name in (f"{module}.{part}" for module in modules for part in _PARTS):
        del shapes[name]
    return Df11Folder(folder, blocks, shapes, files)


def write_df11(source: Path | str, target: Path | str, on_module: Callable[[str], None] | None = None) -> None:
    """Compress an official BAGEL folder with bfloat16 weights, one module at a time; `source` stays as it is.

    `on_module` is told the name of each module that is done. The configuration is written last: a folder without it
    is not whole. Raises FileNotFoundError for a missing file, FileExistsError where `target` holds anything,
    ValueError for weights that are not bfloat16 or not BAGEL's, OSError when the disk has too little room.
    """
    source, target = Path(source), Path(target)
    with _open(source / MODEL_FILE) as tensors:
        names = _bfloat16_names(source / MODEL_FILE, tensors)
        patterns = bagel_patterns(names)
        modules = {module: layers for pattern in patterns for module, layers in _matches(pattern, patterns, names)}
        _prepare(source, target)
        for module, layers in modules.items():
            _write(target / f"{module.replace('.', '_')}.safetensors", _compressed(module, layers, names, tensors))
            if on_module:
                on_module(module)
        rest = [name for name in names if not any(_inside(name, module) for module in modules)]
        _write(target / "model.safetensors", {name: tensors.get_tensor(name) for name in rest})
    _copy_the_rest(source, target, patterns)


def bagel_patterns(names: list[str]) -> Patterns:
    """The published folder's patterns of what is compressed, for a BAGEL with these tensors."""
    layers = {name.split(".")[4] for name in names if name.startswith("vit_model.vision_model.encoder.layers.")}
    vit = [f"vision_model.encoder.layers.{layer}.{part}" for layer in sorted(layers, key=int) for part in _VIT_LAYER]
    return {
        r"language_model\.model\.embed_tokens": [],
        r"language_model\.model\.layers.\d+": _PROJECTIONS + _FEED_FORWARDS,
        r"language_model\.lm_head": [],
        "vit_model": [*vit, "vision_model.embeddings.patch_embedding"],
    }


def _patterns(file: Path) -> Patterns:
    """What `config.json` says is compressed, once it says that it is of a kind that is read here."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing, which says what is compressed: fetch it again, or let the conversion run to its end."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8")).get("dfloat11_config")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is no configuration in JSON ({error}): fetch it again.") from error
    if not isinstance(config, dict) or not isinstance(config.get("pattern_dict"), dict):
        raise ValueError(f"{file} has no dfloat11_config: this is no DFloat11 folder, or its config.json is another's.")
    version = str(config.get("version"))
    if not version.startswith(tuple(f"{known}." for known in READABLE)):
        raise ValueError(
            f"{file} tells DFloat11 version {version}; {', '.join(READABLE)} are read. Use another folder."
        )
    found = config.get("threads_per_block"), config.get("bytes_per_thread")
    if found != ([THREADS], BYTES):
        raise ValueError(f"{file}: {found[0]} threads of {found[1]} bytes; only [{THREADS}] of {BYTES} are read.")
    return config["pattern_dict"]


def _layers(module: str, patterns: Patterns) -> list[str]:
    """Names of a compressed module's weights, in their order."""
    for pattern, layers in patterns.items():
        if re.fullmatch(pattern, module):
            return [f"{module}.{layer}.weight" for layer in layers] or [f"{module}.weight"]
    raise ValueError(f"config.json has no pattern for the module {module}: use files of the same DFloat11 folder.")


def _open(file: Path):
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: fetch it again.")
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise damaged(file, error) from error


def _bfloat16_names(file: Path, tensors) -> list[str]:
    """The names of a file's tensors, all of which must be bfloat16."""
    for name in tensors.keys():  # noqa: SIM118
        kind = tensors.get_slice(name).get_dtype()
        if kind != "BF16":
            raise ValueError(f"{file} holds {name} as {kind}, DFloat11 compresses BF16: convert to bfloat16 first.")
    return list(tensors.keys())


def _prepare(source: Path, target: Path) -> None:
    """Make an empty folder on a disk with enough room."""
    if not (source / "ae.safetensors").is_file():
        raise FileNotFoundError(f"{source / 'ae.safetensors'} is missing: convert a whole BAGEL folder.")
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty: name a new folder, or delete what an earlier try has left.")
    target.mkdir(parents=True, exist_ok=True)
    model, autoencoder = ((source / name).stat().st_size for name in (MODEL_FILE, "ae.safetensors"))
    needed, free = _MOST_OF_IT * model + autoencoder, shutil.disk_usage(target).free
    if free < needed:
        raise OSError(f"{target} needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: make room first.")


def _matches(pattern: str, patterns: Patterns, names: list[str]) -> Iterator[tuple[str, list[str]]]:
    """The modules whose names fit a pattern, with their layers' weights. Raises ValueError where one lacks any."""
    found = dict.fromkeys(name[:end] for name in names for end in range(len(name)) if name[end] == ".")
    for module in found:
        if re.fullmatch(pattern, module):
            layers = _layers(module, patterns)
            missing = sorted(set(layers) - set(names))
            if missing:
                raise ValueError(f"{MODEL_FILE} lacks {', '.join(missing[:4])}: these are no weights of BAGEL.")
            yield module, layers


def _inside(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")


def _compressed(module: str, layers: list[str], names: list[str], tensors) -> dict[str, Tensor]:
    """A module's block and whatever else the module has, by name."""
    block = compress([tensors.get_tensor(name) for name in layers])
    others = [name for name in names if _inside(name, module) and name not in layers]
    parts = {f"{module}.{part}": tensor for part, tensor in block.parts().items()}
    return parts | {name: tensors.get_tensor(name) for name in others}


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file under its name only once it is whole."""
    part = file.with_suffix(".part")
    try:
        save_file(tensors, part)
    except (SafetensorError, OSError) as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{file} could not be written ({error}): make room on the disk and convert again.") from error
    part.replace(file)


def _copy_the_rest(source: Path, target: Path, patterns: Patterns) -> None:
    """The autoencoder, tokenizer and sizes as they are, then the configuration with what is compressed."""
    (target / AUTOENCODER_FILE).parent.mkdir()
    shutil.copyfile(source / "ae.safetensors", target / AUTOENCODER_FILE)
    for file in source.iterdir():
        if file.suffix in (".json", ".txt") and file.name != "config.json":
            shutil.copyfile(file, target / file.name)
    known = source / "config.json"
    config = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
    kind = {"version": VERSION, "threads_per_block": [THREADS], "bytes_per_thread": BYTES, "pattern_dict": patterns}
    text = json.dumps(config | {"dfloat11_config": kind}, indent=2)
    (target / "config.json").write_text(text + "\n", encoding="utf-8")
