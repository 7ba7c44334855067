"""Chat in the terminal: answers are streamed, Ctrl-C stops one, Ctrl-D quits.

A line that starts with a slash is a command; put a space in front to send it to the model.
"""

import contextlib
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path

from nanolib import rundir
from nanolib.session import Session
from nanolib.ui.markup import FINAL_ANSWER

HELP = """\
/clear          start over
/system [TEXT]  set the system message and start over; without a text, show it
/save [PATH]    write the conversation as JSON
/help           this list
Ctrl-C stops an answer, Ctrl-D leaves."""
# Control characters in output must not reach the terminal: ESC is shown as ␛.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
VISIBLE |= dict.fromkeys(range(0x7F, 0xA0), ord("\N{REPLACEMENT CHARACTER}"))


def answer(session: Session, text: str) -> None:
    """Send `text` and print the streamed answer; Ctrl-C stops it and keeps what has come."""
    with contextlib.closing(session.stream(text)) as pieces:
        try:
            for piece in _final_answers(pieces):
                print(piece.translate(VISIBLE), end="", flush=True)
        finally:
            print()
            if session.notice:
                print(f"({session.notice})", file=sys.stderr)


def _final_answers(pieces: Iterable[str]) -> Iterator[str]:
    """Replace lines such as "#### 42" by "Answer: 42"; a possible start of one is held back."""
    line, shown = "", 0  # the current line, and how many of its characters were yielded
    for piece in pieces:
        *complete, line = (line + piece).split("\n")
        for text in complete:
            yield FINAL_ANSWER.sub(r"Answer: \1", text)[shown:] + "\n"
            shown = 0
        if not re.fullmatch(r"#{0,3}|####[ \t]*[-$\d.,%]*[ \t]*", line):
            yield line[shown:]
            shown = len(line)
    yield FINAL_ANSWER.sub(r"Answer: \1", line)[shown:]


def talk(session: Session, folder: Path = Path()) -> None:
    """Read lines and answer them until end of input, or Ctrl-C at the prompt."""
    asks, answers, end = ("you> ", "model> ", "\n") if sys.stdin.isatty() else ("", "", "")
    if asks:
        import readline  # noqa: F401  (gives input() line editing and history)

        print("Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands.")
    while True:
        try:
            line = input(asks)
        except (EOFError, KeyboardInterrupt):
            return print(end=end)
        try:
            if line.startswith("/"):
                print(command(session, line, folder))
            elif line.strip():
                print(end=answers, flush=True)
                answer(session, line.strip())
        except KeyboardInterrupt:
            print("(stopped)", file=sys.stderr)
        except (ValueError, OSError) as error:  # such as a message too long or a missing folder
            print(f"error: {error}", file=sys.stderr)


def command(session: Session, line: str, folder: Path) -> str:
    """Run a slash command; returns the reply. folder: where /save writes by default."""
    name, _, rest = line.partition(" ")
    match name, rest.strip():
        case "/clear", _:
            session.clear()
            return "(cleared)"
        case "/system", "":
            return session.system or "(no system message)"
        case "/system", text:
            session.system = text
            session.clear()
            return "(system message set, conversation cleared)"
        case "/save", _ if not session.messages:
            raise ValueError("there is no conversation to save yet")
        case "/save", given:
            unused = (path for n in count(1) if not (path := folder / f"chat-{n}.json").exists())
            path = Path(given).expanduser().absolute() if given else next(unused).absolute()
            if path.exists():
                raise ValueError(f"{path} exists; give another name: /save PATH")
            rundir.write_json(path, {"messages": session.transcript()})
            return f"(saved to {path})"
        case "/help", _:
            return HELP
    known = "there are /clear, /system, /save, /help (a space in front sends it as text)"
    raise ValueError(f"there is no command {name}; {known}")
