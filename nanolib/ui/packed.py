"""``nanolib pack``: the code base as one Markdown file, in reading order, without outputs.

The order is the one of the import layers in pyproject.toml, from the lowest up, so every module
comes after what it imports.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from nanolib import report
from nanolib.config import REPOSITORY

LANGUAGES = {".py": "python", ".rs": "rust", ".toml": "toml", ".md": "markdown", ".html": "html"}
LANGUAGES |= {".j2": "jinja", ".json": "json"}
BYTES_PER_TOKEN = 4  # of code, roughly


def pack(tests: bool = False) -> str:
    """The whole code base: a table of contents, then each file in a fence of its own."""
    contents, parts = [], []
    for number, path in enumerate(files(tests), 1):
        name, text = path.relative_to(REPOSITORY).as_posix(), path.read_text(encoding="utf-8")
        contents.append(f"{number}. {name} ({len(text.splitlines()):,} lines)")
        fenced = report.fenced(text.rstrip(), LANGUAGES[path.suffix])
        parts.append(f"## {name}\n\n{fenced}")
    title = "# The code of nanolib, in reading order"
    return "\n\n".join([title, "\n".join(contents), *parts]) + "\n"


def files(tests: bool = False) -> Iterator[Path]:
    """All files of the pack: README, library from below, crate, chapters, profiles, tests."""
    yield REPOSITORY / "README.md"
    yield REPOSITORY / "pyproject.toml"
    for module in layers():
        path = REPOSITORY / "nanolib" / module
        yield from [path.with_suffix(".py")] if not path.is_dir() else _sources(path)
    yield from _sources(REPOSITORY / "nanolib" / "templates")
    crate = REPOSITORY / "rust_tokenizer"
    yield from (crate / "Cargo.toml", *sorted((crate / "src").glob("*.rs")))
    yield from sorted((REPOSITORY / "notebooks").glob("*.py"))
    yield from sorted((REPOSITORY / "runs").glob("*.toml"))
    yield from sorted((REPOSITORY / "runs" / "bench").glob("*.py"))
    if tests:
        yield from sorted((REPOSITORY / "tests").glob("*.py"))


def layers() -> list[str]:
    """The library's modules and packages by name, lowest layer first."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    listed = next(c["layers"] for c in contracts if c["type"] == "layers")
    return [name for layer in reversed(listed) for name in re.findall(r"\w+", layer)]


def _sources(package: Path) -> list[Path]:
    found = (path for path in package.rglob("*") if path.suffix in LANGUAGES)
    return sorted(path for path in found if path.stat().st_size)


def size(text: str) -> str:
    """How long a text is, for one who pays by the token."""
    guess = round(len(text.encode()) / BYTES_PER_TOKEN, -3)
    return (
        f"{len(text):,} characters, about {guess:,.0f} tokens "
        f"(estimated: {BYTES_PER_TOKEN} bytes each)"
    )
