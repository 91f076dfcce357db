"""A notebook's parameters: read from its `parameters` cell, checked before anything runs.

A parameters cell holds lines of the form `NAME: type = value  # what it does`. papermill itself only warns
about an unknown name and passes a value of the wrong type on, so both are refused here.
"""

import ast
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

_SIMPLE = {"int": int, "float": float, "str": str, "bool": bool}


class ParameterError(ValueError):
    """An unknown name, a value of the wrong type, or a file that cannot be read as parameters."""


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell; `type` is the annotation as written, `default` the value behind it."""

    name: str
    type: str
    default: Any
    description: str


def parameters_of(notebook: Path) -> dict[str, Parameter]:
    """The parameters of a notebook file, by name, in the order of its cell tagged `parameters`.

    Raises ParameterError if there is not exactly one such cell, or a line of it is not `NAME: type = value  #
    ...`.
    """
    import nbformat

    cells = nbformat.read(notebook, as_version=4).cells
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ParameterError(f"{notebook.name} has {len(tagged)} cells tagged `parameters`; it needs exactly one")
    return parse_parameters(tagged[0].source, notebook.name)


def parse_parameters(source: str, where: str = "the parameters cell") -> dict[str, Parameter]:
    """The parameters written in `source`, by name. `where` names the place in error messages."""
    lines = source.splitlines()
    found = {}
    for statement in ast.parse(source).body:
        line = lines[statement.end_lineno - 1]
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value):
            raise ParameterError(f"{where}: write `NAME: type = value  # what it does` instead of `{line}`")
        # Columns of the syntax tree count bytes, and a prompt may well be Chinese.
        rest = line.encode()[statement.end_col_offset :].decode()
        found[statement.target.id] = Parameter(
            name=statement.target.id,
            type=ast.unparse(statement.annotation),
            default=ast.literal_eval(statement.value),
            description=rest.partition("#")[2].strip(),
        )
    return found


def check_parameters(notebook: Path, values: dict[str, Any]) -> None:
    """Refuse values that the notebook's parameters cell does not know or whose type it does not allow.

    Raises ParameterError, which names the notebook, the value, what is allowed and the cure.
    """
    known = parameters_of(notebook)
    for name, value in values.items():
        if name not in known:
            raise ParameterError(f"{notebook.name}: {unknown_name(name, list(known))}")
        if not _fits(value, ast.parse(known[name].type, mode="eval").body):
            raise ParameterError(f"{notebook.name}: {_wrong_type(known[name], value)}")


def unknown_name(name: Any, valid: list[str]) -> str:
    """The sentence that refuses `name`: the nearest valid name if there is one, then all of them.

    `name` is what YAML made of it: a number or, for words such as `on`, a bool.
    """
    near = get_close_matches(str(name).upper(), valid, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"unknown parameter {name}.{hint} Valid: {', '.join(valid)}"


def read_values(path: Path) -> dict[str, dict[str, Any]]:
    """The sections of a parameter file, each a mapping of values: `common`, and names of notebooks.

    Raises ParameterError for a missing file, broken YAML, or a section that is not a mapping.
    """
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in path.parent.glob("*.yml"))) or "none"
        raise ParameterError(f"no parameter file {path}; .yml files in that folder: {there}")
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError(f"{path.name} is not YAML: {error}") from error
    if not isinstance(sections, dict) or not all(isinstance(part, dict | None) for part in sections.values()):
        raise ParameterError(
            f"{path.name}: the top level holds `common:` and notebook names, each with NAME: value lines"
        )
    return {str(section): part or {} for section, part in sections.items()}


def values_for(notebooks: list[Path], sections: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each notebook's values by its name: those of `common` that it knows, then those of its own section.

    `notebooks` must be all that the file may talk about. Raises ParameterError for a section that is no
    notebook's name, for a common name that no notebook has, and for whatever `check_parameters` refuses.
    """
    known = {notebook.stem: parameters_of(notebook) for notebook in notebooks}
    for section in sections.keys() - {"common"} - known.keys():
        raise ParameterError(f"section {section}: no such notebook. Sections: common, {', '.join(known)}")
    common = sections.get("common", {})
    names = list(dict.fromkeys(name for of_one in known.values() for name in of_one))
    for name in common:
        if name not in names:
            raise ParameterError(f"section common: {unknown_name(name, names)}")
    values = {}
    for notebook in notebooks:
        shared = {name: value for name, value in common.items() if name in known[notebook.stem]}
        values[notebook.stem] = shared | sections.get(notebook.stem, {})
        check_parameters(notebook, values[notebook.stem])
    return values


def _fits(value: Any, annotation: ast.expr) -> bool:
    """Whether `value` has the annotated type; an int passes for a float, a bool passes for neither."""
    match annotation:
        case ast.Constant(value=None):
            return value is None
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _fits(value, left) or _fits(value, right)
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            return isinstance(value, list) and all(_fits(one, item) for one in value)
        case ast.Name(id="float"):
            return isinstance(value, int | float) and not isinstance(value, bool)
        case ast.Name(id="int"):
            return isinstance(value, int) and not isinstance(value, bool)
        case ast.Name(id=name) if name in _SIMPLE:
            return isinstance(value, _SIMPLE[name])
    raise ParameterError(
        f"type {ast.unparse(annotation)} is not one a parameter can have: "
        "int, float, str, bool, None, list[...] and unions of them"
    )


def _wrong_type(parameter: Parameter, value: Any) -> str:
    """The sentence that refuses a value of the wrong type, with what to write in the YAML file instead."""
    example = yaml.safe_dump({parameter.name: parameter.default}, allow_unicode=True).strip()
    cure = f"for example `{example}`"
    if isinstance(value, str) and value.lower() in ("true", "false") and "bool" in parameter.type:
        cure = f"write `{parameter.name}: {value.lower()}` without quotes"
    elif isinstance(value, str) and "float" in parameter.type and _is_number(value):
        cure = f"YAML reads 1e-3 as text; write it with a point and a sign: `{parameter.name}: {float(value)}`"
    elif "str" in parameter.type and not isinstance(value, list | dict):
        cure = f'write `{parameter.name}: "{value}"` with quotes'
    return f"{parameter.name} is {value!r} ({type(value).__name__}), but must be {parameter.type}; {cure}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
