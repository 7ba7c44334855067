"""A chain of small chapters, which only launch stages, and the command that runs it.

After the chapter's beginning `this` is the run; its stages are those of the worker named.
"""

BEGINNING = """# %% tags=["parameters"]
profile = "demo"
run = None
overrides = {{}}

# %%
from nanolib import launch
from nanolib.rundir import Run

launch.WORKER = "tests.{worker}"
this = Run.open(profile, run, overrides)

# %%
"""
COMMAND = """
import sys
from pathlib import Path
from nanolib import pipeline
from nanolib.ui import cli
pipeline.NOTEBOOKS = Path(sys.argv[1])
sys.exit(cli.main(sys.argv[2:]))
"""


def chapter(worker: str, body: str) -> str:
    """The text of a chapter whose stages are worked by tests/WORKER.py."""
    return BEGINNING.format(worker=worker) + body
