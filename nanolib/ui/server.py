"""The server of ``nanolib serve``: a web page that streams a chat, by default for this machine only.

The page holds the conversation and sends all of it with each question. The server keeps no state
between requests, so each tab is a conversation of its own and a restart loses none. An answer is
sent as lines of JSON (see `ChatQueue.lines`). Questions are answered one at a time, in order;
closing the connection stops the answer.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import re
import socket
import threading
from collections.abc import AsyncIterator, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field, ValidationError
from starlette.datastructures import Headers, MutableHeaders

from nanolib.conversation import Conversation, Part
from nanolib.rundir import Run
from nanolib.session import Session
from nanolib.ui import markup

BODY_BYTES = 1024 * 1024
PAUSE = 0.05  # seconds between two updates of an answer
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_log = logging.getLogger(__name__)


def serve(
    run: Run,
    of: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    temperature: float = 0.6,
) -> None:
    """Serve a chat with a run's model until Ctrl-C (KeyboardInterrupt); port 0 takes a free one.

    Raises ValueError, before any model is loaded, if the port is not available.
    """

    class Server(uvicorn.Server):
        def handle_exit(self, sig, frame) -> None:
            app.state.chats.stop()  # or the server would wait for the answers to end
            super().handle_exit(sig, frame)

    with _listen(host, port) as listener, Session.open(run, of, temperature=temperature) as opened:
        app = build(opened, {"run": run.name, "model": opened.of}, local=host in LOOPBACK)
        address = f"http://{host}:{listener.getsockname()[1]}"
        print(f"{run.name}'s {opened.of} model is at {address} (Ctrl-C ends)", flush=True)
        if host not in LOOPBACK:
            print("everyone who reaches this machine can talk to it: there is no password")
        config = uvicorn.Config(
            app, log_level="warning", server_header=False, timeout_graceful_shutdown=2
        )
        Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        reason = f"cannot listen on port {port} of {host!r} ({error})"
        raise ValueError(f"{reason}; choose another with --port or --host") from None


# ---------------------------------------------------------------------------- requests


class Question(BaseModel, strict=True, extra="forbid"):
    """The body of a question; the defaults of its options are the session's.

    A description is what the error says that a field must be.
    """

    messages: list[Any] = Field(max_length=1000)
    temperature: float = Field(0, ge=0, le=5, description="a number from 0 to 5")
    top_k: int | None = Field(0, ge=1, le=2**20, description=f"a whole number from 1 to {2**20}")
    seed: int = Field(0, ge=0, le=2**53, description=f"a whole number from 0 to {2**53}")


def read_question(body: bytes) -> tuple[Conversation, dict[str, Any]]:
    """Read a `Question`: its conversation, which ends with the question, and the options given.

    Raises ValueError that says what is wrong and what is expected.
    """
    try:
        question = Question.model_validate_json(body)
        conversation = Conversation.from_messages(question.messages)
        "".join(part.text for message in conversation.messages for part in message.parts)
    except ValidationError as invalid:
        raise ValueError(_reason(invalid)) from None
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            'a message must be {"role": …, "content": text or a list of '
            '{"type": "text", "python" or "output", "text": …}}'
        ) from None
    last = conversation.messages[-1]
    if last.role != "user":
        raise ValueError("the last message must be the user's: there is nothing to answer")
    if not last.text.strip():
        raise ValueError("the last message is empty; say something")
    return conversation, question.model_dump(exclude={"messages"}, exclude_unset=True)


def _reason(invalid: ValidationError) -> str:
    """The first error of a body in one sentence, or all the unknown names."""
    errors, fields = invalid.errors(), Question.model_fields
    if unknown := [error["loc"][0] for error in errors if error["type"] == "extra_forbidden"]:
        return f"unknown {', '.join(map(repr, sorted(unknown)))}; there are {', '.join(fields)}"
    match errors[0]:
        case {"type": "json_invalid", "msg": str(message)} if "hex escape" in message:
            return f"a message has half a character (a lone surrogate): {message}"
        case {"type": "json_invalid", "msg": message}:
            return f"the body must be JSON: {message}"
        case {"type": "too_long", "ctx": {"max_length": most, "actual_length": got}}:
            return f"at most {most} messages, got {got}; start a new chat"
        case {"loc": (str(name), *_), "input": value} if name != "messages":
            return f"{name} must be {fields[name].description}, got {value!r}"
    return 'the body must be an object with a list of "messages"'


# ---------------------------------------------------------------------------- answers


class ChatQueue:
    """Answers questions one at a time on a single thread, with a session's engine.

    The session's settings are the defaults of a question's options.
    """

    def __init__(self, session: Session):
        self.engine = session.engine
        options = ("max_new_tokens", "temperature", "top_k", "seed")
        self.defaults = {name: getattr(session, name) for name in options}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nanolib-engine")
        self._stops: set[threading.Event] = set()  # one per answer not yet finished

    def stop(self) -> None:
        """Stop every answer, also those that are waiting."""
        for stop in tuple(self._stops):
            stop.set()

    def close(self) -> None:
        """Stop every answer and wait until the engine is idle."""
        self.stop()
        self._thread.shutdown()

    async def chat(self, request: Request) -> Response:
        """Answer a question (`read_question`), or refuse it with a reason."""
        # Cross-origin pages cannot send this type without a preflight, which is not granted.
        if request.headers.get("content-type", "").split(";")[0] != "application/json":
            return _refusal(415, "the content-type must be application/json")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > BODY_BYTES:
                return _refusal(413, f"the body is over {BODY_BYTES} bytes; start a new chat")
        try:
            answer = await asyncio.to_thread(self.open, *read_question(bytes(body)))
        except ValueError as error:
            return _refusal(400, error)
        return StreamingResponse(self.lines(*answer), media_type="application/x-ndjson")

    def open(
        self, conversation: Conversation, options: dict[str, Any]
    ) -> tuple[Session, Generator[Part]]:
        """A session with the history, and the pieces of its answer to the question.

        Raises ValueError if the question does not fit the context.
        """
        system = next((m.text for m in conversation.messages if m.role == "system"), None)
        session = Session(self.engine, system, **(self.defaults | options))
        *history, last = conversation.turns
        session.messages = history
        return session, session.parts(last.text)

    async def lines(self, session: Session, pieces: Generator[Part]) -> AsyncIterator[str]:
        """The answer as lines of JSON; closing the iterator stops it.

        ``{"type": "wait"}``: another question is being answered. ``piece`` with "kind" and "text":
        the next piece of the answer. ``html``: the answer so far, as "html". At the end ``done``
        with "html", "parts" and "notice" (or null), or ``error`` with "error".
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()
        stop = threading.Event()

        def write() -> None:
            end: dict[str, Any] = {"type": "done"}
            try:
                with contextlib.closing(pieces):
                    for piece in pieces if not stop.is_set() else ():
                        event = {"type": "piece", "kind": piece.kind, "text": piece.text}
                        loop.call_soon_threadsafe(queue.put_nowait, (event, tuple(session.answer)))
                        if stop.is_set():
                            break
            except Exception as error:
                _log.exception("an answer failed")
                end = {"type": "error", "error": f"{type(error).__name__}: {error}"}
            self._stops.discard(stop)
            loop.call_soon_threadsafe(queue.put_nowait, (end, tuple(session.answer)))

        waits = bool(self._stops)
        self._stops.add(stop)  # before the first line is sent: from then on `stop` must work
        self._thread.submit(write)
        try:
            if waits:
                yield _line(type="wait")
            async for line in _lines(queue, session):
                yield line
        finally:
            stop.set()


async def _lines(queue: asyncio.Queue, session: Session) -> AsyncIterator[str]:
    """Lines for the (event, answer so far) pairs in the queue, in a batch every `PAUSE` seconds."""
    while True:
        batch = [await queue.get()]
        while not queue.empty():
            batch.append(queue.get_nowait())
        for event, parts in batch:
            if event["type"] == "done":
                event["html"] = markup.answer_html(parts)
                event["parts"] = [{"type": part.kind, "text": part.text} for part in parts]
                event["notice"] = session.notice
            yield _line(**event)
            if event["type"] != "piece":
                return
        yield _line(type="html", html=markup.answer_html(batch[-1][1]))
        await asyncio.sleep(PAUSE)


def _line(**event: Any) -> str:
    return json.dumps(event, ensure_ascii=False) + "\n"


def _refusal(status: int, error: object) -> Response:
    return JSONResponse({"error": str(error)}, status)


# ---------------------------------------------------------------------------- the server


def build(session: Session, about: dict[str, Any], *, local: bool = True) -> FastAPI:
    """The app for a session's engine and settings (`ChatQueue`).

    about: more for ``/info`` to return. local: serve only requests whose Host is a loopback name,
    so that another site cannot reach the server through a name of its own (DNS rebinding).
    """
    chats = ChatQueue(session)
    page, policy = _page()
    about = {**about, "context": session.engine.context, "temperature": session.temperature}

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        await asyncio.to_thread(chats.close)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.chats = chats
    app.add_middleware(_guard, local=local, policy=policy)
    app.post("/chat")(chats.chat)
    app.get("/")(lambda: HTMLResponse(page))
    app.get("/info")(lambda: about)
    return app


def _page() -> tuple[str, str]:
    """The page and its content security policy: its own script, style and server, nothing else."""
    page = Path(__file__).with_name("index.html").read_text(encoding="utf-8")
    page = page.replace("/* what was said */", markup.CSS)

    def only(tag: str) -> str:
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = hashlib.sha256(content.encode()).digest()
        return f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'"

    rules = ("default-src 'none'", only("script"), only("style"), "connect-src 'self'")
    rules += ("img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'")
    return page, "; ".join(rules)


def _guard(app: Any, *, local: bool, policy: str) -> Any:
    """Refuse requests for another host (DNS rebinding) and add security headers.

    Plain ASGI, since FastAPI's middleware does not notice when the client of a stream disconnects.
    """
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
    }

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(headers)
            await send(message)

        answer = app
        if scope["type"] == "http" and local:
            hosts = Headers(scope=scope).getlist("host")
            if len(hosts) != 1 or re.sub(r":\d+$", "", hosts[0]).lower() not in LOOPBACK:
                answer = _refusal(403, f"ask for {' or '.join(LOOPBACK)}, not for {hosts}")
        await answer(scope, receive, send_with_headers)

    return guarded
