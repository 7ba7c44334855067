"""Talking in the terminal: answers stream, Ctrl-C stops one, Ctrl-D leaves."""

from __future__ import annotations

import contextlib
import sys

from nanolib.session import Session

HELP = "Ctrl-C stops an answer, /clear starts over, Ctrl-D leaves."


def answer(session: Session, text: str) -> None:
    """Say `text` and print the answer as it comes; Ctrl-C cuts it and raises KeyboardInterrupt.

    What was said until then is part of the conversation.
    """
    with contextlib.closing(session.stream(text)) as pieces:
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        finally:
            print()
            if session.notice:  # of history left out, or of an answer that met its limit
                print(f"({session.notice})", file=sys.stderr)


def talk(session: Session) -> None:
    """Read lines and answer them until the end of input, or Ctrl-C where nothing is being said."""
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        import readline  # noqa: F401  (gives input() its editing and its history)

        print(HELP)
    while True:
        try:
            text = input("you> " if at_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            if at_terminal:
                print()
            return
        if text == "/clear":
            session.clear()
        elif text:
            _turn(session, text, at_terminal)


def _turn(session: Session, text: str, at_terminal: bool) -> None:
    try:
        if at_terminal:
            print("model> ", end="", flush=True)
        answer(session, text)
    except KeyboardInterrupt:
        print("(stopped)", file=sys.stderr)
    except ValueError as error:  # too long a message: say so and go on
        print(f"error: {error}", file=sys.stderr)
