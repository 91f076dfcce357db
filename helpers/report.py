"""The pages of a run: each executed notebook as HTML, and `index.html`, the run at a glance with every
picture.

The index is one file that needs nothing else to be read (pictures are embedded) and reads well on a phone.
"""

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
.about { color: #888; margin: 0 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .35rem .6rem; }
th, td { border-bottom: 1px solid var(--line); } 
.number { text-align: right; font-variant-numeric: tabular-nums; }
.passed { color: #1a7f37; } .failed, .interrupted { color: #cf222e; } .verdict { font-weight: 600; }
figure { margin: 1rem 0; } figcaption { color: #888; font-size: .875rem; margin-bottom: .25rem; }
figure img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
pre { background: var(--soft); padding: .75rem; border-radius: 4px; font-size: .8125rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: .5rem 0; } dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; }
dt { color: #888; } dd { margin: 0; overflow-wrap: anywhere; }
"""


def write_index(out: Path) -> Path:
    """Write `<out>/index.html` from `results.json` and the executed notebooks beside it; returns the file."""
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    run = results["run"]
    sections = "".join(_section(out, one) for one in results["notebooks"])
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run['name'])}: {escape(run['status'])}</title><style>{_STYLE}</style></head><body>"
        f"<h1>The BAGEL workbook: {escape(run['name'])}</h1>{_about(run)}"
        f"{_overview(results['notebooks'])}{sections}</body></html>\n"
    )
    file = out / "index.html"
    file.write_text(page, encoding="utf-8")
    return file


def write_page(executed: Any, file: Path) -> None:
    """Write an executed notebook (an nbformat node) as one HTML page, GIFs included."""
    from nbconvert import HTMLExporter

    # Neither script is needed for what the notebooks show, and a page must open without a network.
    exporter = HTMLExporter(embed_images=True, mathjax_url="", require_js_url="")
    # nbconvert leaves GIFs out unless they are named; they stand before the still pictures.
    exporter.register_preprocessor(_gifs_as_html, enabled=True)
    page, _ = exporter.from_notebook_node(executed, {"metadata": {"name": file.stem}})
    file.write_text(page, encoding="utf-8")


def pictures(executed: Any) -> Iterator[tuple[str, str, str]]:
    """(caption, mime type, base64) of every picture in an executed notebook; captions are the headings."""
    heading = ""
    for cell in executed.cells:
        if cell.cell_type == "markdown":
            titles = [line.lstrip("# ") for line in cell.source.splitlines() if line.startswith("#")]
            heading = titles[-1] if titles else heading
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            kind = next((kind for kind in ("image/gif", "image/png", "image/jpeg") if kind in data), None)
            if kind:
                yield heading, kind, data[kind].replace("\n", "")


def _about(run: dict[str, Any]) -> str:
    device = ", ".join(run["cards"]) or run["processor"]
    parts = [
        f"{run['status']} in {run['seconds']:.0f} s",
        f"model: {run['model'] or 'default of the notebooks'}",
        f"parameters: {run['parameters'] or 'defaults of the notebooks'}",
        f"Python {run['python']}, torch {run['torch']}, transformers {run['transformers']}",
        device,
        run["started"].replace("T", " ").replace("+00:00", " UTC"),
    ]
    return f'<p class="about">{" · ".join(escape(str(part)) for part in parts)}</p>'


def _overview(notebooks: list[dict[str, Any]]) -> str:
    """The table of all notebooks, each linked to its part of the page."""
    rows = "".join(
        f'<tr><td><a href="#{escape(one["name"])}">{escape(one["name"])}</a></td>'
        f'<td class="number">{one["cells_run"]}/{one["cells"]}</td>'
        f'<td class="number">{one["seconds"]:.1f} s</td><td>{_verdict(one)}</td></tr>'
        for one in notebooks
    )
    number = '<th class="number">'
    head = f"<tr><th>notebook</th>{number}cells</th>{number}time</th><th>verdict</th></tr>"
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def _section(out: Path, one: dict[str, Any]) -> str:
    """One notebook: links, error, what it recorded, its pictures."""
    import nbformat

    name = escape(one["name"])
    file = out / f"{one['name']}.ipynb"
    shown = f'<h2 id="{name}">{name} {_verdict(one)}</h2>'
    if one["verdict"] == "not run" or not file.is_file():
        return shown
    shown += f'<p><a href="{name}.html">page</a> · <a href="{name}.ipynb">notebook</a></p>' + _failure(one["error"])
    shown += _values("results", one["results"]) + _values("parameters", one["parameters"])
    for caption, kind, data in pictures(nbformat.read(file, as_version=4)):
        image = f'<img alt="{escape(caption)}" src="data:{kind};base64,{data}">'
        shown += f"<figure><figcaption>{escape(caption)}</figcaption>{image}</figure>"
    return shown


def _verdict(one: dict[str, Any]) -> str:
    return f'<span class="verdict {escape(one["verdict"])}">{escape(one["verdict"])}</span>'


def failed_in(error: dict[str, Any]) -> str:
    """Where an error of `results.json` happened, as the page numbers its cells."""
    return "outside any cell" if error["cell"] is None else f"In [{error['execution_count']}]"


def _failure(error: dict[str, Any] | None) -> str:
    if error is None:
        return ""
    lines = [f"{failed_in(error)}: {error['ename']}: {error['evalue']}", "", *error["traceback"]]
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def _values(title: str, values: dict[str, Any]) -> str:
    """Names and values, folded away: a page is for its pictures first."""
    if not values:
        return ""
    texts = {name: one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for name, one in values.items()}
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in texts.items())
    return f"<details><summary>{escape(title)}</summary><dl>{rows}</dl></details>"


def _gifs_as_html(executed: Any, resources: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A copy of the notebook in which a GIF is an HTML image, which every page template shows."""
    import copy

    executed = copy.deepcopy(executed)
    for cell in executed.cells:
        for output in cell.get("outputs", []):
            gif = output.get("data", {}).get("image/gif")
            if gif:
                output.data["text/html"] = f'<img alt="animation" src="data:image/gif;base64,{gif.strip()}">'
    return executed, resources
