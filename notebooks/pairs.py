"""Chapters are kept twice: ``NN_topic.py`` to edit and compare, ``NN_topic.ipynb`` to look at.

The twin in .ipynb is committed with the outputs of profile ``demo``, so that it can be read on
the web. What differs from one execution to the next and says nothing (ids, metadata, paths,
addresses, dates) is left out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbformat import NotebookNode

from notebooks.colab import REPOSITORY
from nanolib import config, pipeline
from nanolib.rundir import Run, write_atomic

MAX_BYTES = 700_000  # of one .ipynb
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
FOLDED = {"colab", "solution-twin"}  # cells whose code JupyterLab shows when one clicks on it
VOLATILE = (
    (re.compile(r"0x[0-9a-f]{8,}"), "0x…"),
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(\+00:00)?"), "(date)"),
)


def refresh(overrides: Mapping[str, Any] | None = None) -> None:
    """Execute profile demo and renew every twin with its outputs.

    Chapters that a demo run has finished with the same source are not executed again.
    """
    run = pipeline.run("demo", None, overrides)
    for source in pipeline.chapters():
        executed = nbformat.read(run.path / "chapters" / f"{source.stem}.ipynb", as_version=4)
        text = nbformat.writes(_twin(source, executed, run)) + "\n"
        if len(text.encode()) > MAX_BYTES:
            raise ValueError(
                f"{source.stem}.ipynb would have {len(text.encode()):,} bytes, more than "
                f"{MAX_BYTES:,}; make its figures smaller or fewer"
            )
        write_atomic(source.with_suffix(".ipynb"), text)
        print(f"{source.with_suffix('.ipynb')}: {len(text.encode()):,} bytes")
    for source in _others():
        write_atomic(source.with_suffix(".ipynb"), nbformat.writes(_plain(source)) + "\n")


def _others() -> list[Path]:
    """Notebooks that no run executes: the glossary."""
    return sorted(pipeline.NOTEBOOKS.glob("glossary.py"))


def check() -> None:
    """Raise ValueError that names every chapter whose twins differ, and how."""
    sources = [*pipeline.chapters(), *_others()]
    lonely = {p.stem for p in pipeline.NOTEBOOKS.glob("*.ipynb")} - {p.stem for p in sources}
    found = [f"{name}.ipynb has no .py" for name in sorted(lonely)]
    for source in sources:
        if problem := _difference(source, source.with_suffix(".ipynb")):
            found.append(f"{source.stem}: {problem}")
    if found:
        raise ValueError("; ".join(found) + " (renew with: nanolib notebooks --refresh)")


def _difference(source: Path, twin: Path) -> str | None:
    if not twin.exists():
        return "it has no .ipynb"
    if twin.stat().st_size > MAX_BYTES:
        return f"its .ipynb has {twin.stat().st_size:,} bytes, more than {MAX_BYTES:,}"
    mine, theirs = _cells(jupytext.read(source)), _cells(nbformat.read(twin, as_version=4))
    for number, (a, b) in enumerate(zip(mine, theirs, strict=False)):
        if a != b:
            return f"cell {number} differs"
    if len(mine) != len(theirs):
        return f"the .py has {len(mine)} cells, the .ipynb {len(theirs)}"
    return None


def _cells(notebook: NotebookNode) -> list[tuple[str, str, tuple[str, ...]]]:
    """What twins must share: each cell's type, text and tags."""
    return [(c.cell_type, c.source, tuple(c.metadata.get("tags", ()))) for c in notebook.cells]


def _plain(source: Path) -> NotebookNode:
    """A source's cells as written, without outputs."""
    twin = jupytext.read(source)
    twin.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    for number, cell in enumerate(twin.cells):
        cell.id = f"cell-{number:03}"
        cell.metadata = {key: cell.metadata[key] for key in ("tags",) if key in cell.metadata}
        if FOLDED & set(cell.metadata.get("tags", [])):
            cell.metadata["jupyter"] = {"source_hidden": True}
    return twin


def _twin(source: Path, executed: NotebookNode, run: Run) -> NotebookNode:
    """The chapter's cells as written, with the outputs of an execution."""
    twin = _plain(source)
    done = [c for c in executed.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    count = 0
    for cell, ran in zip(twin.cells, done, strict=True):
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            cell.outputs = [o for output in ran.outputs if (o := _output(output, count, run))]
    return twin


def _output(output: NotebookNode, count: int, run: Run) -> NotebookNode | None:
    """One output without what is volatile, or None for a widget, which needs a live kernel."""
    metadata = output.pop("metadata", {})
    about = {kind: words for kind, words in metadata.items() if isinstance(words, dict)}
    alt = {kind: {"alt": words["alt"]} for kind, words in about.items() if "alt" in words}
    if output.output_type == "stream":
        output.text = _steady(output.text, run)
        return output
    if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
        return None
    output.metadata = alt
    if output.output_type == "execute_result":
        output.execution_count = count
    for kind, data in output.get("data", {}).items():
        if kind.startswith("text/"):
            output.data[kind] = _steady(data, run)
    return output


def _steady(text: str, run: Run) -> str:
    text = text.replace(str(run.path), f"runs/out/{run.id}")
    text = text.replace(f"{config.REPOSITORY}/", "")
    for pattern, replacement in VOLATILE:
        text = pattern.sub(replacement, text)
    return text


# ---------------------------------------------------------------------------- how long it takes

HEADING = re.compile(  # chapter, number, stars, minutes, kind
    r"\*\*Exercise (\d)\.(\d) (★{1,3}) · (\d+) minutes? · (build|predict|break|open)\*\*"
)


def minutes(source: Path) -> tuple[int, int]:
    """How long a chapter takes, to the next five: to read and run, and more for its exercises.

    A minute reads 200 words or fifteen lines of code; solutions and answers belong to exercises,
    whose minutes are those in their headings.
    """
    words = lines = 0
    for cell in jupytext.read(source).cells:
        if cell.cell_type == "markdown":
            words += len(
                re.sub(r"<details>.*?</details>", "", cell.source, flags=re.DOTALL).split()
            )
        elif not {"exercise", "open", "colab"} & set(cell.metadata.get("tags", [])):
            lines += sum(bool(line.strip()) for line in cell.source.splitlines())
    practice = sum(int(found[4]) for found in HEADING.finditer(source.read_text(encoding="utf-8")))
    return _to_five(words / 200 + lines * 4 / 60), _to_five(practice)


def _to_five(value: float) -> int:
    return max(5, 5 * round(value / 5)) if value else 0


# ---------------------------------------------------------------------------- one click

BADGE = """# %% [markdown]
# [▶ Open this chapter in Colab]({address}): nothing to install on your machine.

# %% tags=["colab"]
# On Colab this fetches the course; elsewhere it does nothing.
import os
import subprocess
import sys

if "google.colab" in sys.modules and not os.path.exists("lesson.py"):
    source, course = "{repository}", "/content/nanolib"
    subprocess.run(["git", "clone", "-q", "--depth=1", source, course], check=True)
    os.chdir(f"{{course}}/notebooks")
    sys.path[:0] = [course, f"{{course}}/notebooks"]
    subprocess.run([sys.executable, "colab.py"], check=True)

"""


def badge(source: Path) -> str:
    """The two cells that a chapter begins with: a link that opens it in Colab, and its set-up."""
    host, path = "https://colab.research.google.com/github", REPOSITORY.split("/", 3)[3]
    address = f"{host}/{path}/blob/main/notebooks/{source.stem}.ipynb"
    return BADGE.format(address=address, repository=REPOSITORY)


def put_badges() -> None:
    """Begin every chapter and its twin with its badge, in place of an older one."""
    for source in pipeline.chapters():
        head, text = source.read_text(encoding="utf-8").split("# %% [markdown]\n", 1)
        text = "# %% [markdown]\n" + text
        if 'tags=["colab"]' in text:
            text = "# %% [markdown]\n" + text.split("# %% [markdown]\n", 2)[2]
        source.write_text(head + badge(source) + text, encoding="utf-8")
        twin = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
        kept = [c for c in twin.cells if "colab" not in c.metadata.get("tags", [])]
        kept = [c for c in kept if "Open this chapter in Colab" not in c.source]
        twin.cells = _plain(source).cells[:2] + kept
        twin.cells[0].id, twin.cells[1].id = "colab-link", "colab-install"
        nbformat.write(twin, source.with_suffix(".ipynb"))


if __name__ == "__main__":
    if sys.argv[1:] == ["badges"]:
        put_badges()
    elif sys.argv[1:] == ["minutes"]:
        for chapter in pipeline.chapters():
            reading, practice = minutes(chapter)
            print(f"{chapter.stem:<18} {reading:>3} to read and run, {practice:>3} with exercises")
    else:
        sys.exit("usage: python notebooks/pairs.py minutes | badges")
