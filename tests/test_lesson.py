"""What chapters share: the live figure and its twin, pictures, exercise checks."""

import io
import re
import subprocess
import sys
from types import SimpleNamespace

import ipywidgets
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import lesson
from nanolib.config import REPOSITORY
from nanolib.rundir import Run, StageDir

matplotlib.use("Agg")


@pytest.fixture
def notebook(monkeypatch):
    """Pretend that a kernel runs us; collects what is displayed, and what replaces it in place."""
    shown = []

    class Handle:
        def __init__(self):
            self.versions, self.alt = [], None
            shown.append(self)

        def display(self, bundle, raw, metadata=None):
            self.versions.append(bundle)
            self.alt = (metadata or {}).get("image/png", {}).get("alt")

        update = display

    def display(bundle, raw, metadata=None):
        Handle().display(bundle, raw, metadata)

    monkeypatch.setattr(lesson, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.DisplayHandle", Handle)
    monkeypatch.setattr("IPython.display.display", display)
    return shown


@pytest.fixture
def stage(tmp_path) -> StageDir:
    return StageDir("base", tmp_path / "base")


def rows(count: int, steps: int = 50) -> list[dict]:
    train = [
        {"kind": "train", "step": s + 1, "steps": steps, "loss": 5 / (s + 1)} for s in range(count)
    ]
    return [*train, {"kind": "eval", "step": count, "bpb": 1.5}]


def test_importing_lesson_imports_nothing_heavy():
    code = (
        "import sys, lesson; "
        "heavy = {'torch', 'matplotlib', 'IPython', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY / "notebooks")


def test_the_library_does_without_the_chapters():
    imports = re.compile(r"^\s*(import|from) (lesson|pairs|notebooks|runs)\b", re.MULTILINE)
    found = [
        path for path in (REPOSITORY / "nanolib").rglob("*.py") if imports.search(path.read_text())
    ]
    assert found == []


# ---------------------------------------------------------------------------- begin


def test_begin_opens_the_run_and_keeps_it_when_the_cell_runs_again(capsys):
    first = lesson.begin("smoke", None, {})
    again = lesson.begin("smoke", first, {})
    assert isinstance(first, Run) and again is first
    assert "depth 2, width 32, vocabulary 512, 57,344 parameters" in capsys.readouterr().out


def test_a_large_models_lessons_have_more_threads(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    lesson.begin("smoke", None, {})
    assert torch.get_num_threads() == 1
    monkeypatch.setattr(lesson, "LARGE", 1)
    lesson.begin("smoke", None, {})
    assert torch.get_num_threads() == 3


def test_begin_passes_a_users_mistake_on():
    with pytest.raises(ValueError, match=r"model\.dept"):
        lesson.begin("smoke", None, {"model.dept": 3})


# ---------------------------------------------------------------------------- the live figure


def test_live_redraws_one_figure_in_place_and_seldom(notebook, stage, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(lesson, "time", SimpleNamespace(monotonic=lambda: now[0]))
    live = lesson.Live(every=2.0)
    for count in range(1, 41):  # eight looks a second for five seconds
        live(stage, rows(count))
        now[0] += 0.125
    (figure,) = notebook
    assert len(figure.versions) == 3
    pictures = [bundle["image/png"] for bundle in figure.versions]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert len(set(pictures)) == 3
    assert "33/50" in figure.versions[-1]["text/plain"]
    assert figure.alt.startswith("Two plots over 33 steps. Training loss: 5.00 to ")
    assert figure.alt.endswith("; held-out bpb: 1.500 to 1.500.")


def test_live_always_draws_the_end(notebook, stage):
    live = lesson.Live(every=1000.0)
    live(stage, rows(3))
    live(stage, rows(4))
    stage.finish({"tokens": 1234, "tokens_per_second": 10.0}, seconds=65.0)
    live(stage, rows(5))
    (figure,) = notebook
    assert len(figure.versions) == 2
    assert figure.versions[-1]["text/plain"].endswith("done in 1:05")


def test_live_gives_each_stage_an_output_of_its_own(notebook, stage, tmp_path):
    other = StageDir("eval", tmp_path / "eval" / "sft")
    live = lesson.Live()
    live(stage, rows(2))
    live(other, [{"kind": "progress", "step": 1, "steps": 3, "message": "mmlu"}])
    first, second = notebook
    assert "image/png" in first.versions[0]
    assert second.versions[0] == {"text/plain": "eval of sft  1/3  mmlu"}


def test_live_prints_lines_outside_a_notebook(stage, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    lesson.Live()(stage, rows(7))
    assert "7/50" in out.getvalue() and "bpb 1.500" in out.getvalue()


def test_curves_show_what_is_left_and_both_scores():
    figure = lesson.curves(rows(10), "base")
    left, right = figure.axes
    assert left.get_xlim() == pytest.approx((0, 52.5)) == right.get_xlim()
    assert [len(line.get_xdata()) for line in left.lines] == [10, 10]
    assert "held-out bits per byte" in {right.get_title(loc="left"), right.get_title()}
    assert right.lines[0].get_ydata().tolist() == [1.5]
    (legend,) = figure.legends  # beside the plots, on no curve
    assert [text.get_text() for text in legend.get_texts()] == ["bpb 1.500"]


def test_a_loss_weighted_by_advantages_is_not_called_nats():
    left, _ = lesson.curves([*rows(3), {"kind": "rollout", "step": 1, "reward": 0.5}]).axes
    assert "advantage" in left.get_title(loc="left") and "nats" not in left.get_title(loc="left")


def test_curves_show_every_held_out_loss():
    scored = [
        {"kind": "eval", "step": step, "smoltalk_loss": 3.0 - step, "gsm8k_loss": 1.0}
        for step in range(3)
    ]
    trained = [row for row in rows(10) if row["kind"] == "train"]
    figure = lesson.curves(trained + scored)
    _, right = figure.axes
    assert right.get_title(loc="left") + right.get_title() == "held-out loss (nats a token)"
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told == ["smoltalk 3.000 → 1.000", "gsm8k 1.000 → 1.000"]
    assert right.lines[0].get_xydata().tolist() == [[0, 3], [1, 2], [2, 1]]


def test_smooth_is_a_moving_average_with_an_unbiased_start():
    values = np.random.default_rng(0).normal(size=30).tolist()
    for keep in (0.0, 0.5, 0.9):
        weights = [[keep ** (t - s) for s in range(t + 1)] for t in range(30)]
        naive = [float(np.average(values[: t + 1], weights=weights[t])) for t in range(30)]
        assert lesson.smooth(values, keep) == pytest.approx(naive)


# ---------------------------------------------------------------------------- pictures


def test_tokens_are_escaped_and_keep_their_text_twin(notebook):
    lesson.tokens(["<|bos|>", "<b>hi</b>", " you\n", "$x$"], groups=[0, 1, 1, 0], legend=["a", "b"])
    (output,) = notebook
    bundle = output.versions[0]
    assert bundle["text/plain"] == "<|bos|>|<b>hi</b>| you\n|$x$"
    assert "&lt;|bos|&gt;" in bundle["text/html"] and "<b>" not in bundle["text/html"]
    assert bundle["text/html"].count("<br>") == 1 and "·you↵" in bundle["text/html"]
    assert bundle["text/html"].count("<span") == 6


def test_tokens_shade_by_value_and_hide_a_dark_page(notebook):
    lesson.tokens(["a", "b", "c"], shades=[0.0, 0.25, 7.0])
    page = notebook[0].versions[0]["text/html"]
    white, pale, red = "255, 255, 255", "247, 211, 206", "221, 80, 60"
    assert re.findall(r"background:rgb\(([\d, ]+)\)", page) == [white, pale, red]


def test_tokens_have_kinds_by_colour_and_by_line_and_numbers_below(notebook):
    lesson.tokens(
        ["2", "+1", "<3>"], kinds=["program", "program", "forced"], numbers=[0.5, None, "x"]
    )
    bundle = notebook[0].versions[0]
    assert bundle["text/plain"] == "[program] 2 (0.50)|+1 [forced] <3> (x)"
    looks = re.findall(r"background:(#\w+);border-bottom:3px (\w+)", bundle["text/html"])
    program, forced = ("#d3f2df", "dotted"), ("#fde7c8", "dashed")
    assert looks == [program, program, forced, forced, program]
    texts = [text for text in re.findall(r">([^<>]+)<", bundle["text/html"]) if text.strip()]
    below = ["forced: a tool&#x27;s result", "program: Python to run"]
    assert texts == ["2", "0.50", "+1", "&lt;3&gt;", "x", *below]


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="chosen, forced, program, masked; got 'chose'"):
        lesson.tokens(["a"], kinds=["chose"])


def test_kinds_differ_in_every_look_they_have():
    for looks in (lesson.KINDS.values(), lesson.HATCHES.items()):
        for parts in zip(*looks, strict=True):
            assert len(set(parts)) == len(parts) == 4


def test_tokens_and_markdown_print_outside_a_notebook(capsys):
    lesson.tokens(["to", "ken"])
    lesson.markdown("# card")
    assert capsys.readouterr().out == "to|ken\n# card\n"


def test_show_gives_a_figure_its_words_and_closes_it(notebook, monkeypatch, capsys):
    figure, _ = plt.subplots()
    lesson.show("a square")
    (output,) = notebook
    assert output.alt == "a square" and output.versions[0]["text/plain"] == "[figure] a square"
    assert output.versions[0]["image/png"].startswith(b"\x89PNG")
    assert not plt.fignum_exists(figure.number)
    with pytest.raises(ValueError, match="there is no figure to show"):
        lesson.show("nothing")
    monkeypatch.setattr(lesson, "in_notebook", lambda: False)
    plt.subplots()
    lesson.show("a circle")
    assert capsys.readouterr().out == "[figure] a circle\n" and not plt.get_fignums()


def test_frames_are_a_strip_and_a_slider_where_a_kernel_runs(notebook, monkeypatch):
    drawn, boxes, make = [], [], ipywidgets.VBox

    def draw(axes, value):
        drawn.append(value)
        axes.plot([0, value])

    monkeypatch.setattr("ipywidgets.VBox", lambda parts: boxes.append(make(parts)) or boxes[-1])
    lesson.frames(draw, range(0, 101, 10), label="merges", alt="A line that grows")
    assert drawn == [0, 20, 40, 60, 80, 100, 0]  # six for the strip, one under the slider
    strip, live = notebook
    assert strip.alt == "A line that grows" and "image/png" in strip.versions[0]
    (bundle,) = live.versions
    assert bundle["text/plain"] == "(a slider over merges, where a kernel runs)"
    assert "application/vnd.jupyter.widget-view+json" in bundle
    slider, picture = boxes[0].children
    before = picture.value
    slider.value = 3
    assert drawn[-1] == 30 and picture.value != before
    assert picture.value.startswith('<img alt="merges 30. A line that grows" src="data:image/png')


def test_frames_are_all_shown_where_they_are_few(capsys):
    drawn = []
    lesson.frames(lambda axes, value: drawn.append(value), ["a", "b"], alt="two")
    assert drawn == ["a", "b"] and capsys.readouterr().out == "[figure] two\n"


def test_heatmap_names_rows_and_columns_whatever_is_in_them():
    figure, axes = plt.subplots()
    lesson.heatmap(axes, np.eye(2), rows=["$x", " a"], columns=["b\n", "long one"])
    figure.canvas.draw()  # a stray dollar would fail here, as mathematics
    assert [label.get_text() for label in axes.get_yticklabels()] == [r"\$x", "·a"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["b↵", "long·one"]


def test_the_road_is_green_where_a_stage_is_finished():
    run = lesson.begin("smoke", None, {})
    run.stage("data").finish({}, seconds=1.0)
    run.stage("eval", of="base").finish({}, seconds=1.0)
    figure = lesson.road(run)
    boxes = {t.get_text(): t.get_bbox_patch() for t in figure.axes[0].texts if t.get_bbox_patch()}
    green = matplotlib.colors.to_rgba(lesson.PASTELS[2])
    done = {name for name, box in boxes.items() if box.get_facecolor() == green}
    assert done == {"data ✓", "eval ✓"} == {name for name in boxes if "✓" in name}
    assert [t.get_text() for t in figure.axes[0].texts].count("eval") == 3


def test_tree_lists_what_is_there_but_nothing_hidden(tmp_path, capsys):
    (tmp_path / "base" / "checkpoints" / "deep").mkdir(parents=True)
    (tmp_path / "base" / "done.json").write_text("x" * 2500)
    (tmp_path / ".lock").touch()
    lesson.tree(tmp_path)
    found = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert found == [["base/"], ["checkpoints/"], ["done.json", "2", "KB"]]


@pytest.mark.parametrize("now", lesson.STREAM)
def test_one_part_of_the_model_is_lit_and_those_before_it_are_named(now, monkeypatch):
    figures = []
    monkeypatch.setattr(lesson, "show", lambda alt: figures.append((plt.gcf(), alt)))
    lesson.stream(now)
    ((figure, alt),) = figures
    lit = {text.get_text() for text in figure.axes[0].texts if text.get_weight() == "bold"}
    names = {"embedding": "embedding, norm", "mlp": "MLP", "add": "+", "head": "norm, head, cap"}
    assert lit == {names.get(now, now)} and f"now: {now};" in alt
    assert f"before: {', '.join(lesson.STREAM[: lesson.STREAM.index(now)]) or 'nothing'}." in alt
    plt.close(figure)


def test_a_picture_is_small_and_keeps_its_colours():
    figure, axes = plt.subplots(figsize=(4, 3))
    axes.imshow(np.arange(400.0).reshape(20, 20), cmap="Blues")
    axes.axhspan(5, 10, color=lesson.ORANGE)
    small, large = io.BytesIO(lesson.png(figure)), io.BytesIO()
    figure.savefig(large, format="png")
    plt.close(figure)
    pixels = [plt.imread(io.BytesIO(file.getvalue()))[..., :3] for file in (small, large)]
    assert np.quantile(np.abs(pixels[0] - pixels[1]), 0.99) < 0.03
    assert 2 * len(small.getvalue()) < len(large.getvalue())
