"""Chapter 04 in a real JupyterLab, driven through a real Chromium.

The live figure moves; the tab may be closed while the stage trains; restarting the kernel makes
the stage save and end; running the cell again goes on from there. Screenshots go to
tests/artifacts/, to be looked at.
"""

import nbformat
import pytest
from browser import ARTIFACTS, Tab, chromium, jupyterlab, wait_for

from nanolib import checkpoint, config, launch
from nanolib.rundir import Run, StageDir
from nanolib.stages import worker

OVERRIDES = {"base.steps": 2000, "base.batch_tokens": 8192, "base.save_every": 500}  # minutes


# ---------------------------------------------------------------------------- set-up


@pytest.fixture
def run(monkeypatch, tmp_path) -> Run:
    """A run whose text is ready, so that the chapter begins with pretraining."""
    monkeypatch.setenv("NANOLIB_RUNS", str(tmp_path / "runs"))
    made = Run.open("smoke", "browser", OVERRIDES)
    for name in ("data", "tokenizer", "shards"):
        worker.work(name, made)
    return made


@pytest.fixture
def lab(run, tmp_path):
    """A browser, and JupyterLab's address of a copy of chapter 04 with this run's parameters."""
    chapter = nbformat.read(config.REPOSITORY / "notebooks/04_pretraining.ipynb", as_version=4)
    (parameters,) = [c for c in chapter.cells if "parameters" in c.metadata.get("tags", [])]
    parameters.source = f'profile = "smoke"\nrun = "browser"\noverrides = {OVERRIDES}'
    for cell in chapter.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    with chromium("browser") as browser, jupyterlab(chapter, tmp_path) as address:
        yield browser, address


class Chapter(Tab):
    """The chapter in one tab."""

    def __init__(self, browser, address: str, busy: bool = False):
        super().__init__(browser, address, busy)
        self.training = self.cell('launch.stage("base", run')
        self.figure = self.training.locator(".jp-OutputArea-output img")

    def picture(self) -> str | None:
        """What the live figure shows now."""
        return self.figure.first.get_attribute("src") if self.figure.count() else None

    def screenshot(self, name: str) -> bytes:
        self.training.scroll_into_view_if_needed()
        return self.page.screenshot(path=ARTIFACTS / f"{name}.png")


def steps(place: StageDir) -> list[int]:
    return [row["step"] for row in place.metrics.rows() if row["kind"] == "train"]


def stopped_at(place: StageDir) -> int:
    """The step at which a stage saves and ends; nothing it has done is unsaved."""
    wait_for(lambda: not launch.is_running(place), "the stage to end")
    found = checkpoint.latest(place.checkpoints)
    assert found is not None and steps(place)[-1] == found.step < OVERRIDES["base.steps"]
    assert f"stopped and saved after step {found.step} of" in place.log.read_text()
    return found.step


# ---------------------------------------------------------------------------- the story


@pytest.mark.slow
def test_chapter_04_is_watched_closed_restarted_and_resumed(lab, run):
    base = run.stage("base")
    chapter = Chapter(*lab)
    assert not chapter.page.locator(".jp-Dialog").count(), "a dialog greets the reader"
    chapter.run_all()

    # The live figure moves.
    wait_for(chapter.picture, "the live figure")
    first, before = chapter.picture(), chapter.screenshot("browser-1-running")
    wait_for(lambda: chapter.picture() != first, "the figure to move")
    assert chapter.screenshot("browser-2-moved") != before
    assert chapter.figure.count() == 1, "the figure is drawn in place"

    # The tab is closed and opened again: it is still training.
    chapter.page.close()
    count = len(steps(base))
    wait_for(lambda: len(steps(base)) >= count + 5, "training to go on without a tab")
    chapter = Chapter(*lab, busy=True)
    assert launch.is_running(base)
    chapter.screenshot("browser-3-reopened")

    # The kernel is restarted: the stage saves and ends.
    chapter.restart_kernel()
    saved = stopped_at(base)

    # The cells run again: it goes on from there, and the new figure shows it.
    chapter.wait_until_idle()
    chapter.run_all()
    wait_for(lambda: len(steps(base)) > saved, "the stage to go on")
    wait_for(chapter.picture, "the figure of the second kernel")
    chapter.screenshot("browser-4-resumed")

    # The kernel is shut down: the stage saves again. No step is lost or done twice.
    chapter.menu("Kernel", "Shut Down Kernel")
    last = stopped_at(base)
    assert last > saved
    assert steps(base) == list(range(1, last + 1))
    # Jupyter interrupts before it shuts down: the next cell in the queue may start the stage once
    # more, for a step, before the kernel ends.
    assert base.log.read_text().count(" base on 1 rank(s)") in (2, 3)
