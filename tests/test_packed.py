"""The code base as one file."""

import re
import subprocess

from nanolib.config import REPOSITORY
from nanolib.ui import cli, packed


def test_every_source_file_is_in_it_once_and_whole():
    text = packed.pack()
    names = re.findall(r"^## (\S+)$", text, re.M)
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "nanolib", "rust_tokenizer/src"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    sources = [name for name in tracked if (REPOSITORY / name).stat().st_size]
    assert set(sources) <= set(names)
    assert len(names) == len(set(names))
    for path in packed.files():
        assert path.read_text().rstrip() in text


def test_what_is_imported_comes_first():
    names = [path.relative_to(REPOSITORY).as_posix() for path in packed.files()]
    at = {name.removeprefix("nanolib/"): number for number, name in enumerate(names)}
    order = ["config.py", "rundir.py", "model.py", "stages/worker.py", "launch.py", "pipeline.py"]
    places = [at[name] for name in [*order, "ui/cli.py", "__main__.py"]]
    assert names[0] == "README.md" and places == sorted(places)
    assert names.index("rust_tokenizer/src/bpe.rs") < names.index("notebooks/00_tour.py")
    assert not any(name.startswith("tests/") for name in names)
    assert REPOSITORY / "tests" / "test_packed.py" in packed.files(tests=True)


def test_the_command(tmp_path, capsys):
    out = tmp_path / "code.md"
    assert cli.main(["pack", "--out", str(out)]) == 0
    text, said = out.read_text(), capsys.readouterr().out
    assert text == packed.pack() and f"{len(text):,} characters" in said
    assert f"about {len(text.encode()) / 4000:,.0f},000 tokens" in said
