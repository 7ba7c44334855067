"""The web page of ``nanolib serve``: a chat that streams, on this machine alone.

The page holds the conversation and sends all of it with each question; the server keeps nothing
between two requests, so a tab is a conversation and a restart loses none. An answer comes as lines
of JSON (see `ChatQueue.lines`). Answers are written one at a time, in the order they were asked for;
whoever closes the connection stops theirs.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
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
from starlette.datastructures import Headers, MutableHeaders

from nanolib.conversation import Conversation, Part
from nanolib.rundir import Run
from nanolib.session import Session
from nanolib.ui import markup

BODY_BYTES = 1024 * 1024
MESSAGES = 1000
PAUSE = 0.05  # seconds between two redraws of an answer
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
OPTIONS = {"temperature": (0, 5), "top_k": (1, 2**20), "seed": (0, 2**53)}  # and their bounds
_log = logging.getLogger(__name__)


def serve(
    run: Run,
    of: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    temperature: float = 0.6,
) -> None:
    """Serve the chat with a run's model until Ctrl-C (KeyboardInterrupt); port 0: any free one.

    Raises ValueError, before any model is loaded, where the port cannot be had.
    """

    class Server(uvicorn.Server):
        def handle_exit(self, sig, frame) -> None:
            app.state.chats.stop()  # or it would wait for the answers' ends
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
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise ValueError(f"port {port} is in use; choose another with --port") from None
        raise ValueError(
            f"cannot listen on port {port} of {host!r} ({error}); choose another with --port or "
            "--host"
        ) from None


# ---------------------------------------------------------------------------- what is asked


def read_question(body: bytes) -> tuple[Conversation, dict[str, Any]]:
    """Read ``{"messages": [{"role", "content"}, …], "temperature", "top_k", "seed"}``.

    What was said, the question last, and the options that are given. Raises ValueError that says
    what is wrong and how it should be.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body must be JSON: {error}") from None
    if not isinstance(asked, dict) or not isinstance(asked.get("messages"), list):
        raise ValueError('the body must be an object with a list of "messages"')
    if unknown := set(asked) - {"messages", *OPTIONS}:
        raise ValueError(
            f"unknown {', '.join(map(repr, sorted(unknown)))}; there are messages, "
            + ", ".join(OPTIONS)
        )
    if len(asked["messages"]) > MESSAGES:
        raise ValueError(
            f"at most {MESSAGES} messages, got {len(asked['messages'])}; start a new chat"
        )
    for number, message in enumerate(asked["messages"], 1):
        _check_message(number, message)
    conversation = Conversation.from_messages(asked["messages"])
    last = conversation.messages[-1]
    if last.role != "user":
        raise ValueError("the last message must be the user's: there is nothing to answer")
    if not last.text.strip():
        raise ValueError("the last message is empty; say something")
    return conversation, _options(asked)


def _check_message(number: int, message: Any) -> None:
    """The schema; what roles and parts there are, and their order, the conversation knows."""
    try:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        words = [message["role"], *(part[key] for part in parts for key in ("type", "text"))]
        whole = "".join(words)
    except (KeyError, TypeError):
        raise ValueError(
            f'message {number} must be {{"role": …, "content": text or a list of '
            '{"type": "text", "python" or "output", "text": …}}'
        ) from None
    try:
        whole.encode()
    except UnicodeEncodeError:
        raise ValueError(f"message {number} has half a character (a lone surrogate)") from None


def _options(asked: dict[str, Any]) -> dict[str, Any]:
    """Those given, each within its bounds."""
    options = {name: asked[name] for name in OPTIONS if name in asked}
    for name, value in options.items():
        least, most = OPTIONS[name]
        kinds, what = [int], "a whole number"
        if name == "temperature":
            kinds, what = [int, float], "a number"
        if name == "top_k" and value is None:
            continue
        if type(value) not in kinds or not least <= value <= most:
            raise ValueError(f"{name} must be {what} from {least} to {most}, got {value!r}")
    return options


# ---------------------------------------------------------------------------- what is answered


class ChatQueue:
    """Where questions wait for a session's engine: one thread answers them in turn.

    The session's settings hold where a question has none of its own.
    """

    def __init__(self, session: Session):
        self.engine = session.engine
        self.defaults = {name: getattr(session, name) for name in ("max_new_tokens", *OPTIONS)}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nanolib-engine")
        self._stops: set[threading.Event] = set()  # one an answer that is waited for

    def stop(self) -> None:
        """Stop every answer, those that wait included."""
        for stop in tuple(self._stops):
            stop.set()

    def close(self) -> None:
        """Stop every answer and wait until the engine is at rest."""
        self.stop()
        self._thread.shutdown()

    async def chat(self, request: Request) -> Response:
        """Answer a question (`read_question`), or say what is wrong with it."""
        # Another site's page can send no such type without asking first, and is refused then.
        if request.headers.get("content-type", "").split(";")[0] != "application/json":
            return _refusal(415, "the content-type must be application/json")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > BODY_BYTES:
                return _refusal(413, f"the body is over {BODY_BYTES} bytes; start a new chat")
        try:
            question = read_question(bytes(body))
        except ValueError as error:
            return _refusal(400, error)
        try:
            answer = await asyncio.to_thread(self.open, *question)
        except ValueError as error:
            return _refusal(413, error)
        return StreamingResponse(self.lines(*answer), media_type="application/x-ndjson")

    def open(self, asked: Conversation, options: dict[str, Any]) -> tuple[Session, Generator[Part]]:
        """A session that knows the history, about to answer; ValueError where it does not fit."""
        system = next((m.text for m in asked.messages if m.role == "system"), None)
        session = Session(self.engine, system, **(self.defaults | options))
        *history, last = asked.turns
        session.messages = history
        return session, session.parts(last.text)

    async def lines(self, session: Session, pieces: Generator[Part]) -> AsyncIterator[str]:
        """The answer as lines of JSON; leaving the iterator stops it.

        ``{"type": "wait"}``: another is being answered. ``piece`` with "kind" and "text": what is
        new. ``html``: all so far, as "html". Then ``done`` with "html", "parts" and "notice" (or
        null), or ``error`` with "error".
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
        self._stops.add(stop)  # before the first line: an answer whose client has it can be stopped
        self._thread.submit(write)
        try:
            if waits:
                yield _line(type="wait")
            async for line in _lines(queue, session):
                yield line
        finally:
            stop.set()


async def _lines(queue: asyncio.Queue, session: Session) -> AsyncIterator[str]:
    """The lines of the events in the queue, each with the answer so far; a batch every `PAUSE` s."""
    while True:
        batch = [await queue.get()]
        while not queue.empty():
            batch.append(queue.get_nowait())
        for event, parts in batch:
            if event["type"] == "done":
                said = [{"type": part.kind, "text": part.text} for part in parts]
                event |= {
                    "html": markup.answer_html(parts),
                    "parts": said,
                    "notice": session.notice,
                }
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
    """The app around a session's engine and settings (`ChatQueue`).

    about: what ``/info`` tells besides. local: only requests addressed to this machine by a
    loopback name are served, so that no foreign page can reach it by a name of its own.
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
    app.add_middleware(_Guard, local=local, policy=policy)
    app.post("/chat")(chats.chat)

    @app.get("/")
    def index() -> Response:
        return HTMLResponse(page)

    @app.get("/info")
    def info() -> dict[str, Any]:
        return about

    return app


def _page() -> tuple[str, str]:
    """The page, and a policy for browsers: its own script and style, its own server, no more."""
    page = Path(__file__).with_name("index.html").read_text(encoding="utf-8")
    page = page.replace("/* what was said */", markup.CSS)

    def only(tag: str) -> str:
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = hashlib.sha256(inside.encode()).digest()
        return f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'"

    rules = ("default-src 'none'", only("script"), only("style"), "connect-src 'self'")
    rules += ("img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'")
    return page, "; ".join(rules)


class _Guard:
    """Turns away who asks for another host (DNS rebinding), and adds headers for browsers.

    Plain ASGI: what wraps a stream in FastAPI's own way does not hear when a reader leaves.
    """

    def __init__(self, app: Any, *, local: bool, policy: str):
        self.app, self.local = app, local
        self.headers = {
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-store",
        }

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        app = self.app
        if scope["type"] == "http" and self.local:
            hosts = Headers(scope=scope).getlist("host")
            if len(hosts) != 1 or re.sub(r":\d+$", "", hosts[0]).lower() not in LOOPBACK:
                app = _refusal(403, f"ask for {' or '.join(LOOPBACK)}, not for {hosts}")
        await app(scope, receive, send_with_headers)
