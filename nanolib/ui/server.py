"""The web page of ``nanolib serve``: a chat that streams, on this machine alone.

The page holds the conversation and sends all of it with each question; the server keeps nothing
between two requests, so a tab is a conversation and a restart loses none. An answer comes as lines
of JSON (see `Desk.lines`). Answers are written one at a time, in the order they were asked for;
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
from collections.abc import AsyncIterator, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from nanolib.conversation import Conversation, Message, Part
from nanolib.engine import Engine
from nanolib.rundir import Run
from nanolib.session import Session
from nanolib.ui import markup

BODY_BYTES = 1024 * 1024
MESSAGES = 1000
PAUSE = 0.05  # seconds between two redraws of an answer
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
OPTIONS = ("temperature", "top_k", "seed")
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
            app.state.desk.stop()  # or it would wait for the answers' ends
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


@dataclass(frozen=True)
class Question:
    """A checked request: what was said before, what is said now, and how to answer."""

    system: str | None
    history: tuple[Message, ...]
    text: str
    options: dict[str, Any]


def read_question(body: bytes) -> Question:
    """Read ``{"messages": [{"role", "content"}, …], "temperature", "top_k", "seed"}``.

    The last message is the user's; options may be left out. Raises ValueError that says what is
    wrong and how it should be.
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
    *history, last = conversation.turns
    if last.role != "user":
        raise ValueError("the last message must be the user's: there is nothing to answer")
    if not last.text.strip():
        raise ValueError("the last message is empty; say something")
    first = conversation.messages[0]
    system = first.text or None if first.role == "system" else None
    return Question(system, tuple(history), last.text, _options(asked))


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
    bounds = {"temperature": (0, 5), "top_k": (1, 2**20), "seed": (0, 2**53)}
    for name, value in options.items():
        least, most = bounds[name]
        if name == "top_k" and value is None:
            continue
        kinds, what = (
            ((int, float), "a number") if name == "temperature" else (int, "a whole number")
        )
        fits = isinstance(value, kinds) and not isinstance(value, bool)
        if not fits or not least <= value <= most:
            raise ValueError(f"{name} must be {what} from {least} to {most}, got {value!r}")
    return options


# ---------------------------------------------------------------------------- what is answered


class Desk:
    """Where questions wait for the engine: one thread answers them in turn."""

    def __init__(self, engine: Engine, defaults: dict[str, Any]):
        self.engine, self.defaults = engine, defaults
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

    def open(self, question: Question) -> tuple[Session, Generator[Part]]:
        """A session that knows the history, about to answer; ValueError where it does not fit."""
        session = Session(self.engine, question.system, **(self.defaults | question.options))
        session.messages = list(question.history)
        return session, session.parts(question.text)

    async def lines(self, session: Session, pieces: Generator[Part]) -> AsyncIterator[str]:
        """The answer as lines of JSON; leaving the iterator stops it.

        ``{"type": "wait"}``: another is being answered. ``piece`` with "kind" and "text": what is
        new. ``html``: all so far, as "html". Then ``done`` with "html", "parts" and "notice" (or
        null), or ``error`` with "error".
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()
        stop = threading.Event()

        def write() -> None:
            end = {"type": "done"}
            try:
                with contextlib.closing(pieces):
                    for piece in pieces if not stop.is_set() else ():
                        loop.call_soon_threadsafe(queue.put_nowait, piece)
                        if stop.is_set():
                            break
            except Exception as error:
                _log.exception("an answer failed")
                end = {"type": "error", "error": f"{type(error).__name__}: {error}"}
            self._stops.discard(stop)
            loop.call_soon_threadsafe(queue.put_nowait, end)

        waits = bool(self._stops)
        self._stops.add(stop)  # before the first line: who has read one can be stopped
        self._thread.submit(write)
        try:
            if waits:
                yield _line(type="wait")
            async for line in _news(queue, session):
                yield line
        finally:
            stop.set()


async def _news(queue: asyncio.Queue, session: Session) -> AsyncIterator[str]:
    """The lines that what comes through the queue makes, in a batch every `PAUSE` seconds."""
    shown: list[Part] = []
    while True:
        batch = [await queue.get()]
        while not queue.empty():
            batch.append(queue.get_nowait())
        for item in batch:
            if isinstance(item, Part):
                shown = _added(shown, item)
                yield _line(type="piece", kind=item.kind, text=item.text)
            elif item["type"] == "error":
                yield _line(**item)
                return
            else:
                parts = [{"type": part.kind, "text": part.text} for part in shown]
                html = markup.answer_html(shown)
                yield _line(type="done", html=html, parts=parts, notice=session.notice)
                return
        yield _line(type="html", html=markup.answer_html(shown))
        await asyncio.sleep(PAUSE)


def _added(parts: Sequence[Part], piece: Part) -> list[Part]:
    if parts and parts[-1].kind == piece.kind:
        return [*parts[:-1], Part(piece.kind, parts[-1].text + piece.text)]
    return [*parts, piece]


def _line(**event: Any) -> str:
    return json.dumps(event, ensure_ascii=False) + "\n"


# ---------------------------------------------------------------------------- the server


def build(session: Session, about: dict[str, Any], *, local: bool = True) -> FastAPI:
    """The app around a session's engine, with the session's settings as defaults.

    about: what ``/info`` tells besides. local: only requests addressed to this machine by a
    loopback name are served, so that no foreign page can reach it by a name of its own.
    """
    engine = session.engine
    defaults = {name: getattr(session, name) for name in ("max_new_tokens", *OPTIONS)}
    desk = Desk(engine, defaults)
    page, policy = _page()
    about = {**about, "context": engine.context, "temperature": session.temperature}

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        await asyncio.to_thread(desk.close)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.desk = desk
    app.add_middleware(_Guard, local=local, policy=policy)

    def refuse(status: int, error: object) -> Response:
        return JSONResponse({"error": str(error)}, status)

    @app.get("/")
    def index() -> Response:
        return HTMLResponse(page)

    @app.get("/info")
    def info() -> dict[str, Any]:
        return about

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/chat")
    async def chat(request: Request) -> Response:
        # Another site's page can send no such type without asking first, and is refused then.
        if request.headers.get("content-type", "").split(";")[0] != "application/json":
            return refuse(415, "the content-type must be application/json")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > BODY_BYTES:
                return refuse(413, f"the body is over {BODY_BYTES} bytes; start a new chat")
        try:
            question = read_question(bytes(body))
        except ValueError as error:
            return refuse(400, error)
        try:
            answer = await asyncio.to_thread(desk.open, question)
        except ValueError as error:
            return refuse(413, error)
        return StreamingResponse(desk.lines(*answer), media_type="application/x-ndjson")

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
        self.headers = [
            (b"content-security-policy", policy.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"cache-control", b"no-store"),
        ]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self.headers]
            await send(message)

        app = self.app
        if scope["type"] == "http" and self.local:
            hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            if len(hosts) != 1 or re.sub(r":\d+$", "", hosts[0]).lower() not in LOOPBACK:
                names = " or ".join(LOOPBACK)
                app = JSONResponse({"error": f"ask for {names}, not for {hosts}"}, 403)
        await app(scope, receive, send_with_headers)
