"""What the chapters share: opening a run, the live figure, figures with words, pictures of tokens.

Everything has a plain-text twin for where no notebook is: a terminal, a test, a script.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanolib.config import MODELS
from nanolib.progress import Line, describe
from nanolib.rundir import Run, StageDir

if TYPE_CHECKING:
    from IPython.display import DisplayHandle
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

BLUE, ORANGE, GREEN = "#2b6cb0", "#dd6b20", "#2f855a"
RED, VIOLET, GREY = "#c53030", "#6b46c1", "#a0aec0"
# One colour code through all chapters: who put a token there, and whether it is learned from.
CHOSEN, FORCED, PROGRAM, MASKED = BLUE, ORANGE, GREEN, GREY
HATCHES = {CHOSEN: "", FORCED: "///", PROGRAM: "...", MASKED: "xxx"}  # the same in matplotlib bars
KINDS = {  # a token's kind: background, line under it, what it means
    "chosen": ("#dbeafe", f"3px solid {CHOSEN}", "chosen by the model"),
    "forced": ("#fde7c8", f"3px dashed {FORCED}", "forced: a tool's result"),
    "program": ("#d3f2df", f"3px dotted {PROGRAM}", "program: Python to run"),
    "masked": ("#edf0f4", f"3px double {MASKED}", "masked: not graded"),
}
FRAMES = 6  # in a strip
LARGE = 10_000_000  # parameters of a run's model
PASTELS = ("#dbeafe", "#fde7c8", "#d3f2df", "#fbd9e0", "#e6dcfb", "#e5e7eb")
STYLE: dict[Any, Any] = {
    "figure.figsize": (7.2, 2.9),
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "grid.color": "#e8ecf1",
    "font.size": 9.5,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "lines.linewidth": 1.8,
}


def begin(profile: str, run: str | Run | None, overrides: Mapping[str, Any]) -> Run:
    """Open the chapter's run (`Run.open`), set the style of pictures, and say which run it is.

    One CPU thread from here on, up to eight where the run's model is larger than `LARGE`: on
    tensors as small as a small run's lessons have, several wait for each other.
    A cell that is executed twice hands back the run it made: then `run` is a Run and is kept.
    """
    import matplotlib as mpl
    import torch
    from cycler import cycler

    mpl.rcParams.update(STYLE)
    mpl.rcParams["axes.prop_cycle"] = cycler(color=[BLUE, ORANGE, GREEN, RED, VIOLET, GREY])
    opened = run if isinstance(run, Run) else Run.open(profile, run, overrides)
    model, vocab = opened.config.recipe.model, opened.config.recipe.tokenizer.vocab_size
    parameters = model.parameters(vocab)
    torch.set_num_threads(min(8, os.cpu_count() or 1) if parameters > LARGE else 1)
    print(
        f"run {opened.id}: depth {model.depth}, width {model.width}, vocabulary {vocab:,}, "
        f"{parameters:,} parameters"
    )
    return opened


def in_notebook() -> bool:
    """Whether a notebook's kernel runs us (so that rich output has somewhere to go)."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return hasattr(get_ipython(), "kernel")


def _display(plain: str, **rich: Any) -> None:
    """One output with a text twin: ``_display("a b", html="<b>a</b> b")``."""
    if not in_notebook():
        print(plain)
        return
    from IPython.display import display

    kinds = {f"text/{kind}": value for kind, value in rich.items()}
    display({"text/plain": plain} | kinds, raw=True)


def show(alt: str) -> None:
    """Show the current figure and close it; alt says what is to be seen, for who cannot see it."""
    from matplotlib import pyplot as plt

    if not plt.get_fignums():
        raise ValueError("there is no figure to show; draw one first")
    figure = plt.gcf()
    if in_notebook():
        from IPython.display import display

        bundle = {"text/plain": f"[figure] {alt}", "image/png": png(figure, tight=True)}
        display(bundle, metadata=_alt(alt), raw=True)
    else:
        print(f"[figure] {alt}")
    plt.close(figure)


def _alt(words: str) -> dict[str, Any]:
    """The metadata of an output whose picture says this to who cannot see it."""
    return {"image/png": {"alt": words}}


def frames(
    draw: Callable[[Axes, Any], None], values: Sequence[Any], label: str = "", alt: str = ""
) -> None:
    """Show how a drawing changes: ``draw(axes, value)`` for up to six of the values, in a strip.

    In a live notebook a slider under the strip draws any of them, large.
    """
    from matplotlib import pyplot as plt

    count = min(FRAMES, len(values))
    chosen = [values[round(i * (len(values) - 1) / max(1, count - 1))] for i in range(count)]
    rows = math.ceil(count / 3)
    size = (7.2, 2.3 * rows)
    panels = plt.subplots(rows, math.ceil(count / rows), figsize=size, squeeze=False)[1]
    for axes, value in zip(panels.flat, chosen, strict=False):
        draw(axes, value)
        axes.set_title(f"{label} {value}".strip(), fontsize=10)
    for axes in panels.flat[count:]:
        axes.axis("off")
    show(alt)
    if in_notebook():
        _slider(draw, values, label, alt)


def _slider(draw: Callable[[Axes, Any], None], values: Sequence[Any], label: str, alt: str) -> None:
    """A slider over `values` and one large drawing under it. Needs a kernel, unlike the strip."""
    import ipywidgets
    from IPython.display import display
    from matplotlib.figure import Figure

    slider = ipywidgets.SelectionSlider(
        options=[(str(value), place) for place, value in enumerate(values)],
        description=label,
        continuous_update=False,
    )
    picture = ipywidgets.HTML()

    def redraw(change: Any = None) -> None:
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        draw(figure.subplots(), values[slider.value])
        data = base64.b64encode(png(figure)).decode()
        words = html.escape(f"{label} {values[slider.value]}. {alt}", quote=True)
        picture.value = f'<img alt="{words}" src="data:image/png;base64,{data}">'

    slider.observe(redraw, "value")
    redraw()
    bundle = ipywidgets.VBox([slider, picture])._repr_mimebundle_()
    words = f"(a slider over {label or 'the frames'}, where a kernel runs)"
    display({**bundle, "text/plain": words}, raw=True)


def markdown(text: str) -> None:
    """Show Markdown rendered."""
    _display(text, markdown=text)


def rich(picture: str, plain: str) -> None:
    """Show HTML, with a plain-text twin. Whoever wrote what is in it, `picture` must be escaped."""
    _display(plain, html=picture)


# ---------------------------------------------------------------------------- the live figure


class Live:
    """The `watch` of `launch.stage`: one figure a stage, redrawn in place as its metrics grow.

    A training stage shows its loss and what it scores on held-out data; other stages one line.
    Redrawn every `every` seconds at most, and at the end. Outside a notebook it prints lines.
    """

    def __init__(self, every: float = 2.0) -> None:
        self.every = every
        self._line = None if in_notebook() else Line()
        self._handles: dict[Path, DisplayHandle] = {}
        self._drawn_at = -math.inf

    def __call__(self, stage: StageDir, rows: Sequence[Mapping[str, Any]]) -> None:
        if self._line is not None:
            self._line(stage, rows)
            return
        finished = stage.done() is not None
        known = stage.path in self._handles
        if known and not finished and time.monotonic() - self._drawn_at < self.every:
            return
        picture, metadata = _picture(stage, rows)
        if known:
            self._handles[stage.path].update(picture, metadata=metadata, raw=True)
        else:
            from IPython.display import DisplayHandle

            self._handles[stage.path] = DisplayHandle()
            self._handles[stage.path].display(picture, metadata=metadata, raw=True)
        self._drawn_at = time.monotonic()


def _picture(
    stage: StageDir, rows: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A stage's progress as a mime bundle (text, and a PNG where it trains) and its metadata."""
    text = describe(stage, rows)
    if not any(row["kind"] == "train" for row in rows):
        return {"text/plain": text}, {}
    bundle = {"text/plain": text, "image/png": png(curves(rows, text))}
    return bundle, _alt(_in_words(rows))


def _in_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """What `curves` shows, for who cannot see it."""
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    loss = smooth(losses)
    words = f"Two plots over {len(losses):,} steps. Training loss: {loss[0]:.2f} to {loss[-1]:.2f}"
    for name, points in _scores(rows).items():
        words += f"; held-out {name}: {points[0][1]:.3f} to {points[-1][1]:.3f}"
    return f"{words}."


def curves(rows: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Training loss (each step, and smoothed) beside the score on held-out data."""
    from matplotlib.figure import Figure

    train = [row for row in rows if row["kind"] == "train"]
    last = train[-1]["steps"]
    scores = _scores(rows)
    figure = Figure(figsize=(7.6, 2.8 + 0.1 * len(scores)), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, family="monospace")
    steps, losses = [row["step"] for row in train], [row["loss"] for row in train]
    left.plot(steps, losses, color=GREY, linewidth=0.8, alpha=0.7)
    left.plot(steps, smooth(losses, keep=1 - 20 / min(400, max(40, last))), color=BLUE)
    graded = any(row["kind"] == "rollout" for row in rows)  # GRPO's loss has weights of both signs
    left.set_title("loss, weighted by advantage" if graded else "training loss (nats a token)")
    for (name, points), marker in zip(scores.items(), itertools.cycle("os^Dv"), strict=False):
        values = " → ".join(f"{value:.3f}" for _, value in dict.fromkeys((points[0], points[-1])))
        label = f"{name.removesuffix('_loss')} {values}"
        right.plot(*zip(*points, strict=True), marker + "-", markersize=4, label=label)
    if scores:
        names = right.get_legend_handles_labels()
        figure.legend(*names, loc="outside lower right", ncols=3, fontsize=9)
        right.set_title("held-out " + _unit(list(scores)))
    else:
        right.set_yticks([])
        right.set_title("held-out score (not yet)")
    for axes in (left, right):
        axes.set_xlim(0, last * 1.05)
        axes.set_xlabel("step")
        axes.margins(y=0.15)
    return figure


def _scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The evaluation rows' scores by name, each as (step, value) pairs."""
    scored = [row for row in rows if row["kind"] == "eval"]
    names = dict.fromkeys(key for row in scored for key in row if key not in ("kind", "step"))
    return {name: [(row["step"], row[name]) for row in scored if name in row] for name in names}


def _unit(names: Sequence[str]) -> str:
    if all(name.endswith("_loss") for name in names):
        return "loss (nats a token)"
    return "bits per byte" if "bpb" in names else "score"


def smooth(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """An exponential moving average whose start is not pulled towards zero.

    >>> smooth([2.0, 2.0, 2.0])
    [2.0, 2.0, 2.0]
    """
    total = weight = 0.0
    averages = []
    for value in values:
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        averages.append(total / weight)
    return averages


def png(figure: Figure, tight: bool = False) -> bytes:
    """A figure's picture; tight: without empty margins, and with what stands outside of them.

    Of 256 colours, which takes a third of the room that a notebook has for its pictures.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    drawn, buffer = io.BytesIO(), io.BytesIO()
    canvas = FigureCanvasAgg(figure)
    canvas.print_figure(drawn, format="png", bbox_inches="tight" if tight else None)
    with Image.open(drawn) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, "png")
    return buffer.getvalue()


# ---------------------------------------------------------------------------- pictures


def tokens(
    pieces: Sequence[str],
    groups: Sequence[int] | None = None,
    shades: Sequence[float] | None = None,
    legend: Sequence[str] = (),
    *,
    kinds: Sequence[str] | None = None,
    numbers: Sequence[Any] | None = None,
) -> None:
    """Show tokens as coloured boxes in a line of text.

    kinds: each token's place in the course's colour code (`KINDS`), by colour and by the line
    under it, explained below; groups: a colour for each token (0 … 5), named by `legend`; shades:
    0 … 1, white to red; none of them: colours in turn, so that borders show.
    numbers: something to print small under each token; floats with two digits.
    The text twin puts a bar between tokens, and names kinds and numbers.
    """
    if kinds is not None:
        styles = [_kind_style(kind) for kind in kinds]
        present = [kind for kind in KINDS if kind in kinds]
        keys = [_box(KINDS[kind][2], _kind_style(kind)) for kind in present]
    elif shades is not None:
        reds = (min(1.0, max(0.0, shade)) for shade in shades)
        mixed = ([255 - round(red * less) for less in (34, 175, 195)] for red in reds)  # no alpha:
        styles, keys = [f"background:rgb{tuple(rgb)}" for rgb in mixed], []  # pages may be dark
    else:
        cycle = range(len(pieces)) if groups is None else groups
        pastels = [f"background:{colour}" for colour in PASTELS]
        styles = [pastels[group % len(PASTELS)] for group in cycle]
        keys = [*map(_box, legend, pastels)]
    below = [""] * len(pieces) if numbers is None else [_number(number) for number in numbers]
    boxes = "".join(
        _box(_visible(piece), style, number) + "<br>" * ("\n" in piece)
        for piece, style, number in zip(pieces, styles, below, strict=True)
    )
    style = "font-family:monospace;font-size:13px;line-height:2;max-width:60em;margin:4px 0"
    picture = f'<div style="{style}">{boxes}</div>'
    if keys:
        picture += f'<div style="font-size:12px;margin:4px 0">{" ".join(keys)}</div>'
    _display(_tokens_as_text(pieces, kinds, below), html=picture)


def _tokens_as_text(pieces: Sequence[str], kinds: Sequence[str] | None, below: list[str]) -> str:
    """``[program] 12|+|30 [forced] 42``, with each token's number in brackets."""
    named = [f"{piece} ({n})" if n else piece for piece, n in zip(pieces, below, strict=True)]
    if kinds is None:
        return "|".join(named)
    runs = itertools.groupby(zip(kinds, named, strict=True), key=lambda pair: pair[0])
    return " ".join(f"[{kind}] " + "|".join(piece for _, piece in run) for kind, run in runs)


def _kind_style(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"a token's kind is one of {', '.join(KINDS)}; got {kind!r}")
    background, line, _ = KINDS[kind]
    return f"background:{background};border-bottom:{line}"


def _number(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value)


def _visible(piece: str) -> str:
    return piece.replace(" ", "·").replace("\n", "↵")


def _box(text: str, look: str, number: str = "") -> str:
    style = (
        f"display:inline-block;line-height:1.4;{look};color:#1a202c;"
        "border-radius:3px;padding:0 1px;margin:0 1px"
    )
    under = f'<br><small style="font-size:11px">{html.escape(number)}</small>' if number else ""
    style += ";text-align:center;vertical-align:top" if number else ""
    return f'<span style="{style}">{html.escape(text)}{under}</span>'


def heatmap(
    axes: Axes,
    values: Any,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    limits: tuple[float, float] | None = None,
    colours: str = "Blues",
) -> AxesImage:
    """A matrix as colours, with a name on every row and column."""
    from matplotlib.ticker import MaxNLocator

    low, high = limits or (None, None)
    image = axes.imshow(
        values.tolist() if hasattr(values, "tolist") else values,
        cmap=colours,
        aspect="auto",
        vmin=low,
        vmax=high,
    )
    axes.grid(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    if len(rows):
        axes.set_yticks(range(len(rows)), [_label(name) for name in rows])
    if len(columns):
        turn = 90 if max(map(len, columns)) > 2 else 0
        axes.set_xticks(range(len(columns)), [_label(name) for name in columns], rotation=turn)
    return image


def _label(piece: str) -> str:
    """A token as a tick label, without a dollar that matplotlib would take for maths."""
    return _visible(piece).replace("$", r"\$")


ROAD = (  # what is done, in which chapter, and what comes out
    ("data", "01", "text"),
    ("tokenizer", "01", "a vocabulary"),
    ("shards", "01", "token ids"),
    ("base", "04", "a reader"),
    ("mid", "06", "a talker"),
    ("sft", "07", "an assistant"),
    ("grpo", "08", "a solver"),
    ("report", "09", "a card"),
)


def road(run: Run) -> Figure:
    """The stages as boxes in their order, an eval below each model; a tick where finished."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8.6, 2.2))
    axes.set(xlim=(-0.5, len(ROAD) - 0.5), ylim=(-1.45, 0.4))
    axes.axis("off")

    def box(x: float, y: float, name: str, done: bool) -> Any:  # the box's outline
        look = {"boxstyle": "round,pad=0.4", "fc": PASTELS[2] if done else "white", "ec": GREY}
        text = f"{name} ✓" if done else name
        shown = axes.text(x, y, text, ha="center", va="center", fontsize=9.5, bbox=look)
        return shown.get_bbox_patch()

    ends: dict[str, Any] = {}
    for place, (name, chapters, product) in enumerate(ROAD):
        ends["patchB"] = box(place, 0.1, name, (run.path / name / "done.json").exists())
        axes.text(place, -0.62, f"{product}\nchapter {chapters}", ha="center", fontsize=9)
        if place:
            arrow = {"arrowstyle": "->", "color": GREY} | ends
            axes.annotate("", (place, 0.1), (place - 1, 0.1), arrowprops=arrow)
        ends["patchA"] = ends["patchB"]
        if name in MODELS:
            box(place, -1.15, "eval", (run.path / "eval" / name / "done.json").exists())
    return figure


STREAM = ("embedding", "norm", "attention", "rotary", "mlp", "add", "head")  # in chapter 02's order


def stream(now: str) -> None:
    """The model as a road of vectors from bottom to top, with the part `now` lit up.

    Parts that the chapter has reached before it are filled, those to come are dashed.
    """
    from matplotlib import pyplot as plt

    reached = STREAM.index(now)
    _, axes = plt.subplots(figsize=(3.9, 3.3))
    axes.set(xlim=(-0.6, 6.6), ylim=(-0.4, 9.4))
    axes.axis("off")
    axes.plot([1, 1], [0.2, 8.3], color=GREY, linewidth=7, alpha=0.45, zorder=0)
    axes.text(0.62, 4.2, "residual stream", rotation=90, ha="right", va="center", color="#4a5568")

    def part(x: float, y: float, name: str, text: str) -> None:
        place = STREAM.index(name)
        lit = place == reached
        look: dict[str, Any] = {
            "fc": "#fde7c8" if lit else PASTELS[0] if place < reached else "white",
            "ec": ORANGE if lit else BLUE if place < reached else GREY,
            "lw": 2.6 if lit else 1.2,
            "ls": "-" if place <= reached else "--",
        }
        shape = "circle,pad=0.15" if text == "+" else "round,pad=0.35"
        weight = "bold" if lit else "normal"
        box = {"boxstyle": shape, **look}
        axes.text(x, y, text, ha="center", va="center", fontsize=9, weight=weight, bbox=box)

    def arrow(*ends: tuple[float, float]) -> None:
        for start, end in itertools.pairwise(ends):
            axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "#4a5568"})

    for leave, back, name, text in ((1.6, 3.6, "attention", "attention"), (4.7, 6.5, "mlp", "MLP")):
        arrow((1, leave), (2.6, leave))
        arrow((3.4, leave), (5, leave), (5, back), (1.3, back))
        part(3, leave, "norm", "norm")
        part(5, (leave + back) / 2, name, text)
        part(1, back, "add", "+")
    part(3.3, 3.05, "rotary", "rotary")
    arrow((3.9, 2.9), (4.25, 2.7))
    part(1, 0, "embedding", "embedding, norm")
    part(1, 8.6, "head", "norm, head, cap")
    brace = {"arrowstyle": "|-|,widthA=0.3,widthB=0.3", "color": GREY}
    axes.annotate("", (6.1, 1.2), (6.1, 6.9), arrowprops=brace)
    axes.text(6.3, 4.05, "one block, × depth", rotation=90, va="center", color="#4a5568")
    before = ", ".join(STREAM[:reached]) or "nothing"
    show(
        "The model as a vertical road, the residual stream, from the embedding below to the head "
        "above; attention and the MLP are side trips that add to it. "
        f"Lit up now: {now}; reached before: {before}."
    )


def tree(path: Path, depth: int = 2, level: int = 0) -> None:
    """Print a directory: what is in it, and how large, `depth` folders deep."""
    name = "    " * level + path.name
    if not path.is_dir():
        print(f"{name:<28}{_size(path):>10}")
        return
    print(f"{name}/")
    if level < depth:
        for entry in sorted(p for p in path.iterdir() if not p.name.startswith(".")):
            tree(entry, depth, level + 1)


def _size(path: Path) -> str:
    size = float(path.stat().st_size)
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
