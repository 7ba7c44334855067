"""``nanolib pack``: the code base as one Markdown file in reading order, without outputs."""

import re
import tomllib
from pathlib import Path

from nanolib.config import REPOSITORY
from nanolib.report import fenced

LANGUAGES = {".py": "python", ".rs": "rust", ".toml": "toml", ".md": "markdown", ".html": "html"}
LANGUAGES |= {".j2": "jinja", ".json": "json", ".css": "css"}
OTHERS = "nanolib/templates/**/* rust_tokenizer/Cargo.toml rust_tokenizer/src/* notebooks/*.py"
OTHERS += " runs/*.toml runs/bench/*.py"


def files(tests: bool = False) -> list[Path]:
    """README, library (lowest import layer first), Rust crate, chapters, runs/, tests."""
    tools = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]
    layers = tools["importlinter"]["contracts"][0]["layers"]
    modules = re.findall(r"\w+", " ".join(reversed(layers)))
    library = [glob for name in modules for glob in (f"nanolib/{name}.py", f"nanolib/{name}/**/*")]
    globs = ["README.md", "pyproject.toml", *library, *OTHERS.split(), *["tests/*.py"] * tests]
    found = (path for glob in globs for path in sorted(REPOSITORY.glob(glob)))
    return [path for path in found if path.suffix in LANGUAGES and path.stat().st_size]


def pack(tests: bool = False) -> str:
    """All files, each in a fenced block under its own heading."""
    parts = ["# The code of nanolib, in reading order"]
    for path in files(tests):
        code = fenced(path.read_text(encoding="utf-8").rstrip(), LANGUAGES[path.suffix])
        parts.append(f"## {path.relative_to(REPOSITORY).as_posix()}\n\n{code}")
    return "\n\n".join(parts) + "\n"
