"""How fast a machine prepares text: the rates and the bytes per token of `nanolib plan`.

``nanolib bench text --mirror DIR`` runs the data, tokenizer and shards stages of profile h100 on a
mirror with a few vocabulary sizes, then those of profile demo on the toy world, each in a run of its
own that is deleted again, and writes text.md. A stage's seconds include the start of its process.
"""

import argparse
import datetime
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanolib import hub, launch, report
from nanolib.rundir import Run, spent
from nanolib.runtime import processor

SIZES = {"demo": (512, 1024), "h100": (4096, 16_384, 65_536)}


def prepare(profile: str, vocab_size: int, mirror: str, folder: Path) -> list[str]:
    """A row of the table."""
    settings = {"tokenizer.vocab_size": vocab_size, "machine.device": "cpu"}
    settings |= {"machine.mirror": mirror} if profile == "h100" else {}
    run = Run.open(profile, str(folder / f"{profile}-{vocab_size}"), settings)
    result = {name: launch.stage(name, run) for name in ("data", "tokenizer", "shards")}
    seconds = {name: spent(run.stage(name).path)["seconds"] for name in result}
    files = hub.text_files(run.config, run.text_mirror())
    size = sum(map(hub.text_bytes, [*files.train, files.validation]))
    per_token = result["tokenizer"]["validation_bytes_per_token"]
    row = [profile, f"{vocab_size:,}", f"{size / 1e6:.1f}"]
    for name in ("tokenizer", "shards"):
        row += [f"{seconds[name]:.1f}", f"{size / 1e6 / seconds[name]:.1f}"]
    return [*row, f"{per_token:.2f}"]


def rows(mirror: str) -> Iterator[list[str]]:
    with tempfile.TemporaryDirectory(prefix="nanolib-text-") as folder:
        for profile, sizes in SIZES.items():
            yield from (prepare(profile, size, mirror, Path(folder)) for size in sizes)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mirror", required=True)
    given = parser.parse_args(arguments)
    heads = ["profile", "vocabulary", "text, MB", "tokenizer, s", "MB/s", "shards, s", "MB/s"]
    load = os.getloadavg()[0]
    found = report.table([*heads, "bytes per token"], list(rows(given.mirror)))
    about = f"{datetime.date.today()}, {processor()}, {os.cpu_count()} cores"
    text = f"# Preparing text\n\n{about}, load {load:.1f} at the start.\n\n{found}\n"
    made = "\nMade by `uv run nanolib bench text --mirror DIR`.\n"
    Path(__file__).with_suffix(".md").write_text(text + made)
    print(text)
