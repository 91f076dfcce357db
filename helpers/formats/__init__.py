"""Weights in formats other than plain bfloat16: how each is written, read and brought to a card."""
