"""What the stand-in checkout answers: the vectors that lie beside it, made with the official algorithm."""

from pathlib import Path

from safetensors.torch import load_file

RECORDED = load_file(Path(__file__).parent / "recorded.safetensors")


def recorded(name):
    return RECORDED[name].clone()
