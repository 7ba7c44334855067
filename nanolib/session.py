"""Chat sessions, used by the command line, the web page and the notebook widget.

    session = Session.open(run)
    for piece in session.stream("Where does Ada live?"):
        print(piece, end="", flush=True)

Special tokens typed by the user are treated as ordinary text. Python written by the model runs in
the session's own sandbox.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import weakref
from collections.abc import Generator
from dataclasses import KW_ONLY, dataclass, field
from itertools import chain
from typing import Any, Self

from nanolib import checkpoint
from nanolib.config import MODELS
from nanolib.conversation import AnswerParser, Conversation, Message, Part
from nanolib.engine import Engine
from nanolib.rundir import Run
from nanolib.runtime import Runtime, seed_of
from nanolib.tokenizer import Tokenizer
from nanolib.tools import Sandbox


@dataclass(eq=False)
class Session:
    """A conversation in progress."""

    engine: Engine
    system: str | None = None
    _: KW_ONLY
    temperature: float = 0.6
    top_k: int | None = 50
    max_new_tokens: int = 256
    seed: int = 1
    messages: list[Message] = field(default_factory=list)  # without the system message
    answer: list[Part] = field(default_factory=list)  # the latest answer so far
    notice: str | None = None  # shown to the user with the answer
    of: str | None = None  # the stage whose model `open` loaded
    _left_out = 0  # truncated messages already reported to the user
    _close: weakref.finalize | None = None  # closes the sandbox that `open` started

    @classmethod
    def open(cls, run: Run, of: str | None = None, **settings) -> Session:
        """Load the model of a run's stage `of` (None: the last one trained) and start a sandbox;
        close the session or use ``with``. ValueError if there is no such model yet."""
        of = stage_with_model(run, of, "to talk to")
        runtime = Runtime.start(run.config.machine)
        model = checkpoint.load_model(run.stage(of).checkpoints, runtime.device)
        tokenizer = Tokenizer.load(run.stage("tokenizer").path / "tokenizer.json")
        sandbox = Sandbox(workers=1).__enter__()
        engine = Engine(model, tokenizer, runtime, lambda source: sandbox.run(source).text)
        return cls(engine, of=of, _close=weakref.finalize(engine, sandbox.close), **settings)

    def close(self, *_: object) -> None:
        """Close the sandbox; otherwise it is closed when the engine is collected."""
        if self._close is not None:
            self._close()

    def __enter__(self) -> Self:
        return self

    __exit__ = close

    # ------------------------------------------------------------------------ talking

    def stream(self, text: str) -> Generator[str]:
        """Like `parts`, but as plain text: ``[python]`` and ``[output]`` labels on new lines."""
        return _labelled(self.parts(text))

    def parts(self, text: str) -> Generator[Part]:
        """Send `text` and yield the answer in pieces, as from `AnswerParser`. Closing the iterator
        stops and keeps the partial answer in `messages`. ValueError if `text` is too long."""
        question = Message("user", (Part("text", text),))
        return self._answer(question, self.prompt(question))

    def ask(self, text: str) -> str:
        """Send `text`, print question and answer, return the answer."""
        answer = "".join(self.stream(text)).strip()
        notice = f"({self.notice})\n" if self.notice else ""
        print(f"{notice}you: {text}\nmodel: {answer}")
        return answer

    def clear(self) -> None:
        """Forget the history; the system message stays."""
        self.messages, self.notice, self._left_out = [], None, 0

    def transcript(self) -> list[dict[str, Any]]:
        """The whole conversation, for `Conversation.from_messages`."""
        messages = [*self._system(), *self.messages]
        return [{"role": message.role, "content": message.content} for message in messages]

    # ------------------------------------------------------------------------ prompt and sampling

    def prompt(self, question: Message) -> list[int]:
        """Token ids of the question and as much history as fits beside an answer."""
        tokenizer, context = self.engine.tokenizer, self.engine.context
        room = context - min(self.max_new_tokens, context // 4)
        encode = functools.cache(tokenizer.encode)

        def prompt(left_out: int) -> list[int]:
            turns = (*self._system(), *self.messages[left_out:], question)
            return Conversation(turns).prompt(tokenizer, encode)

        choices = range(0, len(self.messages) + 1, 2)
        found = bisect.bisect_left(choices, True, key=lambda n: len(prompt(n)) <= room)
        if found == len(choices):
            size = f"{len(prompt(choices[-1]))} tokens where a context of {context} leaves {room}"
            raise ValueError(f"the message is too long: {size} beside an answer; shorten it")
        left_out, before = choices[found], self._left_out
        self._left_out = left_out
        full = f"the conversation no longer fits the context of {context} tokens"
        unseen = f"{full}: the model does not see its first {left_out} messages"
        self.notice = unseen if left_out > before else None
        return prompt(left_out)

    def sampling(self) -> dict[str, Any]:
        """Engine settings for the next answer."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k or None,
            "seeds": [seed_of(self.seed, "turn", len(self.messages))],
            "keep": True,
        }

    def _system(self) -> list[Message]:
        return [Message("system", (Part("text", self.system),))] if self.system else []

    def _answer(self, question: Message, prompt: list[int]) -> Generator[Part]:
        """Stream the answer, then add both turns to `messages`, even if it is interrupted."""
        steps = self.engine.generate([prompt], **self.sampling())
        parser, finished = AnswerParser(self.engine.tokenizer), False
        self.answer = parser.parts
        try:
            for token in chain.from_iterable(steps):
                if token.kind == "end":
                    break
                yield from parser.feed(token.id)
            else:
                limit = min(self.max_new_tokens, self.engine.context - len(prompt))
                reached = f"the answer reached its limit of {limit} tokens"
                self.notice = "; ".join(filter(None, [self.notice, reached]))
            finished = True
            yield from parser.finish()
        finally:
            if parser.parts or finished:  # nothing is kept if stopped before the first piece
                self.messages += [question, Message("assistant", tuple(parser.parts))]


def stage_with_model(run: Run, of: str | None, purpose: str) -> str:
    """Returns `of`, or by default the run's last stage with a saved model; ValueError if there is
    none. purpose: for the error message, such as "to talk to"."""
    if of not in (None, *MODELS):
        raise ValueError(f"stage {of!r} leaves no model {purpose}; try {' or '.join(MODELS)}")
    has = [name for name in MODELS if any(run.stage(name).checkpoints.glob("step_????????"))]
    if not has or of not in (None, *has):
        lacks = f"run {run.id!r} has no {of or 'trained'} model {purpose} yet"
        remedy = f"finish it first: nanolib run {run.config.profile} --run {run.name}"
        raise ValueError(f"{lacks}; {remedy} (it has {' and '.join(has) or 'none'})")
    return of or has[-1]


def _labelled(pieces: Generator[Part]) -> Generator[str]:
    """Pieces as plain text, with labels, and a line break where the kind changes."""
    kind = "text"
    with contextlib.closing(pieces):  # closing this generator stops the answer at once
        for piece in pieces:
            label = "" if piece.text else f"[{piece.kind}] "
            yield ("\n" if label or piece.kind != kind else "") + label + piece.text
            kind = piece.kind
