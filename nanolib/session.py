"""One conversation with one model: the only way for any user interface to talk.

    session = Session.open(run)
    for piece in session.stream("Where does Ada live?"):
        print(piece, end="", flush=True)

The text that comes out is whole characters; what a user types is ordinary text, special tokens
included. Python that the model writes runs in a sandbox of the session's own.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Self

from nanolib import checkpoint
from nanolib.config import MODELS
from nanolib.conversation import Conversation, Message, Part, answer_parts
from nanolib.engine import Engine, Token
from nanolib.rundir import Run
from nanolib.runtime import Runtime, seed_of
from nanolib.tokenizer import Tokenizer
from nanolib.tools import Sandbox


class Session:
    """A conversation in progress.

    `messages` is everything said so far, without the system message. `notice` is what a user
    interface should say besides the present answer, or None; complete once the answer is.
    """

    def __init__(
        self,
        engine: Engine,
        system: str | None = None,
        *,
        temperature: float = 0.6,
        top_k: int | None = 50,
        max_new_tokens: int = 256,
        seed: int = 1,
    ):
        self.engine, self.system = engine, system
        self.temperature, self.top_k = temperature, top_k
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.messages: list[Message] = []
        self.notice: str | None = None
        self.of: str | None = None  # the stage whose model speaks, where `open` chose it
        self._left_out = 0  # of the messages, as last told
        self._close: weakref.finalize | None = None  # ends the sandbox, where `open` made one

    @classmethod
    def open(cls, run: Run, of: str | None = None, **settings) -> Session:
        """Talk to the model of stage `of` of a run; None: the newest kind it has.

        settings: as for the constructor. The session has a sandbox: close it, or leave that to
        ``with``. Raises ValueError where there is no model yet.
        """
        of = speaker(run, of, "to talk to")
        runtime = Runtime.start(run.config.machine)
        model = checkpoint.load_model(run.stage(of).checkpoints, runtime.device)
        tokenizer = Tokenizer.load(run.stage("tokenizer").path / "tokenizer.json")
        sandbox = Sandbox(workers=1).__enter__()
        engine = Engine(model, tokenizer, runtime, lambda source: sandbox.run(source).text)
        session = cls(engine, **settings)
        session.of, session._close = of, weakref.finalize(engine, sandbox.close)
        return session

    def close(self) -> None:
        """End the sandbox that `open` made; a program would be an error from now on.

        Where nobody closes a session, it ends with the engine or, at the latest, with Python.
        """
        if self._close is not None:
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------ talking

    def stream(self, text: str) -> Generator[str]:
        """Say `text`; the answer comes piece by piece, whatever kind of part it belongs to.

        Python and its output are announced by ``[python]`` or ``[output]`` on a new line;
        `parts` gives the same with kinds. See there for stopping and errors.
        """
        return _labelled(self.parts(text))

    def parts(self, text: str) -> Generator[Part]:
        """Say `text`; the answer comes as pieces of parts, a kind and its next characters each.

        Closing the iterator stops the answer; what was said until then stays in `messages`. Raises
        ValueError, before anything is generated, for a text that does not fit the context.
        """
        said = Message("user", (Part("text", text),))
        prompt = self._prompt(said)
        return self._answer(said, prompt)

    def ask(self, text: str) -> str:
        """Say `text`, print both sides, return the answer."""
        answer = "".join(self.stream(text)).strip()
        notice = f"({self.notice})\n" if self.notice else ""
        print(f"{notice}you: {text}\nmodel: {answer}")
        return answer

    def clear(self) -> None:
        """Forget what was said; the system message stays."""
        self.messages, self.notice, self._left_out = [], None, 0

    def transcript(self) -> list[dict[str, Any]]:
        """What was said, the system message first, in the hub's schema.

        `Conversation.from_messages` reads it back.
        """
        return [
            {"role": message.role, "content": _content(message)}
            for message in (*self._system(), *self.messages)
        ]

    # ------------------------------------------------------------------------ how

    def _prompt(self, said: Message) -> list[int]:
        """The newest turns that leave room for an answer, and `said`; tells what is left out."""
        context = self.engine.context
        room = context - min(self.max_new_tokens, context // 4)
        for left_out in range(0, len(self.messages) + 1, 2):
            turns = [*self._system(), *self.messages[left_out:], said]
            prompt = Conversation(tuple(turns)).prompt(self.engine.tokenizer)
            if len(prompt) <= room:
                break
        else:
            raise ValueError(
                f"the message is too long: {len(prompt)} tokens with what surrounds it, and the "
                f"context of {context} leaves {room} beside an answer; shorten it"
            )
        self.notice = None
        if left_out > self._left_out:
            self._tell(
                f"the conversation no longer fits the context of {context} tokens: the model does "
                f"not see its first {left_out} messages"
            )
        self._left_out = left_out
        return prompt

    def _system(self) -> list[Message]:
        return [Message("system", (Part("text", self.system),))] if self.system else []

    def _answer(self, said: Message, prompt: list[int]) -> Generator[Part]:
        """Stream the answer, and put both turns into `messages` however it ends."""
        tokenizer, ids = self.engine.tokenizer, []
        shown: tuple[Part, ...] = ()
        finished = False
        try:
            for token in self._tokens(prompt):
                if token.kind == "end":
                    break
                ids.append(token.id)
                before, shown = shown, _whole(answer_parts(ids, tokenizer))
                yield from _news(before, shown)
            else:
                self._tell(f"the answer reached its limit of {len(ids)} tokens")
            finished = True
            before, shown = shown, answer_parts(ids, tokenizer)
            yield from _news(before, shown)
        finally:
            if shown or finished:  # a question stopped before the first word was never asked
                self.messages += [said, Message("assistant", shown)]

    def _tokens(self, prompt: list[int]) -> Iterator[Token]:
        steps = self.engine.generate(
            [prompt],
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            seeds=[seed_of(self.seed, "turn", len(self.messages))],
        )
        return (token for step in steps for token in step)

    def _tell(self, notice: str) -> None:
        self.notice = notice if self.notice is None else f"{self.notice}; {notice}"


def speaker(run: Run, of: str | None, purpose: str) -> str:
    """The stage whose model is meant: `of`, or the last one that the run has a model of (None).

    purpose: such as "to talk to", for the ValueError where there is no such model.
    """
    if of not in (None, *MODELS):
        raise ValueError(f"stage {of!r} leaves no model {purpose}; try {' or '.join(MODELS)}")
    has = [name for name in MODELS if any(run.stage(name).checkpoints.glob("step_????????"))]
    if not has or of not in (None, *has):
        raise ValueError(
            f"run {run.id!r} has no {of or 'trained'} model {purpose} yet; finish it first: nanolib "
            f"run {run.config.profile} --run {run.name} (it has {' and '.join(has) or 'none'})"
        )
    return of or has[-1]


def _content(message: Message) -> str | list[dict[str, str]]:
    """A message's text, or its parts where some are not text."""
    if all(part.kind == "text" for part in message.parts):
        return message.text
    return [{"type": part.kind, "text": part.text} for part in message.parts]


def _whole(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """Parts so far without a last character that may still be incomplete (decoded as U+FFFD)."""
    if not parts or not parts[-1].text.endswith("\ufffd"):
        return parts
    last = Part(parts[-1].kind, parts[-1].text.rstrip("\ufffd"))
    return parts[:-1] if last == Part("text", "") else (*parts[:-1], last)


def _news(before: tuple[Part, ...], now: tuple[Part, ...]) -> Iterator[Part]:
    """What `now`, which goes on from `before`, adds to it; an opened part is news even if empty."""
    for number, part in enumerate(now):
        known = before[number].text if number < len(before) else None
        if known is None or part.text != known:
            yield Part(part.kind, part.text[len(known or "") :])


def grown(parts: Sequence[Part], piece: Part) -> list[Part]:
    """An answer's parts so far with the next of `Session.parts`; an empty one opens a part."""
    if parts and piece.text and parts[-1].kind == piece.kind:
        return [*parts[:-1], Part(piece.kind, parts[-1].text + piece.text)]
    return [*parts, piece]


def _labelled(pieces: Generator[Part]) -> Generator[str]:
    """Pieces as plain text; a part that is not text is announced on a line of its own."""
    kind = "text"
    with contextlib.closing(pieces):  # stopping us stops the answer at once
        for piece in pieces:
            if piece.kind != kind or not (kind == "text" or piece.text):  # a new part
                kind = piece.kind
                yield "\n" if kind == "text" else f"\n[{kind}] "
            yield piece.text
