"""The run book: a run's executed chapters as linked HTML pages that need nothing but themselves.

    <run>/chapters/index.html       contents, the run's key figures and its report card
    <run>/chapters/NN_topic.html    one executed chapter, its figures inside

No page loads anything from elsewhere: no scripts, no fonts, and formulas stay as they were typed.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from nanolib.progress import clock
from nanolib.rundir import Run, write_atomic

# What a cell's output is shown as, the best first: never as a script or a widget.
SHOWN = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]
CSS = """
:root { color-scheme: light; }
body { max-width: 52rem; margin: 0 auto; padding: 1rem 1.2rem 4rem; color: #1d2129;
  background: #fff; font: 1rem/1.6 system-ui, "Segoe UI", "Liberation Sans", sans-serif; }
nav { display: flex; justify-content: space-between; gap: 1rem; font-size: .9rem;
  border-bottom: 1px solid #dfe3ea; padding: .4rem 0; }
nav span { flex: 1; } nav span:nth-child(2) { text-align: center; }
nav span:nth-child(3) { text-align: right; }
main + nav { border: 0; border-top: 1px solid #dfe3ea; margin-top: 2.5rem; }
a { color: #1558b0; text-decoration: none; } a:hover { text-decoration: underline; }
h1, h2, h3 { line-height: 1.25; margin: 1.8em 0 .5em; } h1 { margin-top: 1em; }
code, pre { font: .84rem/1.5 ui-monospace, "Cascadia Mono", Menlo, "DejaVu Sans Mono", monospace; }
pre { margin: 0; overflow-x: auto; }
:not(pre) > code { background: #f1f3f7; border-radius: .25rem; padding: .08em .3em; }
.highlight, p + pre, li pre, main > pre { background: #f6f7fa; border-radius: .35rem;
  padding: .6rem .8rem; margin: .9rem 0 .4rem; }
.output_text { padding-left: .8rem; border-left: 3px solid #dfe3ea; }
.output_stderr, .output_error { border-color: #d9822b; }
img, svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .88rem; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e6e9ef; text-align: left; }
blockquote { margin: .8rem 0; padding-left: 1rem; border-left: 3px solid #dfe3ea; color: #4a5160; }
.figures { display: flex; flex-wrap: wrap; gap: .7rem; padding: 0; list-style: none; }
.figures li { background: #f6f7fa; border-radius: .5rem; padding: .6rem 1rem; }
.figures b { display: block; font-size: 1.3rem; }
.quiet { color: #6b7280; font-size: .88rem; }
"""


def write(run: Run, names: Sequence[str]) -> Path:
    """Bring the run book up to date; returns its first page.

    names: all chapters of the course in order ("00_tour"); pages are written for those that are
    finished, where they are missing, older than the executed notebook, or linked otherwise.
    """
    folder = run.path / "chapters"
    finished = [name for name in names if (folder / f"{name}.done.json").exists()]
    titles = {}
    for name in finished:
        source, page = folder / f"{name}.ipynb", folder / f"{name}.html"
        titles[name] = _title(json.loads(source.read_text(encoding="utf-8"))["cells"]) or name
        links = _links(name, names)
        if not _current(page, source, links):
            write_atomic(page, _page(f"{titles[name]} · {run.id}", links, _chapter(source)))
    write_atomic(folder / "index.html", _index(run, names, titles))
    return folder / "index.html"


def _current(page: Path, source: Path, links: str) -> bool:
    if not page.exists() or page.stat().st_mtime < source.stat().st_mtime:
        return False
    return links in page.read_text(encoding="utf-8")


def _title(cells: Sequence[dict]) -> str | None:
    """The chapter's first heading."""
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and (found := re.search(r"^# +(.+)$", text, re.M)):
            return found[1].replace("`", "").strip()
    return None


# ---------------------------------------------------------------------------- pages


def _links(name: str, names: Sequence[str]) -> str:
    """The bar with the pages before and after, and the contents between them."""
    at = names.index(name)
    before, after = names[at - 1 : at], names[at + 1 : at + 2]
    spans = (
        "".join(f'<a href="{other}.html">← {other}</a>' for other in before),
        '<a href="index.html">contents</a>',
        "".join(f'<a href="{other}.html">{other} →</a>' for other in after),
    )
    return "<nav>" + "".join(f"<span>{span}</span>" for span in spans) + "</nav>"


def _page(title: str, links: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{CSS}{_colours()}</style>\n</head>\n<body>\n"
        f"{links}\n<main>\n{body}\n</main>\n{links}\n</body>\n</html>\n"
    )


@cache
def _colours() -> str:
    """The style sheet of highlighted code."""
    from pygments.formatters.html import HtmlFormatter

    lines = HtmlFormatter(style="default").get_style_defs(".highlight").splitlines()
    return "\n".join(line for line in lines if "background: #f" not in line)


def _chapter(source: Path) -> str:
    """An executed notebook's cells as HTML, links to notebooks turned into links to their pages."""
    import nbformat
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    notebook = nbformat.read(source, as_version=4)
    notebook.metadata.pop("widgets", None)  # a script
    exporter = HTMLExporter(
        config=Config({"NbConvertBase": {"display_data_priority": SHOWN}}),
        template_name="basic",
        exclude_anchor_links=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    body, _ = exporter.from_notebook_node(notebook)
    return re.sub(r'href="(\d\d_\w+)\.ipynb(#[^"]*)?"', r'href="\1.html\2"', body)


def _index(run: Run, names: Sequence[str], titles: dict[str, str]) -> str:
    chapters = "\n".join(
        f'<li><a href="{name}.html">{html.escape(titles[name])}</a></li>'
        if name in titles
        else f'<li class="quiet">{name}: not executed yet</li>'
        for name in names
    )
    figures = "".join(f"<li><b>{value}</b>{name}</li>" for name, value in _figures(run).items())
    report = run.path / "report.md"
    card = _render(report.read_text(encoding="utf-8")) if report.exists() else ""
    made = f"profile {run.config.profile}, made {run.manifest()['created']}"
    body = (
        f'<h1>Run {html.escape(run.id)}</h1>\n<p class="quiet">{html.escape(made)}</p>\n'
        f'<ul class="figures">{figures}</ul>\n<h2>Chapters</h2>\n<ul>\n{chapters}\n</ul>\n{card}'
    )
    return _page(f"run {run.id}", "", body)


def _figures(run: Run) -> dict[str, str]:
    """What one wants to know first of a run, as far as its stages are done."""
    records = [json.loads(p.read_text(encoding="utf-8")) for p in run.path.glob("**/done.json")]
    base = run.stage("base").done()
    result = base["result"] if base else {}
    forms = {
        "parameters": ("parameters", ","),
        "tokens": ("tokens of pretraining", ","),
        "validation_bpb": ("bits per byte after pretraining", ".3f"),
    }
    found = {name: f"{result[key]:{form}}" for key, (name, form) in forms.items() if key in result}
    if seconds := sum(record.get("seconds", 0.0) for record in records):
        found["all stages together"] = clock(seconds)
    return found


def _render(text: str) -> str:
    """Markdown without HTML and images: it quotes what models wrote."""
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable("table").disable("image").render(text)
