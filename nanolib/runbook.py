"""The run book: a run's executed chapters as self-contained, linked HTML pages.

``<run>/chapters/index.html`` has the contents, key figures and the report card, next to a page per
chapter and the glossary. nbconvert makes them from ``templates/runbook``. They load no external
resources and run no scripts: formulas stay as TeX source, and widgets are left out.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nanolib.config import MODELS
from nanolib.progress import clock
from nanolib.rundir import Run, write_atomic

if TYPE_CHECKING:
    from nbconvert import HTMLExporter

TEMPLATES = Path(__file__).parent / "templates"
# Output formats in order of preference; never scripts or widgets.
SHOWN = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]


def write(run: Run, names: Sequence[str]) -> Path:
    """Update the run book, with the chapters in order; returns its first page.

    A finished chapter's page is written if it is missing, outdated, or its links have changed.
    """
    folder, exporter = run.path / "chapters", _exporter()
    titles: dict[str, str | None] = dict.fromkeys(names)
    for before, name, after in zip([None, *names], names, [*names[1:], None], strict=False):
        if (folder / f"{name}.done.json").exists():
            titles[name] = _write_page(run, name, exporter, before, after)
    if (folder / "glossary.ipynb").exists():
        titles["glossary"] = _write_page(run, "glossary", exporter)
    write_atomic(folder / "index.html", _first_page(run, titles, exporter))
    return folder / "index.html"


def _write_page(
    run: Run, name: str, exporter: HTMLExporter, before: str | None = None, after: str | None = None
) -> str:
    """Write a notebook's page, unless current, with links to its neighbours; returns its title."""
    links = exporter.environment.get_template("page.html.j2").module.links
    source = run.path / "chapters" / f"{name}.ipynb"
    page, title = source.with_suffix(".html"), _title(source) or name
    current = page.exists() and page.stat().st_mtime >= source.stat().st_mtime
    if not current or links(before, after) not in page.read_text(encoding="utf-8"):
        about = {"title": f"{title} · {run.id}", "before": before, "after": after}
        body, _ = exporter.from_filename(str(source), resources=about)
        pages = r'href="(\d\d_\w+|glossary)\.ipynb(#[^"]*)?"'
        write_atomic(page, re.sub(pages, r'href="\1.html\2"', body))
    return title


def _exporter() -> HTMLExporter:
    from nbconvert import HTMLExporter
    from pygments.formatters.html import HtmlFormatter
    from traitlets.config import Config

    tags = {"enabled": True, "remove_cell_tags": ["parameters", "colab"]}
    shown = {"display_data_priority": SHOWN}
    exporter = HTMLExporter(
        config=Config({"NbConvertBase": shown, "TagRemovePreprocessor": tags}),
        template_name="runbook",
        extra_template_basedirs=[str(TEMPLATES)],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    dark = HtmlFormatter(style="monokai").get_style_defs(".highlight")
    exporter.environment.globals["dark_code"] = dark
    return exporter


def _title(source: Path) -> str | None:
    cells = json.loads(source.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    found = re.search(r"^# +(.+)$", text, re.M)
    return found and found[1].replace("`", "").strip()


def _first_page(run: Run, titles: dict[str, str | None], exporter: HTMLExporter) -> str:
    """The index page; the report card is rendered without HTML and images, as it quotes models."""
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    report = run.path / "report.md"
    records = [json.loads(p.read_text(encoding="utf-8")) for p in run.path.glob("**/done.json")]
    seconds = sum(r.get("seconds", 0.0) for r in records if not r.get("taken_over"))
    return exporter.environment.get_template("contents.html.j2").render(
        run=run,
        time=clock(seconds) if seconds else None,
        chapters=titles,
        curves=_curves(run),
        card=markdown.render(report.read_text(encoding="utf-8")) if report.exists() else "",
    )


def _curves(run: Run) -> dict[str, str] | None:
    """A figure with alt text: each stage's loss by step, and GRPO's mean reward."""
    import numpy as np
    from matplotlib.figure import Figure

    curves = {name: points for name in MODELS if len(points := run.stage(name).curve()) > 1}
    if not curves:
        return None
    figure, words = Figure(figsize=(2.4 * len(curves), 2.4), layout="constrained", dpi=110), []
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (name, points) in zip(panels, curves.items(), strict=True):
        steps, values = np.array(points).T
        window = max(1, len(values) // 20)
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(steps, values, color="#a0aec0", linewidth=0.8)
        axes.plot(steps[window - 1 :], smooth, color="#2b6cb0", linewidth=1.8)
        title = f"{name}: {'mean reward' if name == 'grpo' else 'training loss'}"
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=9)
        words.append(f"{title} from {smooth[0]:.2f} to {smooth[-1]:.2f} in {steps[-1]:,.0f} steps")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    data = base64.b64encode(picture.getvalue()).decode()
    return {"png": data, "alt": f"Curves, one a stage. {'; '.join(words)}."}
