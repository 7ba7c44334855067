"""Chat in a notebook: ``Chat(session)`` shows a conversation with an input box.

Answers are streamed from a background thread, so that Stop works. While a cell runs, the kernel
handles no events and input waits. Without a browser, use `Session.ask`.
"""

import contextlib
import html
import threading
import time
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from nanolib.conversation import Part
from nanolib.session import Session
from nanolib.ui import markup

REDRAW = 0.05  # seconds between two updates of an answer
GRACE = 1.0  # seconds to wait for the text, whose update may arrive after the Enter event
STYLE = markup.CSS + Path(__file__).with_name("widget.css").read_text(encoding="utf-8")


class Chat:
    """The view of a session; text that is refused or typed during an answer stays in the box."""

    def __init__(self, session: Session):
        self.session = session
        self._free = threading.Lock()  # held during an answer
        self._stop, self._typed = threading.Event(), threading.Event()
        self.box = widgets.Text(placeholder="Say something, then Enter", continuous_update=False)
        self.send_button = widgets.Button(description="Send", button_style="primary")
        self.stop_button = widgets.Button(description="Stop", disabled=True)
        self.clear_button = widgets.Button(description="Clear")
        self.lines = widgets.VBox().add_class("nanolib-lines")
        log = widgets.Box([self.lines], layout={"height": "24em"}).add_class("nanolib-log")
        buttons = [self.send_button, self.stop_button, self.clear_button]
        row = widgets.HBox([self.box, *buttons]).add_class("nanolib-row")
        style = widgets.HTML(f"<style>{STYLE}</style>", layout={"display": "none"})
        self.view = widgets.VBox([style, log, row]).add_class("nanolib-chat")
        self.send_button.on_click(lambda _: self.send(self.box.value))
        self.stop_button.on_click(lambda _: self._stop.set())
        self.clear_button.on_click(lambda _: self.clear())
        self.box.observe(lambda _: self._typed.set(), "value")
        self.box.on_msg(self._on_enter)
        self._draw()

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """The widget, or a line of text without a live notebook."""
        bundle = self.view._repr_mimebundle_(**kwargs)
        return bundle | {"text/plain": "A chat, to be used in a running notebook."}

    def send(self, text: str) -> None:
        """Send `text` and answer it in a background thread; ignored during an answer."""
        if text.strip() and self._free.acquire(blocking=False):
            self._stop.clear()
            threading.Thread(target=self._turn, args=(text.strip(),), daemon=True).start()

    def clear(self) -> None:
        if self._free.acquire(blocking=False):
            try:
                self.session.clear()
                self._draw()
            finally:
                self._free.release()

    def _on_enter(self, box: widgets.Text, content: dict[str, Any], buffers: Any) -> None:
        """Send on Enter. The browser reports the key before the changed text, if it changed."""

        def entered() -> None:
            self._typed.wait(GRACE)  # times out if the text arrived earlier
            self.send(self.box.value)

        if content.get("event") == "submit":
            self._typed.clear()
            threading.Thread(target=entered, daemon=True).start()

    def _turn(self, text: str) -> None:
        """Answer `text`; always leave the widget in sync with the session, even on errors."""
        before, note = len(self.session.messages), None
        try:
            self._buttons(busy=True)
            self._answer(text)
            stopped = "stopped" if self._stop.is_set() else None
            note = "; ".join(filter(None, [stopped, self.session.notice]))
        except Exception as error:  # an exception in a thread would not be shown
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            note = f"error: {kind}{error}"
        finally:
            if len(self.session.messages) == before:  # refused, or stopped before any answer
                self.box.value = self.box.value or text
            notes = [f'<div class="nanolib-note">({html.escape(note)})</div>'] if note else []
            self._draw(*notes)
            self._buttons(busy=False)
            self._free.release()

    def _answer(self, text: str) -> None:
        with contextlib.closing(self.session.parts(text)) as pieces:
            self.box.value = ""
            self._draw(markup.user_html(text), markup.answer_html([Part("text", "…")]))
            drawn = 0.0
            for _ in pieces:
                if time.monotonic() - drawn >= REDRAW:
                    self.lines.children[-1].value = markup.answer_html(self.session.answer)
                    drawn = time.monotonic()
                if self._stop.is_set():
                    return

    def _draw(self, *more: str) -> None:
        """Show the session's messages and then `more`, one widget each; widgets are reused."""
        values = [*map(markup.message_html, self.session.messages), *more]
        lines = list(self.lines.children)
        lines += [widgets.HTML().add_class("nanolib-line") for _ in values[len(lines) :]]
        for line, value in zip(lines, values, strict=False):
            line.value = value
        self.lines.children = lines[: len(values)]
        for line in lines[len(values) :]:
            line.close()

    def _buttons(self, busy: bool) -> None:
        self.send_button.disabled = self.clear_button.disabled = busy
        self.stop_button.disabled = not busy
