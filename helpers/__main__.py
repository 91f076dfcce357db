"""`python -m helpers <command>`: finds the command; what follows belongs to it."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

# Command -> the module whose `main(arguments)` runs it and returns the exit code, and what it does.
COMMANDS = {
    "bench": ("helpers.bench.command", "time and memory of pictures, edits and answers on this device"),
    "convert": ("helpers.convert", "a folder of weights in a smaller format, so that it loads at once"),
    "doctor": ("helpers.doctor", "what this machine, or a card that you name, should use, and why"),
    "download": ("helpers.download.command", "fetch the weights, go on where it stopped, verify every byte"),
    "verify": ("helpers.verify.command", "the official code and this one on the same weights, compared"),
}


def main(arguments: list[str]) -> int:
    """The exit code of the command; without one, the help and 2."""
    told = "\n".join(f"  {name:<8} {what}" for name, (_, what) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m helpers",
        description=f"The workbook's commands:\n{told}",
        epilog="example: python -m helpers bench --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=sorted(COMMANDS))
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    command = parser.parse_args(arguments[:1]).command
    return import_module(COMMANDS[command][0]).main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
