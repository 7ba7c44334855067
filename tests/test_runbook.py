"""A run's chapters as linked pages that need nothing else."""

import os
import re

import nbformat
import pytest
from nbformat import v4

from nanolib import runbook
from nanolib.rundir import Run

pytestmark = pytest.mark.filterwarnings("ignore:Your element with mimetype")  # it is left out
NAMES = ["00_first", "01_second", "02_third"]
PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'none'"
REMOTE = r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)\s*=\s*[\"']?(?:https?:)?//"


def chapter(run: Run, name: str, *cells) -> None:
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell(f"# {name} · `A` title"), *cells])
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    folder = run.path / "chapters"
    folder.mkdir(exist_ok=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")
    (folder / f"{name}.done.json").write_text("{}")


@pytest.fixture
def run() -> Run:
    run = Run.open("smoke")
    outputs = [
        v4.new_output("stream", text="printed <b>here</b>\n"),
        v4.new_output("display_data", {"image/png": PICTURE, "text/plain": "a figure"}),
        v4.new_output(
            "display_data",
            {
                "application/vnd.jupyter.widget-view+json": {"model_id": "1"},
                "application/javascript": "alert(1)",
                "text/html": "<p>a table</p>",
            },
        ),
        v4.new_output("display_data", {"application/javascript": "alert(2)"}),
    ]
    words = "See [the next](01_second.ipynb), [a paper](https://arxiv.org/abs/1) and $x^2$."
    code = v4.new_code_cell("print('hello')", outputs=outputs)
    chapter(run, "00_first", v4.new_markdown_cell(words), code)
    chapter(run, "01_second")
    chapter(run, "02_third")
    return run


def pages(run: Run) -> dict[str, str]:
    return {path.stem: path.read_text() for path in (run.path / "chapters").glob("*.html")}


def test_pages_load_nothing_and_their_links_exist(run):
    assert runbook.write(run, NAMES) == run.path / "chapters" / "index.html"
    found = pages(run)
    assert sorted(found) == [*NAMES, "index"]
    for text in found.values():
        assert "<script" not in text and "@import" not in text
        assert f'content="{POLICY}"' in text.split("<title>")[0]
        assert not re.search(REMOTE, text)
        for link in re.findall(r'href="([^"#]*)', text):
            assert link.startswith("https://") or (run.path / "chapters" / link).exists(), link


def test_links_between_pages(run):
    runbook.write(run, NAMES)
    links = {name: re.findall(r'href="(\w+)\.html"', text) for name, text in pages(run).items()}
    assert links["index"] == NAMES
    assert links["00_first"] == ["index", "01_second", "01_second", "index", "01_second"]
    assert links["01_second"] == ["00_first", "index", "02_third"] * 2
    assert links["02_third"] == ["01_second", "index"] * 2


def test_what_a_page_shows(run):
    runbook.write(run, NAMES)
    text = pages(run)["00_first"]
    assert f"data:image/png;base64,{PICTURE}" in text and "a figure" not in text
    assert "printed &lt;b&gt;here" in text and "<p>a table</p>" in text and "alert" not in text
    assert "x^2" in text and "hello" in text


def test_the_first_page(run):
    run.stage("base").path.mkdir()
    run.stage("base").finish({"parameters": 12345, "validation_bpb": 0.98765}, seconds=61.0)
    run.stage("mid").finish({}, seconds=500.0, taken_over="demo")
    (run.path / "report.md").write_text("| a | b |\n|---|---|\n| 1 | <script>x</script> |\n")
    text = runbook.write(run, NAMES).read_text()
    assert "12,345" in text and "0.988" in text and "1:01" in text
    assert "<td>1</td>" in text and "<script" not in text and "00_first · A title" in text
    (run.path / "chapters" / "02_third.done.json").unlink()
    text = runbook.write(run, NAMES).read_text()
    assert "02_third: not executed yet" in text and 'href="02_third.html"' not in text


def test_a_page_is_written_again_only_when_it_must(run):
    runbook.write(run, NAMES)
    paths = {name: run.path / "chapters" / f"{name}.html" for name in NAMES}
    for path in paths.values():
        os.utime(path, (2e9, 2e9))
    os.utime(run.path / "chapters" / "02_third.ipynb", (2.1e9, 2.1e9))
    runbook.write(run, [*NAMES, "03_fourth"][1:])  # 01_second has no page before it now

    def written(name: str) -> bool:
        return paths[name].stat().st_mtime != 2e9

    assert [written(name) for name in NAMES] == [False, True, True]


def test_terms_are_a_page_of_their_own_that_chapters_link_to(run):
    folder = run.path / "chapters"
    words = "A [token](glossary.ipynb#kv-cache), see [all](glossary.ipynb)."
    chapter(run, "02_third", v4.new_markdown_cell(words))
    terms = v4.new_markdown_cell("# Glossary\n\n### kv cache\n\nSee [chapter](01_second.ipynb).")
    nbformat.write(v4.new_notebook(cells=[terms]), folder / "glossary.ipynb")
    runbook.write(run, NAMES)
    found = pages(run)
    assert 'href="glossary.html#kv-cache"' in found["02_third"]
    assert 'href="glossary.html"' in found["02_third"] and 'href="glossary.html"' in found["index"]
    assert 'id="kv-cache"' in found["glossary"] and 'href="01_second.html"' in found["glossary"]
    os.utime(folder / "glossary.html", (2e9, 2e9))
    runbook.write(run, NAMES)
    assert (folder / "glossary.html").stat().st_mtime == 2e9


def test_the_first_page_draws_the_whole_run_and_says_what_is_to_be_seen(run):
    assert "<img" not in runbook.write(run, NAMES).read_text()
    for name in ("base", "grpo"):
        run.stage(name).path.mkdir()
    for step in range(40):
        run.stage("base").metrics.append(kind="train", step=step + 1, loss=5.0 - step / 10)
        run.stage("grpo").metrics.append(kind="rollout", step=step, reward=step / 40)
        run.stage("grpo").metrics.append(kind="train", step=step, loss=7.0)
    text = runbook.write(run, NAMES).read_text()
    (alt,) = re.findall(r'<img src="data:image/png;base64,iVBOR[^"]+" alt="([^"]+)"', text)
    assert alt == (
        "Curves, one a stage. base: training loss from 4.95 to 1.15 in 40 steps; "
        "grpo: mean reward from 0.01 to 0.96 in 39 steps."
    )


def test_parameters_are_shown_once_as_they_were_run(run):
    written = v4.new_code_cell("profile = 'demo'", metadata={"tags": ["parameters"]})
    injected = v4.new_code_cell("profile = 'smoke'", metadata={"tags": ["injected-parameters"]})
    chapter(run, "01_second", written, injected)
    runbook.write(run, NAMES)
    text = pages(run)["01_second"]
    assert "smoke" in text and "demo" not in text


def test_pages_have_a_light_and_a_dark_scheme(run):
    runbook.write(run, NAMES)
    for text in pages(run).values():
        assert "color-scheme: light dark" in text
        style = text.split("<style>")[1].split("</style>")[0]
        dark = style.split("prefers-color-scheme: dark")[1]
        names = set(re.findall(r"var\((--\w+)\)", style))
        assert names and all(style.count(f"{name}:") == 2 for name in names)
        assert "--paper: #15181d" in dark
    assert ".highlight .k " in pages(run)["00_first"].split("prefers-color-scheme: dark")[1]
