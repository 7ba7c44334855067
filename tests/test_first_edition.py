"""A run made by the first edition of this code (November 2026) goes on in every later one.

tests/first_edition.zip holds the run, stopped after the first of GRPO's two steps with base, mid
and SFT finished, and the mirror that it read.
"""

import json
import shutil
import zipfile
from pathlib import Path

import pytest

from nanolib import launch, report
from nanolib.rundir import Run
from nanolib.session import Session
from nanolib.stages import worker
from nanolib.takeover import take_over
from nanolib.ui import runs

ARCHIVE = Path(__file__).with_name("first_edition.zip")
FORMER = {"mid.warmdown": 1.0, "optim.every_stage": True}  # what was the default then


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    with zipfile.ZipFile(ARCHIVE) as file:
        file.extractall(folder)
    return folder


@pytest.fixture
def old(kept, tmp_path, monkeypatch) -> Run:
    """The kept run, in a runs folder of its own."""
    monkeypatch.setenv("NANOLIB_RUNS", str(tmp_path / "runs"))
    shutil.copytree(kept / "run", tmp_path / "runs" / "old")
    return Run.load("old", {"mirror": str(kept / "mirror")})


def test_it_opens_and_is_listed(old, kept, capsys):
    recipe, manifest = old.config.recipe, json.loads((old.path / "manifest.json").read_text())
    assert recipe.model.depth == 1 and recipe.grpo.steps == 2
    assert Run.open("smoke", "old", manifest["overrides"] | {"mirror": str(kept / "mirror")}) == old
    assert not capsys.readouterr().err
    assert "sft (6 of 7)" in runs.table() and "grpo" in runs.table()


def test_it_keeps_its_recipe_where_a_default_has_changed(old, kept, tmp_path):
    recipe = old.config.recipe
    assert recipe.mid.warmdown == FORMER["mid.warmdown"] and recipe.optim.every_stage
    new = Run.open("smoke", str(tmp_path / "new")).config.recipe
    assert new.mid.warmdown == 0.2 and not new.optim.every_stage
    mirror = {"mirror": str(kept / "mirror")}
    with pytest.raises(ValueError, match=r"was made with mid\.warmdown = 1\.0, not 0\.5"):
        Run.open("smoke", "old", mirror | {"mid.warmdown": 0.5})


def test_an_unknown_setting_is_named(old, capsys):
    path = old.path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["recipe"]["model.smear"] = True
    path.write_text(json.dumps(manifest))
    assert Run.load("old").config.recipe == old.config.recipe
    assert "model.smear" in capsys.readouterr().err


def test_it_talks(old):
    with Session.open(old, "sft", max_new_tokens=8) as session:
        assert isinstance(session.ask("What is your name?"), str)
        assert [message.role for message in session.messages] == ["user", "assistant"]


def test_it_resumes_is_scored_and_reports(old):
    before = [row for row in old.stage("grpo").metrics.rows() if row["step"] <= 1]
    launch.stage("grpo", old)  # in a process of its own, as a user's command would
    rows = old.stage("grpo").metrics.rows()
    assert rows[: len(before)] == before  # from step 1 on, not from the start
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]
    assert (old.stage("grpo").checkpoints / "step_00000002").is_dir()
    assert worker.work("eval", old, of="grpo")["gsm8k"]["questions"] == 4
    text = report.build(old)
    assert all(f"| {name} " in text for name in ("base", "mid", "sft", "grpo"))


def test_its_stages_are_taken_over(old, kept):
    overrides = old.manifest()["overrides"] | FORMER | {"grpo.lr": 0.2}
    overrides["mirror"] = str(kept / "mirror")
    new = Run.open("smoke", "new", overrides)
    worker.work("data", new)
    first, second = take_over(new, old)
    assert first.endswith("shards, base, eval of base, mid, eval of mid, sft")
    assert second == "grpo is not taken over: grpo.lr is 0.05 there, 0.2 here"
