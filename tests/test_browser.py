"""Chapter 04 in a real JupyterLab, driven through a real Chromium.

The live figure moves; the tab may be closed while the stage trains; restarting the kernel makes
the stage save and end; running the cell again goes on from there. Screenshots go to
tests/artifacts/, to be looked at.
"""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest

from nanolib import checkpoint, config, launch, stages
from nanolib.rundir import Run, StageDir

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ARTIFACTS = Path(__file__).parent / "artifacts"
TOKEN = "only-on-this-machine"
OVERRIDES = {"base.steps": 2000, "base.batch_tokens": 8192, "base.save_every": 500}  # minutes
PATIENCE = 180  # seconds for anything: more than enough, also on a busy machine
SETTINGS = {  # every cell in the page, wherever it is scrolled; no question about news
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


def needs(found: object, what: str) -> None:
    """Skip where a tool is missing; in CI that is a failure."""
    if not found:
        stop = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        stop(f"the browser test needs {what}, which is not installed")


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE} s for {what}"
        time.sleep(0.2)


# ---------------------------------------------------------------------------- set-up


@pytest.fixture
def run(monkeypatch, tmp_path) -> Run:
    """A run whose text is ready, so that the chapter begins with pretraining."""
    monkeypatch.setenv("NANOLIB_RUNS", str(tmp_path / "runs"))
    made = Run.open("smoke", "browser", OVERRIDES)
    for name in ("data", "tokenizer", "shards"):
        stages.work(name, made)
    return made


@pytest.fixture
def lab(run, tmp_path) -> Iterator[str]:
    """JupyterLab over a copy of chapter 04 with this run's parameters; the chapter's address."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    ARTIFACTS.mkdir(exist_ok=True)
    chapter = nbformat.read(config.REPOSITORY / "notebooks/04_pretraining.ipynb", as_version=4)
    (parameters,) = [c for c in chapter.cells if "parameters" in c.metadata.get("tags", [])]
    parameters.source = f'profile = "smoke"\nrun = "browser"\noverrides = {OVERRIDES}'
    for cell in chapter.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(chapter, folder / "04_pretraining.ipynb")
    for name, values in SETTINGS.items():
        file = tmp_path / "settings/@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = (tmp_path / "jupyter.log").open("w")
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
            *("--ip=127.0.0.1", f"--port={port}"),
            *(f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder}"),
        ],
        env=os.environ
        | {
            "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
            "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
            "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
            "IPYTHONDIR": str(tmp_path / "ipython"),
        },
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:

        def answers() -> bool:
            assert server.poll() is None, (tmp_path / "jupyter.log").read_text()
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_for(answers, "JupyterLab")
        yield f"http://127.0.0.1:{port}/lab/tree/04_pretraining.ipynb?token={TOKEN}"
    finally:
        server.terminate()
        try:
            server.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            server.kill()  # its kernel ends by itself, and with it the stage
            raise
        finally:
            log.close()
            shutil.copy(tmp_path / "jupyter.log", ARTIFACTS)


@pytest.fixture
def browser():
    needs(importlib.util.find_spec("playwright"), "playwright")
    needs(CHROMIUM, "Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = opened.new_context(viewport={"width": 1280, "height": 900})
        context.set_default_timeout(1000 * PATIENCE)
        yield context
        for number, page in enumerate(context.pages):  # how it looked in the end, or when it failed
            page.screenshot(path=ARTIFACTS / f"browser-last-{number}.png")
        opened.close()


class Chapter:
    """The chapter in one tab."""

    def __init__(self, browser, address: str, busy: bool = False):
        self.page = browser.new_page()
        self.page.goto(address, wait_until="domcontentloaded")
        self.page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=1000 * PATIENCE)
        if not busy:  # a busy kernel answers nobody: the status stays "Connecting" for long
            self.wait_until_idle()
        self.cell = self.page.locator(".jp-CodeCell").filter(has_text='launch.stage("base", run')
        self.figure = self.cell.locator(".jp-OutputArea-output img")

    def menu(self, name: str, entry: str) -> None:
        self.page.locator(".lm-MenuBar-itemLabel", has_text=name).filter(visible=True).first.click()
        self.page.locator(".lm-Menu-itemLabel", has_text=entry).filter(visible=True).first.click()

    def wait_until_idle(self) -> None:
        status = self.page.locator(".jp-StatusBar-Widget", has_text=re.compile(r"\| Idle"))
        status.first.wait_for(timeout=1000 * PATIENCE)

    def run_all(self) -> None:
        self.menu("Run", "Run All Cells")

    def restart_kernel(self) -> None:
        self.menu("Kernel", "Restart Kernel…")
        self.page.locator(".jp-Dialog button", has_text="Restart").last.click()

    def picture(self) -> str | None:
        """What the live figure shows now."""
        return self.figure.first.get_attribute("src") if self.figure.count() else None

    def screenshot(self, name: str) -> bytes:
        self.cell.scroll_into_view_if_needed()
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
def test_chapter_04_is_watched_closed_restarted_and_resumed(browser, lab, run):
    base = run.stage("base")
    chapter = Chapter(browser, lab)
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
    chapter = Chapter(browser, lab, busy=True)
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
