"""Render messages as HTML, for the page of `nanolib serve` and the notebook widget.

Neither the model nor the user is trusted: text is escaped, Markdown is rendered without HTML or
images, and links are limited to the schemes in `LINKS`, so a message cannot run or load anything.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from nanolib.conversation import Message, Part

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

LINKS = ("http://", "https://", "mailto:")
LINK = '<a target="_blank" rel="noopener noreferrer nofollow" '
SUMMARY_CHARACTERS = 60  # at most, of a program's or a result's first line
# A GSM8K answer ends with a line such as "#### 42". Any other line with #### is a heading.
FINAL_ANSWER = re.compile(r"^####[ \t]*(-?\$?[\d.,]*\d%?)\.?[ \t]*$")

CSS = Path(__file__).with_name("markup.css").read_text(encoding="utf-8")


def answer_html(parts: Sequence[Part]) -> str:
    """Render an answer, finished or not: text as Markdown, each program folded with its output."""
    pieces, program = [], None  # program: the last one, if its output may follow
    for part in Message("assistant", tuple(parts)).parts:  # adjacent texts are joined
        if part.kind == "text":
            pieces.append(_markdown().render(part.text).replace("<a ", LINK))
        elif part.kind == "python":
            pieces.append(_tool(part.text, None))
        else:
            pieces[len(pieces) - (program is not None) :] = [_tool(program, part.text)]
        program = part.text if part.kind == "python" else None
    return f'<div class="nanolib-answer">{"".join(pieces)}</div>'


def message_html(message: Message) -> str:
    return user_html(message.text) if message.role == "user" else answer_html(message.parts)


def user_html(text: str) -> str:
    """A user's message exactly as typed, without Markdown."""
    return f'<div class="nanolib-said">{html.escape(text)}</div>'


def _tool(source: str | None, output: str | None) -> str:
    """A folded program and its output, either of which may be None."""
    title = "output" if source is None else f"python: {_first_line(source)}"
    title += "" if output is None else f" → {_first_line(output)}"
    blocks = "".join(f"<pre>{html.escape(text)}</pre>" for text in (source, output) if text)
    return f'<details class="tool"><summary>{html.escape(title)}</summary>{blocks}</details>'


def _first_line(text: str) -> str:
    """The first line, ending in … if there is more."""
    text = text.strip()
    line = (text.splitlines() or [""])[0][:SUMMARY_CHARACTERS]
    return line if line == text else f"{line}…"


@cache
def _markdown() -> MarkdownIt:
    from markdown_it import MarkdownIt

    # Keep single newlines: small models use them as line breaks.
    markdown = MarkdownIt("commonmark", {"html": False, "breaks": True})
    markdown.enable("table").disable("image")  # an image becomes a link
    markdown.validateLink = lambda url: url.lower().startswith(LINKS)
    interrupts = ["paragraph", "reference", "blockquote"]  # the list rule's default
    markdown.block.ruler.at("list", _list, {"alt": interrupts})
    markdown.block.ruler.before("heading", "final", _final_answer, {"alt": interrupts})
    return markdown


def _list(state, start: int, end: int, silent: bool) -> bool:
    """The list rule, but a number on its own ("42.") is an answer, not an empty list."""
    from markdown_it.rules_block import list_block

    alone = re.fullmatch(r"\d+[.)]\s*", _line(state, start))
    return not alone and list_block(state, start, end, silent)


def _final_answer(state, start: int, end: int, silent: bool) -> bool:
    """Render a line such as "#### 42" as "Answer: 42"."""
    found = FINAL_ANSWER.fullmatch(_line(state, start))
    if found is None:
        return False
    if not silent:
        state.line = start + 1
        state.push("paragraph_open", "p", 1).attrSet("class", "final")
        inline = state.push("inline", "", 0)
        inline.content, inline.children = f"Answer: **{found[1]}**", []
        state.push("paragraph_close", "p", -1)
    return True


def _line(state, number: int) -> str:
    return state.src[state.bMarks[number] + state.tShift[number] : state.eMarks[number]]
