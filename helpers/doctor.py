"""`python -m helpers doctor`: what this machine should use, or a card that is not here, and why."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from .display import table
from .fitting import BESIDE, Fit, fits, recommended
from .hardware import GB, Card, advise, describe, inspect


@dataclass(frozen=True)
class Known:
    """A card that can be asked for by name: its memory in MiB, about as nvidia-smi shows it, and its capability."""

    memory: int
    capability: tuple[int, int]


KNOWN = {
    "V100 16GB": Known(16160, (7, 0)),
    "V100 32GB": Known(32510, (7, 0)),
    "T4": Known(15360, (7, 5)),
    "RTX 2080 Ti": Known(11264, (7, 5)),
    "A10": Known(23028, (8, 6)),
    "A100 40GB": Known(40536, (8, 0)),
    "A100 80GB": Known(81920, (8, 0)),
    "RTX A6000": Known(49140, (8, 6)),
    "RTX 3060": Known(12288, (8, 6)),
    "RTX 3080": Known(10240, (8, 6)),
    "RTX 3090": Known(24576, (8, 6)),
    "L4": Known(23034, (8, 9)),
    "L40S": Known(46068, (8, 9)),
    "RTX 4060 Ti 16GB": Known(16380, (8, 9)),
    "RTX 4080 SUPER": Known(16376, (8, 9)),
    "RTX 4090": Known(24564, (8, 9)),
    "H20": Known(97871, (9, 0)),
    "H100": Known(81559, (9, 0)),
    "H200": Known(143771, (9, 0)),
    "RTX 5080": Known(16303, (12, 0)),
    "RTX 5090": Known(32607, (12, 0)),
}


def known_card(name: str) -> Card:
    """A card by its name, in any writing, with nothing else on it. Raises ValueError for one that is not listed."""
    found = [known for known in KNOWN if _plain(known) == _plain(name)]
    if not found:
        raise ValueError(f"card {name!r} is not known here: choose one of {', '.join(KNOWN)}.")
    card = KNOWN[found[0]]
    return Card(found[0], card.capability, card.memory << 20, card.memory << 20, driver=None)


def memory_advice(card: Card) -> str:
    """The recommended format with its reason and command, then a table of all formats."""
    best = recommended(card)
    rows = [_row(fit) for fit in sorted(fits(card), key=lambda fit: fit.format != (best and best.format))]
    head = ("weights", *(f"{work}, GB" for work in BESIDE), "loses", "speed")
    about = f"{card.name}: {card.memory / GB:.1f} GB, compute capability {card.capability[0]}.{card.capability[1]}"
    return f"{about}\n{_told(best)}\n\n{table(head, rows)}\n{_REMARK}"


_REMARK = (
    "GB: the most that a call is expected to hold, weights included. bf16 and fp8 were measured on an H200; the other "
    "formats have been run on processors alone. In brackets: does not fit, or the card cannot compute so."
)


def _told(best: Fit | None) -> str:
    if best is None:
        return "No format of the 7B model fits; the tiny model does: make run"
    missing = [work for work, fits in best.fits.items() if not fits]
    why = f"the first that fits for {' and '.join(best.works)}" if missing else "the first that fits for everything"
    command = f'load_bagel("BAGEL-7B-MoT", weights="{best.format.name}")'
    if best.format.name == "df11":
        command = "python -m helpers download --repo df11"
    return f"recommended: {best.format.name}, {why}; it loses {best.format.loss}\n{command}"


def _row(fit: Fit) -> tuple[str, ...]:
    peaks = [f"{peak / GB:.1f}" if fit.fits[work] else f"({peak / GB:.1f})" for work, peak in fit.peaks.items()]
    return fit.format.name, *peaks, fit.format.loss, fit.format.speed


def _plain(name: str) -> str:
    return "".join(word for word in name.lower().split() if word not in ("nvidia", "geforce"))


def main(arguments: list[str]) -> int:
    """0, or 2 for a card that nobody knows."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers doctor",
        description=__doc__,
        epilog='example: python -m helpers doctor --card "RTX 4090"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--card", help=f"a card that is not here: {', '.join(KNOWN)}")
    asked = parser.parse_args(arguments)
    if asked.card:
        try:
            print(memory_advice(known_card(asked.card)))
        except ValueError as error:
            parser.error(str(error))
        return 0
    machine = inspect()
    print(table(("this machine", ""), describe(machine)), end="\n\n")
    for one in advise(machine):
        print(f"{one.topic}: {one.choice}, because {one.why}" + (f"\n    {one.command}" if one.command else ""))
    for card in machine.cards:
        print(f"\n{memory_advice(card)}")
    return 0
