"""Markdown of figures: tables, numbers, samples in fences, and curves drawn with characters."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

BARS = " ▁▂▃▄▅▆▇█"
DASH = "—"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '¦') for cell in row)} |"


def quoted(said: Sequence[str | bool | float]) -> str:
    """A sample: what was given, and each text that came on a line of its own."""
    quoted = ""
    for number, text in enumerate(said):
        if isinstance(text, bool):
            quoted += " (right)" if text else " (wrong)"
        elif isinstance(text, float):
            quoted += f" (reward {text:g})"
        else:
            quoted += f"\n  {text!r}" if number else f"> {text!r}"
    return quoted


def fenced(body: str, language: str = "text") -> Iterator[str]:
    """Lines of a text in a fence that nothing in it can close."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", body)), default=0))
    yield fence + language
    yield from body.split("\n")
    yield fence


def number(value: Any) -> str:
    if value is None:
        return DASH
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def score(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else number(value)


def dollars(value: float | None) -> str:
    return DASH if value is None else f"${value:,.2f}"


def thinned(rows: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the rows, evenly, the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def chart(points: Sequence[tuple[float, float]], width: int = 64, height: int = 8) -> list[str]:
    """A curve as lines of text: columns of block characters, with the extremes named.

    Each column is the mean of the points that fall into it; x grows evenly from left to right.
    """
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if not points:
        return ["(nothing to draw)"]
    first, last = points[0][0], points[-1][0]
    bins: list[list[float]] = [[] for _ in range(min(width, len(points)))]
    for x, y in points:
        place = (x - first) / (last - first) if last > first else 0.0
        bins[min(int(place * len(bins)), len(bins) - 1)].append(y)
    means = [sum(column) / len(column) if column else math.nan for column in bins]
    known = [mean for mean in means if not math.isnan(mean)]
    low, high = min(known), max(known)
    steps = 8 * height - 1  # a column is at least an eighth of a line high
    levels = [
        0 if math.isnan(m) else 1 + round((m - low) / ((high - low) or 1) * steps) for m in means
    ]
    lines = []
    for line in reversed(range(height)):
        blocks = "".join(BARS[min(8, max(0, level - 8 * line))] for level in levels)
        name = number(high) if line == height - 1 else number(low) if line == 0 else ""
        lines.append(f"{name:>8} │{blocks}".rstrip())
    ends = f"{number(first)}{number(last):>{max(1, len(bins) - len(number(first)))}}"
    return [*lines, f"{'':>8} └{'─' * len(bins)}", f"{'':>10}{ends}"]
