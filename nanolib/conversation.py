"""The format of conversations, used by every stage, evaluation and user interface.

    <|bos|> <|user_start|> text <|user_end|> <|assistant_start|> parts <|assistant_end|> …

An assistant's parts are text, ``<|python_start|> source <|python_end|>`` and ``<|output_start|>
printed <|output_end|>``. The loss covers assistant tokens, their markers included, but not outputs.
A system message is prepended to the first user message. Special tokens in text are plain text.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from nanolib.tokenizer import SPECIAL_TOKENS, Tokenizer

PartKind = Literal["text", "python", "output"]
Role = Literal["system", "user", "assistant"]
Encode = Callable[[str], list[int]]
PART_KINDS, ROLES = get_args(PartKind), get_args(Role)
LETTERS = "ABCDEFGH"
# Tokens that end the assistant's turn; an answer never contains them.
END_NAMES = ("<|assistant_end|>", *SPECIAL_TOKENS[:4])
# Kind of part that follows each marker token.
MARKERS: dict[str, PartKind] = {
    "<|python_start|>": "python",
    "<|python_end|>": "text",
    "<|output_start|>": "output",
    "<|output_end|>": "text",
}


@dataclass(frozen=True)
class Part:
    kind: PartKind
    text: str

    def __post_init__(self) -> None:
        if self.kind not in PART_KINDS:
            raise ValueError(f"a part must be one of {', '.join(PART_KINDS)}, got {self.kind!r}")


@dataclass(frozen=True)
class Message:
    """One turn, normalised: adjacent text parts are joined and empty ones dropped."""

    role: Role
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"a role must be one of {', '.join(ROLES)}, got {self.role!r}")
        for part in self.parts:
            if self.role != "assistant" and part.kind != "text":
                raise ValueError(f"only the assistant has {part.kind} parts, not the {self.role}")
        joined: list[Part] = []
        for part in self.parts:
            if part.kind == "text" and joined and joined[-1].kind == "text":
                joined[-1] = Part("text", joined[-1].text + part.text)
            elif part.kind != "text" or part.text:
                joined.append(part)
        object.__setattr__(self, "parts", tuple(joined))

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if part.kind == "text")

    @property
    def content(self) -> str | list[dict[str, str]]:
        """The text, or a list of all parts if any is not text."""
        if all(part.kind == "text" for part in self.parts):
            return self.text
        return [{"type": part.kind, "text": part.text} for part in self.parts]


@dataclass(frozen=True)
class Rendered:
    ids: list[int]
    loss_mask: list[bool]  # whether each id is a target of the loss
    cut: int = 0  # number of ids truncated at the end


@dataclass(frozen=True)
class Conversation:
    """An optional system message, then alternating user and assistant; else ValueError."""

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        if not self.turns:
            raise ValueError("a conversation needs at least one message from the user, got none")
        for i, message in enumerate(self.turns):
            if message.role != (expected := ("user", "assistant")[i % 2]):
                where = f"message {i + 1} of a conversation must come from the {expected}"
                got = f"{message.role!r} ({message.text[:40]!r})"
                raise ValueError(f"{where}, got {got}: user and assistant alternate")

    @property
    def turns(self) -> tuple[Message, ...]:
        """The messages without the system message."""
        has_system = bool(self.messages) and self.messages[0].role == "system"
        return self.messages[1:] if has_system else self.messages

    @classmethod
    def from_messages(cls, messages: Sequence[Mapping[str, Any]]) -> Conversation:
        """From ``[{"role": …, "content": text or [{"type": part kind, "text": …}]}]``."""

        def parts(content: Any) -> tuple[Part, ...]:
            if isinstance(content, str):
                return (Part("text", content),)
            return tuple(Part(part["type"], part["text"]) for part in content)

        return cls(tuple(Message(m["role"], parts(m["content"])) for m in messages))

    @classmethod
    def ask(cls, text: str, answer: str | None = None) -> Conversation:
        turns = zip(("user", "assistant"), (text, answer), strict=True)
        return cls(tuple(Message(role, (Part("text", t),)) for role, t in turns if t is not None))

    def folded(self) -> Conversation:
        """A copy with the system message merged into the first user message."""
        if self.turns is self.messages:
            return self
        system, question, *rest = self.messages
        first = Part("text", f"{system.text}\n\n{question.text}")
        return Conversation((Message("user", (first,)), *rest))

    def render(
        self, tokenizer: Tokenizer, max_tokens: int | None = None, encode: Encode | None = None
    ) -> Rendered:
        """Token ids and loss mask, truncated to `max_tokens`. encode: replaces tokenizer.encode."""
        special, encode = tokenizer.special, encode or tokenizer.encode
        pieces = [([tokenizer.bos], False)]  # ids, and whether they are targets of the loss
        for message in self.folded().messages:
            by_assistant = message.role == "assistant"
            pieces.append(([special(f"<|{message.role}_start|>")], False))
            for part in message.parts:
                if part.kind == "text":
                    pieces.append((encode(part.text), by_assistant))
                else:
                    start, end = (special(f"<|{part.kind}_{it}|>") for it in ("start", "end"))
                    pieces.append(([start, *encode(part.text), end], part.kind == "python"))
            pieces.append(([special(f"<|{message.role}_end|>")], by_assistant))
        ids = [id for piece, _ in pieces for id in piece]
        mask = [is_target for piece, is_target in pieces for _ in piece]
        keep = len(ids) if max_tokens is None else min(len(ids), max_tokens)
        return Rendered(ids[:keep], mask[:keep], cut=len(ids) - keep)

    def prompt(self, tokenizer: Tokenizer, encode: Encode | None = None) -> list[int]:
        """Token ids up to and including ``<|assistant_start|>``, to generate an answer from."""
        if self.messages[-1].role != "user":
            raise ValueError("a prompt must end with the user's message; the assistant spoke last")
        ids = self.render(tokenizer, encode=encode).ids
        return [*ids, tokenizer.special("<|assistant_start|>")]


# ---------------------------------------------------------------------------- parsing


class AnswerParser:
    """Incrementally parses an answer from its token ids.

    `feed` and `finish` return new pieces, each with a part's kind and its next whole characters; an
    empty piece opens a python or output part. `parts` is the answer so far. Malformed answers are
    accepted: an end token ends any part, an open part extends to the end, stray closing markers are
    ignored. A string in `stops` ends the answer too; text that may begin one is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.parts: list[Part] = []
        self.ended = False
        self.tokenizer, self._stops = tokenizer, stops
        self._ends = {tokenizer.special(name) for name in END_NAMES}
        self._markers = {tokenizer.special(name): kind for name, kind in MARKERS.items()}
        self.kind: PartKind = "text"
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def feed(self, id: int) -> list[Part]:
        """Add one token; returns the pieces that it completes, none after the end."""
        self.ended = self.ended or id in self._ends
        if self.ended:
            return []
        if id not in self._markers:
            return self._add(self._decoder.decode(self.tokenizer.token_bytes(id)))
        pieces, self.kind = self.finish(), self._markers[id]
        opened = [] if self.kind == "text" else [Part(self.kind, "")]
        self.parts += opened
        return pieces + opened

    def finish(self) -> list[Part]:
        """Flush held-back text (with U+FFFD if the ids end inside a character)."""
        return self._add(self._decoder.decode(b"", final=True), last=True)

    def _add(self, text: str, last: bool = False) -> list[Part]:
        text, self._held = self._held + text, ""
        if self.kind == "text" and self._stops:
            text = self._before_stops(text, last)
        if not text:
            return []
        if self.parts and self.parts[-1].kind == self.kind:
            self.parts[-1] = Part(self.kind, self.parts[-1].text + text)
        else:
            self.parts.append(Part(self.kind, text))
        return [Part(self.kind, text)]

    def _before_stops(self, text: str, last: bool) -> str:
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.ended = True
            self._decoder.reset()
            return text[: min(found)]
        begun = (at for at in range(len(text)) if any(s.startswith(text[at:]) for s in self._stops))
        clear = len(text) if last else next(begun, len(text))
        self._held = text[clear:]
        return text[:clear]


def answer_parts(ids: Iterable[int], tokenizer: Tokenizer) -> tuple[Part, ...]:
    parser = AnswerParser(tokenizer)
    for id in ids:
        parser.feed(id)
    parser.finish()
    return tuple(parser.parts)


# ---------------------------------------------------------------------------- multiple choice


def choice_question(question: str, choices: Sequence[str]) -> str:
    """Format a multiple-choice question, to be answered with a bare letter.

    Unlike a space, a bracket never merges with the letter: it is the same token as in the answer.
    """
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"a question needs 2 to {len(LETTERS)} choices, got {len(choices)}")
    lines = [f"{choice} ({letter})" for choice, letter in zip(choices, LETTERS, strict=False)]
    return "\n".join([question, *lines, "Which letter?"])
