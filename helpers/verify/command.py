"""`python -m helpers verify`: both sides' runs, one after the other, and the tables that compare them."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

from ..bagel.config import read_config
from ..checkpoint import MODEL_FILE, tensor_shapes
from ..choices import choose
from ..pipeline import TINY, load_bagel
from .comparing import EXPLAINED, Rules, compare, cost_table, different_sizes, row_table
from .exchange import Vectors, checkpoint_of, differences, is_reference, read, read_reference, save
from .official import kind
from .ours import run_ours
from .process import NotProvenError, WrongUseError, run_official, this_python
from .works import Sizes, Works, drawn_works, noises

EXAMPLES = """examples:
  python -m helpers verify --official Bagel --model BAGEL-7B-MoT                      both sides, on this card
  python -m helpers verify --official Bagel --python Bagel/.venv/bin/python --model BAGEL-7B-MoT
                                                                                      the official one in its own Python
  python -m helpers verify --official Bagel --model BAGEL-7B-MoT --save vectors.safetensors
  python -m helpers verify --vectors vectors.safetensors --model BAGEL-7B-MoT         carried to another machine
  python -m helpers verify --model tests/reference/checkpoint                         this repository's own vectors
"""
SIZES = {"num_timesteps": 10, "size": 512, "max_new_tokens": 16}
MEMORY = {
    "cuda": "peak of the card's memory that PyTorch held during the work, weights included",
    "cpu": "peak of the whole process so far",
}


def main(arguments: list[str]) -> int:
    """0 when everything is within its tolerance, 1 when not or when a side ends without an answer, 2 for wrong use."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        _check(given)
        return _verify(given)
    except (NotProvenError, MemoryError) as error:
        print(f"not proven: {error}", flush=True)
        return 1
    except (ValueError, TypeError, OSError, ImportError) as error:
        parser.error(str(error))


def _verify(given: argparse.Namespace) -> int:
    folder = TINY if given.model == "tiny" else Path(given.model)
    works, theirs = _official(given, folder) if given.official else _saved(given, folder)
    _tell("other side", theirs)
    ours = _ours(given, folder, works, theirs)
    _tell("ours", ours)
    differing = different_sizes(theirs.facts, ours.facts)
    if differing:
        raise NotProvenError(f"The two sides built different models: {'; '.join(differing)}.")
    return _report(works, theirs, ours)


def _official(given: argparse.Namespace, folder: Path) -> tuple[Works, Vectors]:
    """The works for this checkpoint, done by the official code; saved if that was asked."""
    choices = choose(given.device, given.weights, "sdpa")
    if choices.device.type == "cpu" and choices.weights == "bf16":
        raise WrongUseError("The official code computes in bfloat16 on CUDA cards alone: use --weights fp32 here.")
    config = read_config(folder, tensor_shapes(folder / MODEL_FILE))
    wanted = {name: getattr(given, name) or value for name, value in SIZES.items()}
    wanted["size"] = given.size or min(config.native_side, SIZES["size"])
    works = drawn_works(config, Sizes(**wanted))
    place = "cuda:0" if str(choices.device) == "cuda" else str(choices.device)
    theirs = run_official(
        given.official,
        given.python or this_python(),
        folder,
        choices.weights,
        place,
        works,
        noises(works, config),
    )
    if given.save:
        save(given.save, works, theirs, checkpoint_of(folder))
        print(f"saved: {given.save}", flush=True)
    return works, theirs


def _saved(given: argparse.Namespace, folder: Path) -> tuple[Works, Vectors]:
    """Vectors of a file, or the repository's own for the checkpoint that they belong to."""
    if given.vectors is None:
        if not is_reference(folder):
            raise WrongUseError(
                f"There are no saved vectors for {given.model}: give --official CHECKOUT or --vectors FILE. The "
                "repository's own belong to tests/reference/checkpoint."
            )
        return read_reference()
    works, vectors, checkpoint = read(given.vectors)
    differing = list(differences(checkpoint_of(folder), checkpoint))
    if differing:
        raise WrongUseError(f"{given.vectors} was made with another checkpoint. {'; '.join(differing[:4])}.")
    return works, vectors


def _ours(given: argparse.Namespace, folder: Path, works: Works, theirs: Vectors) -> Vectors:
    """Our side, in the other side's type unless another was asked for."""
    weights = theirs.facts["weights"] if given.weights == "auto" else given.weights
    fed = {name: theirs.tensors[f"{name}.tokens"] for name in works.cases if kind(name) == "und"}
    with closing(load_bagel(folder, weights, given.device)) as bagel:
        return run_ours(bagel, works, weights, fed)


def _report(works: Works, theirs: Vectors, ours: Vectors) -> int:
    rows = compare(works, theirs, ours)
    weights = Rules(works, theirs.facts, ours.facts).weights
    print(f"\n{row_table(rows)}\n\ntolerance in {weights}: {EXPLAINED[weights]}", flush=True)
    if theirs.facts.get("seconds"):
        memory = "; ".join(sorted({MEMORY[side.facts["device_type"]] for side in (theirs, ours)}))
        print(f"\n{cost_table(works, theirs, ours)}\nseconds: the second of two runs; memory: {memory}")
    outside = [row.what for row in rows if not row.within]
    named = f"; not: {', '.join(outside)}" if outside else ""
    print(f"\n{len(rows) - len(outside)} of {len(rows)} within tolerance{named}", flush=True)
    return int(bool(outside))


def _tell(side: str, vectors: Vectors) -> None:
    """What a side ran on, in one line."""
    facts = vectors.facts
    told = [facts["origin"], facts["weights"], facts.get("device", facts["device_type"]), facts.get("attention", "")]
    told += [f"{name} {what}" for name, what in facts.get("versions", {}).items()]
    print(f"{side}: {', '.join(one for one in told if one)}", flush=True)


def _check(given: argparse.Namespace) -> None:
    """Raises WrongUseError for options that do not go together."""
    if given.official and given.vectors:
        raise WrongUseError("--official runs the official code, --vectors reads what it once gave: choose one.")
    alone = {"--python": given.python, "--save": given.save}
    alone |= {f"--{name.replace('_', '-')}": getattr(given, name) for name in SIZES}
    useless = [name for name, value in alone.items() if value is not None]
    if useless and not given.official:
        raise WrongUseError(f"{', '.join(useless)} belong to a run of the official code: add --official CHECKOUT.")
    if given.save and not given.save.absolute().parent.is_dir():
        raise WrongUseError(f"--save {given.save}: there is no folder {given.save.parent}.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m helpers verify",
        description="Runs BAGEL's official code and this one on the same weights, pictures, texts and noise.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="the folder of the weights, or tiny")
    add("--official", type=Path, metavar="CHECKOUT", help="a clone of github.com/ByteDance-Seed/Bagel")
    add("--python", metavar="PATH", help="the Python of the official environment (default: this one)")
    add("--vectors", type=Path, metavar="FILE", help="compare with what --save wrote, instead of a checkout")
    add("--save", type=Path, metavar="FILE", help="keep the official side's vectors, to carry them elsewhere")
    weights = "of both sides (default: bf16 on a card that computes in it, else fp32; those of the vectors)"
    add("--weights", default="auto", choices=("auto", "bf16", "fp32"), help=weights)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--num-timesteps", type=int, metavar="N", help=f"of every picture (default: {SIZES['num_timesteps']})")
    size = f"longest side of every picture (default: {SIZES['size']}, or the model's own if that is less)"
    add("--size", type=int, metavar="PIXELS", help=size)
    add("--max-new-tokens", type=int, metavar="N", help=f"of the answer (default: {SIZES['max_new_tokens']})")
    return parser
