"""`python -m helpers convert`: a folder of weights in a smaller format, once, instead of at every start."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .bagel.packed import PACKERS
from .formats.df11_folder import write_df11
from .formats.gguf import write_gguf
from .formats.gguf_rounding import TYPES
from .formats.saved import prepare_folder
from .pipeline import TINY, load_bagel
from .workbook import anchor

FORMATS = (*PACKERS, "df11", "gguf")


def convert(model: str, weights: str, target: Path | str, type: str = "Q8_0") -> Path:
    """Write the weights of "tiny" or of an official folder to the new folder `target`, in one of `FORMATS`.

    DFloat11 loses nothing. `type`: of a GGUF's matrices. Raises ValueError for another format, FileNotFoundError or
    FileExistsError for folders, OSError where the disk has too little room, ImportError without the package `gguf`.
    """
    if weights not in FORMATS:
        raise ValueError(f"weights {weights!r} must be one of {', '.join(FORMATS)}.")
    source, target = TINY if model == "tiny" else anchor(model), anchor(target)
    if weights == "df11":
        write_df11(source, target, lambda module: print(f"compressed {module}", flush=True))
        return target
    if weights == "gguf":
        prepare_folder(source, target, needed=0)  # it looks itself how much room its own file finds
        print(write_gguf(source, target / f"bagel-{type}.gguf", type))
        return target
    bagel = load_bagel(source, weights)
    bagel.save(target)
    bagel.close()
    return target


def main(arguments: list[str]) -> int:
    """0 when the folder was written, 1 when it was not, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers convert",
        description=__doc__,
        epilog="example: python -m helpers convert --model BAGEL-7B-MoT --weights int4 --out BAGEL-7B-MoT-int4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="tiny", help='"tiny" or the folder of the weights')
    parser.add_argument("--weights", required=True, choices=FORMATS, help="the format; df11 loses nothing")
    parser.add_argument("--type", default="Q8_0", choices=TYPES, help="of a GGUF's matrices (default: Q8_0)")
    parser.add_argument("--out", required=True, type=Path, help="the new folder")
    asked = parser.parse_args(arguments)
    try:
        folder = convert(asked.model, asked.weights, asked.out, asked.type)
    except (OSError, ValueError, MemoryError, ImportError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e9:.3f} GB; load_bagel({str(asked.out)!r}) loads it")
    return 0
