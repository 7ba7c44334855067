"""What the browser tests share: Chromium, a JupyterLab of their own, one notebook in a tab.

Screenshots go to tests/artifacts/, to be looked at.
"""

from __future__ import annotations

import contextlib
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
from nbformat import NotebookNode

from nanolib.config import REPOSITORY

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
        time.sleep(0.05)


@contextlib.contextmanager
def chromium(name: str) -> Iterator:
    """A browser's context. In the end, or at a failure, NAME-last-N.png shows its pages."""
    needs(importlib.util.find_spec("playwright"), "playwright")
    needs(CHROMIUM, "Chromium")
    from playwright.sync_api import sync_playwright

    ARTIFACTS.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = opened.new_context(viewport={"width": 1280, "height": 900})
        context.set_default_timeout(1000 * PATIENCE)
        try:
            yield context
        finally:
            for number, page in enumerate(context.pages):
                page.screenshot(path=ARTIFACTS / f"{name}-last-{number}.png")
            opened.close()


@contextlib.contextmanager
def jupyterlab(notebook: NotebookNode, home: Path) -> Iterator[str]:
    """JupyterLab with one notebook and the chapters' helpers beside it; the notebook's address.

    All files are under `home`.
    """
    ARTIFACTS.mkdir(exist_ok=True)
    chapters = shutil.ignore_patterns("[0-9]*", "__pycache__")
    shutil.copytree(REPOSITORY / "notebooks", home / "notebooks", ignore=chapters)
    nbformat.write(notebook, home / "notebooks/chapter.ipynb")
    for name, values in SETTINGS.items():
        file = home / "settings/@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = (home / "jupyter.log").open("w")
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
            *("--ip=127.0.0.1", f"--port={port}"),
            *(f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={home / 'notebooks'}"),
        ],
        env=os.environ
        | {
            "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
            "JUPYTER_CONFIG_DIR": str(home / "config"),
            "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
            "IPYTHONDIR": str(home / "ipython"),
        },
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:

        def answers() -> bool:
            assert server.poll() is None, (home / "jupyter.log").read_text()
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_for(answers, "JupyterLab")
        yield f"http://127.0.0.1:{port}/lab/tree/chapter.ipynb?token={TOKEN}"
    finally:
        server.terminate()
        try:
            server.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            server.kill()  # its kernel ends by itself, and with it what it started
            raise
        finally:
            log.close()
            shutil.copy(home / "jupyter.log", ARTIFACTS)


class Tab:
    """A notebook in a tab of the browser."""

    def __init__(self, browser, address: str, busy: bool = False):
        self.page = browser.new_page()
        self.page.goto(address, wait_until="domcontentloaded")
        self.page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=1000 * PATIENCE)
        if not busy:  # a busy kernel answers nobody: the status stays "Connecting" for long
            self.wait_until_idle()

    def cell(self, text: str):
        """The code cell with that text in it."""
        return self.page.locator(".jp-CodeCell").filter(has_text=text)

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
