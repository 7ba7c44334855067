"""The chapters: pairs in step, the agreed form, and all of them executed in profile smoke."""

import json
import re
import shutil
from pathlib import Path

import jupytext
import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest

import checks
from nanolib import config, launch, pipeline
from nanolib.rundir import Run
from nanolib.stages import worker
from notebooks import pairs

matplotlib.use("Agg")

CHAPTERS = pipeline.chapters()
PARAMETERS = 'profile = "demo"\nrun = None\noverrides = {}'
LONGEST_CELL = 16  # lines of code, imports and blank lines not counted
LONGEST_LOOP = 25  # of an exercise, and of a training loop that is to be seen whole
EVIDENCE = r"\b(print|assert|assert_close)\b|plt\.show|lesson\.|launch\.stage|session\.ask|verify"
CHAIN_WORKS = ("base", "eval/base", "report")  # the stages that the chain below starts workers for

GLOSSARY = pipeline.NOTEBOOKS / "glossary.py"
each_chapter = pytest.mark.parametrize("source", CHAPTERS, ids=[path.stem for path in CHAPTERS])


def code_cells(notebook) -> list:
    """All but the first, which installs the course in Colab."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in cells if "colab" not in tags(cell)]


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


# ---------------------------------------------------------------------------- form


def test_the_chapters_of_the_course_are_there():
    assert {path.stem for path in CHAPTERS} >= {
        "00_tour",
        "01_tokenizer",
        "02_model",
        "03_muon",
        "04_pretraining",
        "05_inference",
        "06_midtraining",
        "07_sft",
        "08_grpo",
        "09_chat",
    }


@pytest.mark.parametrize("source", [*CHAPTERS, GLOSSARY], ids=lambda path: path.stem)
def test_the_pair_is_in_step(source):
    """.py and .ipynb hold the same cells (`jupytext --diff` exits 0 on differences)."""
    script = jupytext.reads(source.read_text(), fmt="py:percent")
    notebook = jupytext.reads(source.with_suffix(".ipynb").read_text(), fmt="ipynb")
    for one, other in zip(script.cells, notebook.cells, strict=True):
        assert one.cell_type == other.cell_type
        assert one.source == other.source
        assert tags(one) == tags(other)


@each_chapter
def test_the_notebook_names_its_kernel_and_holds_no_error(source):
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    for version in (notebook, jupytext.read(source)):
        assert version.metadata.kernelspec.name == "python3"
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert source.with_suffix(".ipynb").stat().st_size <= pairs.MAX_BYTES == 700_000


@each_chapter
def test_a_chapter_begins_with_one_click_in_the_browser(source):
    """`python notebooks/pairs.py badges` writes these two cells."""
    assert source.read_text().count(pairs.badge(source)) == 1
    link, install = jupytext.read(source.with_suffix(".ipynb")).cells[:2]
    assert f"/blob/main/notebooks/{source.stem}.ipynb)" in link.source
    assert tags(install) == ["colab"] and pairs.REPOSITORY in install.source


@each_chapter
def test_parameters_come_first_and_open_the_run(source):
    first, second, *_ = code_cells(jupytext.read(source))
    assert first.source == PARAMETERS and tags(first) == ["parameters"]
    assert "run = lesson.begin(profile, run, overrides)" in second.source


@each_chapter
def test_a_cell_is_short_and_ends_in_evidence(source):
    for cell in code_cells(jupytext.read(source))[1:]:
        lines = [line for line in cell.source.splitlines() if line.strip()]
        lines = [line for line in lines if not re.match(r"(import|from)\s", line)]
        longest = LONGEST_LOOP if {"exercise", "open", "loop"} & set(tags(cell)) else LONGEST_CELL
        assert len(lines) <= longest, f"{len(lines)} lines:\n{cell.source}"
        is_text = cell.source.startswith("worker =")  # 00's program in a string, run by the next
        assert is_text or re.search(EVIDENCE, cell.source) or cell.source.startswith(("@", "def"))


@each_chapter
def test_a_chapter_says_what_how_long_and_what_to_read(source):
    text = "\n".join(c.source for c in jupytext.read(source).cells if c.cell_type == "markdown")
    for phrase in ("**You will learn**", "**You need**", "**Takes**", "## To read", "In the code:"):
        assert phrase in text, phrase
    assert re.search(r"arXiv:\d{4}\.\d{5}\]\(https://arxiv\.org/abs/\d{4}\.\d{5}\)", text)


@each_chapter
def test_a_chapter_asserts_its_small_version_and_draws(source):
    code = "\n".join(cell.source for cell in code_cells(jupytext.read(source)))
    assert re.search(r"assert_close\(|assert .* == ", code)
    pictures = r'lesson\.(show|frames)\(|launch\.stage\("base"'
    assert len(re.findall(pictures, code)) >= 2
    assert "plt.show()" not in code, "lesson.show(alt) shows a figure with its alt text"


@pytest.mark.parametrize("source", [*CHAPTERS, GLOSSARY], ids=lambda path: path.stem)
def test_links_to_chapters_and_terms_lead_somewhere(source):
    terms = {term.replace(" ", "-") for term in glossary_terms()}
    for file, anchor in re.findall(r"\]\(([\w./]+\.ipynb)(?:#([^)]*))?\)", source.read_text()):
        assert (pipeline.NOTEBOOKS / file).exists(), file
        assert file != "glossary.ipynb" or anchor is None or anchor in terms | {""}, anchor


def glossary_terms() -> list[str]:
    return re.findall(r"^# ### (.+)$", GLOSSARY.read_text(), re.M)


@each_chapter
def test_a_chapter_asks_only_for_tasks_that_every_profile_has(source):
    """The toy world's own tasks are missing in real data: a cell that names one looks first."""
    profiles = [config.resolve(name).recipe.eval.tasks for name in config.profiles()]
    own = set().union(*profiles) - set.intersection(*map(set, profiles))
    assert "facts" in own
    for cell in jupytext.read(source).cells:
        named = [name for name in own if cell.cell_type == "code" and f'"{name}"' in cell.source]
        assert not named or "eval.tasks" in cell.source, (named, cell.source)


def test_the_glossary_is_in_order_and_short():
    """Lower-case headings become the same anchor in JupyterLab, on the web and in the run book."""
    terms = glossary_terms()
    assert terms == sorted(set(terms)) and len(terms) >= 60
    assert all(re.fullmatch(r"[a-z0-9 -]+", term) for term in terms)
    for entry in GLOSSARY.read_text().split("# ### ")[1:]:
        assert 5 <= len(entry.split()) <= 80, entry
    assert not code_cells(jupytext.read(GLOSSARY))


# ---------------------------------------------------------------------------- exercises, minutes


def exercises(source) -> list[re.Match]:
    return list(pairs.HEADING.finditer(source.read_text()))


@each_chapter
def test_a_chapter_has_four_to_six_exercises_and_half_of_them_build(source):
    found, chapter = exercises(source), source.stem[:2]
    assert [f"{int(chapter)}.{place + 1}" for place in range(len(found))] == [
        f"{one[1]}.{one[2]}" for one in found
    ]
    assert 4 <= len(found) <= 6
    assert 2 * sum(one[5] == "build" for one in found) >= len(found)
    checked = {f"{one[1]}.{one[2]}" for one in found if one[5] != "open"}
    assert checked == set(checks.exercises(f"{int(chapter)}.1"))


@each_chapter
def test_two_hints_unfold_before_a_solution(source):
    cells = jupytext.read(source).cells
    for number, cell in enumerate(cells):
        if "exercise" in tags(cell):
            folds = re.findall(r"<summary>(.*?)</summary>", cells[number + 1].source)
            assert folds[:3] == ["Hint 1", "Hint 2", "Solution"], cell.source
            hints = cells[number + 1].source.split("<summary>Solution")[0]
            assert "`" not in hints, f"inside HTML Markdown stays raw, write <code>: {hints}"


@each_chapter
def test_the_minutes_a_chapter_names_are_counted(source):
    """Words / 200 + 4 s a line of code, and the exercises' own minutes: to the next five."""
    head = next(c.source for c in jupytext.read(source).cells if "**Takes**" in c.source)
    told = re.search(
        r"\*\*Takes\*\* (\d+)\s+minutes\s+to\s+read\s+and\s+run,\s+(\d+)\s+more\s+with\s+the\s+exercises",
        head,
    )
    assert told, head
    assert (int(told[1]), int(told[2])) == pairs.minutes(source)


@each_chapter
def test_readme_names_the_same_minutes(source):
    readme = (pipeline.NOTEBOOKS.parent / "README.md").read_text()
    row = next(line for line in readme.splitlines() if f"[{source.stem}](" in line)
    assert row.split("|")[-2].strip() == "{} + {}".format(*pairs.minutes(source)), row


@each_chapter
def test_a_committed_figure_has_words_for_who_cannot_see_it(source):
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    for output in outputs:
        if "image/png" in output.get("data", {}):
            assert len(output.metadata.get("image/png", {}).get("alt", "")) >= 30, (
                output.data.keys()
            )


# ---------------------------------------------------------------------------- the chain


@pytest.fixture(scope="module")
def chain(finished_run, tmp_path_factory):
    """All chapters in profile smoke through the real pipeline, in kernels, on two ranks: the run.

    A process for each stage would take longer than the lessons: most are taken over, finished.
    tests/test_faults.py starts real workers of every stage.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOLIB_RUNS", str(tmp_path_factory.mktemp("chain")))
        begun = Run.open("smoke")
        for done in finished_run.path.glob("**/done.json"):
            name = str(done.parent.relative_to(finished_run.path))
            if name not in CHAIN_WORKS:
                shutil.copytree(done.parent, begun.path / name)
        yield pipeline.run("smoke", None, {"machine.ranks": 2})


@pytest.mark.slow
def test_the_chain_finishes_the_run_in_the_order_of_the_chapters(chain):
    for name in CHAIN_WORKS:
        done = json.loads((chain.path / name / "done.json").read_text())
        assert done["machine"]["ranks"] == (1 if name == "report" else 2)
    records = [chain.path / "chapters" / f"{source.stem}.done.json" for source in CHAPTERS]
    times = [json.loads(record.read_text())["finished"] for record in records]
    assert times == sorted(times)
    assert (chain.path / "report.md").read_text().startswith("# Report card")


@pytest.mark.slow
@each_chapter
def test_an_executed_chapter_has_pictures_and_a_page(chain, source):
    executed = nbformat.read(chain.path / "chapters" / f"{source.stem}.ipynb", as_version=4)
    outputs = [output for cell in code_cells(executed) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 2
    assert all(len(o.metadata["image/png"]["alt"]) >= 30 for o in pictures)
    assert (chain.path / "chapters" / f"{source.stem}.html").stat().st_size > 100_000


@pytest.mark.slow
def test_the_live_figure_is_one_output_that_ends_finished(chain):
    executed = nbformat.read(chain.path / "chapters" / "04_pretraining.ipynb", as_version=4)
    (cell,) = [c for c in executed.cells if 'launch.stage("base"' in c.source]
    pictures = [o for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 1
    assert pictures[0].data["text/plain"].startswith("base ")
    assert " done in " in pictures[0].data["text/plain"]


@pytest.mark.slow
def test_a_finished_chain_is_not_executed_again(chain, monkeypatch, capsys):
    monkeypatch.setenv("NANOLIB_RUNS", str(chain.path.parent))
    before = (chain.path / "chapters" / "04_pretraining.ipynb").stat().st_mtime_ns
    pipeline.run("smoke")
    assert (chain.path / "chapters" / "04_pretraining.ipynb").stat().st_mtime_ns == before
    assert capsys.readouterr().out.count("finished before") == len(CHAPTERS)


# ---------------------------------------------------------------------------- alone, and solved


def solved(notebook) -> list[str]:
    """The code of every cell; exercises are answered by the solution that follows them.

    An open question has no check and stays as it is.
    """
    sources, cells = [], notebook.cells
    for number, cell in enumerate(cells):
        if cell.cell_type != "code":
            continue
        source = cell.source
        if "exercise" in tags(cell):
            _, found, text = cells[number + 1].source.partition("<summary>Solution</summary>")
            assert found, source
            (answer,) = re.findall(r"```python\n(.*?)```", text.split("</details>")[0], re.DOTALL)
            source = answer + source[re.search(r"^checks\.verify\(", source, re.M).start() :]
        sources.append(source)
    return sources


@pytest.fixture
def stages_taken_over(finished_run, monkeypatch):
    """Stages are launched as always, but their work is copied from a finished run."""

    def work(run, place, *_):
        if place.name == "report":  # reads the rest of the run, and is written beside it
            worker.work("report", run)
            return
        done = finished_run.path / place.path.relative_to(run.path)
        shutil.copytree(done, place.path, dirs_exist_ok=True)

    monkeypatch.setattr(launch, "_work", work)
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))


@pytest.mark.slow
@each_chapter
def test_a_chapter_runs_alone_in_plain_text_and_its_solutions_are_right(
    source, stages_taken_over, capsys
):
    """From nothing: a run without stages, no notebook around."""
    notebook = pipeline.read(source)
    names: dict = {}
    for code in solved(notebook):
        code = 'profile, run, overrides = "smoke", None, {}' if code == PARAMETERS else code
        exec(compile(code, str(source), "exec"), names)
    out = capsys.readouterr().out
    exercises = sum("exercise" in tags(cell) for cell in notebook.cells)
    assert exercises >= 2
    assert out.count("✓ right") == exercises, out
    assert isinstance(names["run"], Run)


def test_an_unsolved_exercise_has_a_place_to_write():
    """Each stub is told from a wrong answer, so that a reader knows where to write."""
    for source in CHAPTERS:
        for cell in jupytext.read(source).cells:
            if "exercise" in tags(cell):
                stub, check = re.split(r"^checks\.verify\(", cell.source, flags=re.M)
                assert re.search(r"^\s+\.\.\.$|return \.\.\.|= \.\.\.", stub, re.M), cell.source
                assert check


def test_committed_outputs_are_of_the_demo():
    """Outputs, where there are any, come from profile demo (`nanolib notebooks --refresh`)."""
    for source in CHAPTERS:
        notebook = json.loads(Path(source.with_suffix(".ipynb")).read_text())
        printed = json.dumps([cell.get("outputs", []) for cell in notebook["cells"]])
        assert "run smoke:" not in printed and "/tmp/" not in printed
