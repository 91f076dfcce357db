"""Checks of numbers that a user gave: each refusal tells the value, the limit and the cure."""

from __future__ import annotations

import math
from numbers import Real
from operator import index
from typing import Any


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """`value` as an int. Raises TypeError for what is no whole number, ValueError for one below `least`."""
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise TypeError(
            f"{name} {value!r} ({type(value).__name__}) must be a whole number, without quotes or decimal point."
        )
    if least is not None and index(value) < least:
        raise ValueError(f"{name} {value} must be at least {least}.")
    return index(value)


def finite_number(name: str, value: Any) -> float:
    """`value` as one of Python's own numbers. Raises TypeError for no number, ValueError for NaN and infinities."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} {value!r} ({type(value).__name__}) must be a number, without quotes.")
    if not math.isfinite(value):
        raise ValueError(f"{name} {value} must be a finite number.")
    return value if type(value) in (int, float) else float(value)
