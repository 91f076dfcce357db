"""The workbook's helpers: the few names that a notebook imports.

Importing this package loads neither torch nor transformers: a name's module is imported when the name is
first used.
"""

from importlib import import_module

# Name -> the module that defines it.
_HOME = {
    "load_bagel": "helpers.pipeline",
    "record": "helpers.workbook",
    "repository": "helpers.workbook",
}
__all__ = ["load_bagel", "record", "repository"]


def __getattr__(name: str):
    """Import the module of a public name when it is first asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'helpers' has no name {name!r}; it has {', '.join(sorted(_HOME))}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
