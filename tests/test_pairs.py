"""Chapters and their .ipynb twins: refreshed to the same bytes, compared cell by cell."""

import shutil

import nbclient
import nbformat
import pytest

from nanolib import pipeline
from nanolib.config import REPOSITORY
from nanolib.rundir import Run
from notebooks import colab, pairs

CHAPTER = """# %% [markdown]
# # A chapter

# %% tags=["parameters"]
profile = "demo"
run = None
overrides = {}

# %%
import datetime
import ipywidgets
import lesson
this = lesson.begin(profile, run, overrides)
print(this.path, object(), datetime.datetime.now(datetime.UTC).isoformat())

# %%
ipywidgets.IntSlider()

# %%
6 * 7
"""


@pytest.fixture
def chapter(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(pipeline, "NOTEBOOKS", folder)
    (folder / "00_only.py").write_text(CHAPTER)
    shutil.copy(REPOSITORY / "notebooks" / "lesson.py", folder)
    return folder / "00_only.py"


def test_a_refresh_twice_gives_the_same_bytes(chapter):
    with pytest.raises(ValueError, match=r"00_only: it has no \.ipynb .*--refresh"):
        pairs.check()
    pairs.refresh()
    twin = chapter.with_suffix(".ipynb")
    first = twin.read_bytes()
    shutil.rmtree(Run.load("demo").path)
    pairs.refresh()
    assert twin.read_bytes() == first
    pairs.check()
    notebook = nbformat.read(twin, as_version=4)
    nbformat.validate(notebook)
    outputs = [c.outputs for c in notebook.cells if c.cell_type == "code"]
    assert outputs[1][0].text.splitlines()[1] == "runs/out/demo <object object at 0x…> (date)"
    assert outputs[2] == [] and outputs[3][0].data == {"text/plain": "42"}
    assert notebook.metadata == {"kernelspec": pairs.KERNEL}


def test_an_executed_copy_runs_in_its_own_folder(chapter):
    """As a reader opens it in JupyterLab, whose kernels start where the notebook is."""
    copy = pipeline.run("smoke").path / "chapters" / "00_only.ipynb"
    notebook = nbformat.read(copy, as_version=4)
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": copy.parent}}).execute()
    assert "run smoke: depth 2" in str(notebook.cells)
    assert (copy.parent / "lesson.py").read_bytes() == (chapter.parent / "lesson.py").read_bytes()


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("6 * 7", "6 * 8", "00_only: cell 4 differs"),
        ("# # A chapter", "# # The chapter", "cell 0 differs"),
        ("\n# %%\n6 * 7\n", "", r"the \.py has 4 cells, the \.ipynb 5"),
    ],
)
def test_twins_that_differ_are_named(chapter, old, new, message):
    twin = nbformat.v4.new_notebook(cells=pipeline.read(chapter).cells)
    nbformat.write(twin, chapter.with_suffix(".ipynb"))
    pairs.check()
    chapter.write_text(CHAPTER.replace(old, new))
    with pytest.raises(ValueError, match=message):
        pairs.check()


def test_lonely_and_heavy_twins_are_named(chapter, monkeypatch):
    twin = nbformat.v4.new_notebook(cells=pipeline.read(chapter).cells)
    nbformat.write(twin, chapter.with_suffix(".ipynb"))
    nbformat.write(twin, chapter.with_name("07_lost.ipynb"))
    with pytest.raises(ValueError, match=r"07_lost\.ipynb has no \.py"):
        pairs.check()
    monkeypatch.setattr(pairs, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match=r"has [\d,]+ bytes, more than 100"):
        pairs.check()


def test_a_badge_is_put_before_a_chapter_and_its_twin_once(chapter, monkeypatch):
    nbformat.write(
        nbformat.v4.new_notebook(cells=pipeline.read(chapter).cells), chapter.with_suffix(".ipynb")
    )
    pairs.put_badges()
    monkeypatch.setattr(pairs, "REPOSITORY", "https://example.org/someone/course")
    pairs.put_badges()
    text = chapter.read_text()
    assert text == pairs.badge(chapter) + CHAPTER
    assert "/github/someone/course/blob/main/notebooks/00_only.ipynb)" in text
    pairs.check()


def test_jupyterlab_folds_solutions_and_the_set_up_alone(tmp_path):
    source = tmp_path / "07_only.py"
    kinds = ("colab", "exercise", "solution-twin", "loop")
    source.write_text("".join(f'# %% tags=["{tag}"]\n1\n\n' for tag in kinds))
    twin = pairs._plain(source)
    nbformat.validate(twin)
    folded = [cell.metadata.get("jupyter") == {"source_hidden": True} for cell in twin.cells]
    assert folded == [True, False, True, False]


def test_colab_is_asked_for_what_is_missing_alone(monkeypatch):
    monkeypatch.setattr(colab, "installed", lambda name: name not in ("tyro", "rust-tokenizer"))
    (requirement,) = colab.missing()
    assert requirement.startswith("tyro==")
    called = []
    monkeypatch.setattr(
        colab, "pip", lambda *words: called.append(words) or "--no-index" not in words
    )
    colab.install()
    crate = (str(REPOSITORY / "rust_tokenizer"),)
    assert called[0] == (requirement,) and called[1][-1] == "rust-tokenizer"
    assert called[2:] == [crate, ("--no-deps", "--editable", str(REPOSITORY))]


def test_minutes_count_words_code_and_exercises(chapter):
    words = "\n".join(["# word"] * 1600)
    exercise = "# **Exercise 0.1 ★★ · 22 minutes · build** Do it.\n# <details>" + " w" * 900
    code = "\n".join(f"a = {n}" for n in range(30))
    practice = '# %% tags=["exercise"]\n' + "b = 1\n" * 300
    chapter.write_text(
        f"{CHAPTER}\n# %% [markdown]\n{words}\n#\n{exercise}</details>\n# %%\n{code}\n\n{practice}"
    )
    assert pairs.minutes(chapter) == (10, 20)  # 8 for words, 2.8 for code; 22


def test_of_a_figures_metadata_its_words_are_kept():
    about = {"image/png": {"alt": "a line", "width": 3}, "text/html": {"x": 1}, "isolated": True}
    output = nbformat.v4.new_output("display_data", {"image/png": "aGk="}, metadata=about)
    kept = pairs._output(output, 1, Run.open("smoke"))
    assert kept.metadata == {"image/png": {"alt": "a line"}}
