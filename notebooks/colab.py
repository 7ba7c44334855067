"""Installs the course where a notebook runs without a checkout's environment, such as Colab.

What is there stays (torch above all, which is large); only what is missing is added. The tokenizer's
crate comes as a wheel from the repository's releases, or else is built here, which takes a minute or
two: maturin fetches Rust. A chapter's first cell clones the repository and runs this file.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = "https://github.com/OWNER/nanolib"  # put yours here, then: pairs.py badges
ROOT = Path(__file__).parent.parent
CRATE = "rust-tokenizer"


def missing() -> Iterator[str]:
    """The library's requirements, without the crate, that are not installed in any version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in project["dependencies"]:
        name = re.match(r"[\w.-]+", requirement)[0]  # ty: ignore[not-subscriptable]
        if name != CRATE and not installed(name):
            yield requirement


def installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def pip(*words: str) -> bool:
    """Install without a word; whether it worked."""
    return subprocess.run([sys.executable, "-m", "pip", "install", "-q", *words]).returncode == 0


def install() -> None:
    """Install what is missing, the crate, and the library from this checkout."""
    found = list(missing())
    if found and not pip(*found):
        sys.exit(f"could not install {', '.join(found)}; see pip's message above")
    wheels = f"{REPOSITORY}/releases/expanded_assets/v{release()}"
    if not installed(CRATE) and not pip(
        "-qq", "--retries=0", "--no-index", "--find-links", wheels, CRATE
    ):
        print("no wheel of the tokenizer's crate for this machine: building it", flush=True)
        if not pip(str(ROOT / "rust_tokenizer")):
            sys.exit("could not build the crate; a C compiler is needed, see README, Begin")
    if not pip("--no-deps", "--editable", str(ROOT)):
        sys.exit(f"could not install nanolib from {ROOT}; see pip's message above")
    print("nanolib is installed: go on with the next cell")


def release() -> str:
    """The version of this checkout, whose release has the wheels."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "version"
    ]


if __name__ == "__main__":
    install()
