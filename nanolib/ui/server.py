"""``nanolib serve``: a web page and an OpenAI-compatible API.

    POST /v1/chat/completions · GET /v1/models, /health, /metrics, and / for the page

One thread steps the engine for all requests; a request ends when its client disconnects. The server
is stateless: each request carries the whole conversation. Special tokens typed by a user are plain
text, and none is ever sent. Extensions: requests may set ``top_k`` and ``html``; an answer has its
text in ``content``, text and programs in ``parts``, and warnings in ``notice``.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import logging
import re
import secrets
import signal
import socket
import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import h11
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanolib import engine
from nanolib.conversation import AnswerParser, Conversation, Part
from nanolib.engine import Engine
from nanolib.rundir import Run
from nanolib.session import Session
from nanolib.ui import markup

BODY_BYTES = 1024 * 1024
HEAD_SECONDS = 10  # to receive the headers, and again for the body
ANSWER_SECONDS = 600  # for everything after that
AT_ONCE = 1024  # concurrent answers; beyond that, requests get 429
PAUSE = 0.05  # seconds between two updates of an answer
LOOK = 1  # seconds between checks that a waiting client is still connected
KINDS = {  # metric types of /metrics
    "nanolib_answers": "gauge",
    "nanolib_waiting": "gauge",
    "nanolib_requests_total": "counter",
    "nanolib_tokens_total": "counter",
    "nanolib_first_token_seconds": "summary",
}
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_log = logging.getLogger(__name__)


def serve(run: Run, of: str | None, host: str, port: int, temperature: float, **access) -> None:
    """Serve a run's model until SIGTERM or Ctrl-C (KeyboardInterrupt); port 0 picks a free one.

    access: api_key and cors, as for `build`. ValueError, before the model is loaded, if the port is
    not available.
    """

    class Server(uvicorn.Server):
        def handle_exit(self, sig, frame) -> None:
            app.state.scribe.stop()  # otherwise the server would wait for all answers
            if sig == signal.SIGTERM:
                self.should_exit = True  # exit code 0
            else:
                super().handle_exit(sig, frame)

    with _listen(host, port) as listener, Session.open(run, of, temperature=temperature) as opened:
        name, local = f"{run.name}-{opened.of}", host in LOOPBACK
        app = build(opened, name, local=local, **access)
        address = f"http://{host}:{listener.getsockname()[1]}"
        print(f"{run.name}'s {opened.of} model is at {address} (Ctrl-C ends)", flush=True)
        if not local and access["api_key"] is None:
            print("anyone who can reach this machine can use it; --api-key KEY requires a key")
        Server(config(app)).run(sockets=[listener])


def config(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app, log_level="warning", server_header=False, timeout_graceful_shutdown=10, http=_Protocol
    )


class _Protocol(H11Protocol):
    """Closes a connection that has sent no complete request for `HEAD_SECONDS`."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(HEAD_SECONDS, self._check)

    def _check(self) -> None:
        if self.conn.their_state is h11.IDLE:
            self.transport.close()
        if not self.transport.is_closing():
            self.loop.call_later(HEAD_SECONDS, self._check)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        reason = f"cannot listen on port {port} of {host!r} ({error})"
        raise ValueError(f"{reason}; choose another with --port or --host") from None


# ---------------------------------------------------------------------------- requests

Text = Annotated[str, Field(min_length=1)]
Stops = Annotated[list[Text], BeforeValidator(lambda it: [it] if isinstance(it, str) else it)]


class Piece(BaseModel, strict=True):
    type: Any  # `Part` and `Message` check kinds and roles
    text: str


class Turn(BaseModel, strict=True):
    role: Any
    content: str | list[Piece]


class Question(BaseModel, strict=True, extra="forbid"):
    """The body of a request; None means the server's setting. Error messages quote a field's
    description."""

    messages: list[Turn] = Field(max_length=1000)
    model: str | None = Field(None, description="a text")
    stream: bool | None = Field(None, description="true or false")
    stream_options: dict[str, bool] | None = Field(
        None, description='such as {"include_usage": true}'
    )
    n: int | None = Field(None, ge=1, le=16, description="a whole number from 1 to 16")
    max_tokens: int | None = Field(None, ge=1, description="a whole number from 1")
    max_completion_tokens: int | None = Field(None, ge=1, description="a whole number from 1")
    temperature: float | None = Field(None, ge=0, le=5, description="a number from 0 to 5")
    top_p: float | None = Field(None, ge=0, le=1, description="a number from 0 to 1")
    top_k: int | None = Field(None, ge=0, le=2**20, description="a whole number, 0 for all")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="a whole number of 64 bits")
    stop: Stops | None = Field(
        None, max_length=4, description="a text or up to 4 texts, none empty"
    )
    logprobs: bool | None = Field(None, description="true or false")
    top_logprobs: int | None = Field(None, ge=0, le=0, description="0: only chosen tokens have one")
    html: bool | None = Field(None, description="true or false")
    # Accepted without effect, because many clients send them.
    user: str | None = Field(None, description="a text")
    store: bool | None = Field(None, description="true or false")
    metadata: dict[str, Any] | None = Field(None, description="an object")
    frequency_penalty: float | None = Field(None, ge=0, le=0, description="0: there is no penalty")
    presence_penalty: float | None = Field(None, ge=0, le=0, description="0: there is no penalty")


def read_question(body: bytes) -> tuple[Question, Conversation]:
    """Parse a request; its conversation ends with the question. ValueError says what is wrong."""
    try:
        question = Question.model_validate_json(body)
    except ValidationError as invalid:
        raise ValueError(_reason(invalid)) from None
    for turn in question.messages:
        turn.role = "system" if turn.role == "developer" else turn.role  # the API's newer name
    conversation = Conversation.from_messages([turn.model_dump() for turn in question.messages])
    last = conversation.messages[-1]
    if last.role != "user" or not last.text.strip():
        raise ValueError("the last message must be the user's, and not empty")
    return question, conversation


def _reason(invalid: ValidationError) -> str:
    """A sentence with the first validation error, or with all unknown fields."""
    errors, fields = invalid.errors(), Question.model_fields
    if unknown := [error["loc"][0] for error in errors if error["type"] == "extra_forbidden"]:
        return f"unknown {', '.join(map(repr, sorted(unknown)))}; there are {', '.join(fields)}"
    match errors[0]:
        case {"type": "json_invalid", "msg": str(message)} if "hex escape" in message:
            return f"a message has an invalid character (a lone surrogate): {message}"
        case {"type": "json_invalid", "msg": message}:
            return f"the body must be JSON: {message}"
        case {"loc": ("messages",), "ctx": {"max_length": most, "actual_length": got}}:
            return f"at most {most} messages, got {got}; start a new chat"
        case {"loc": ("messages", _, *_)}:
            content = 'text or a list of {"type": "text", "python" or "output", "text": …}'
            return f'a message must be {{"role": …, "content": {content}}}'
        case {"loc": (str(name), *_), "input": value} if name != "messages":
            return f"{name} must be {fields[name].description}, got {value!r}"
    return 'the body must be an object with a list of "messages"'


# ---------------------------------------------------------------------------- answers


class Scribe:
    """Chat completions from a session's engine; one thread steps it for all requests."""

    def __init__(self, session: Session, name: str):
        self.session, self.engine, self.name = session, session.engine, name
        about = {"temperature": session.temperature, "context": self.engine.context}
        about["created"] = int(time.time())
        self.about = {"id": name, "object": "model", "owned_by": "nanolib", **about}
        self.counts = defaultdict[str, float](float)  # by metric name and labels
        self.rows: dict[engine.Request, asyncio.Event] = {}  # set when there are new tokens
        self.stopped = self._closed = False
        self._wake = threading.Event()

    @contextlib.asynccontextmanager
    async def running(self, _: FastAPI):
        """Run the engine's thread as long as the server (FastAPI's lifespan)."""
        self._loop = asyncio.get_running_loop()
        thread = threading.Thread(target=self._work, name="nanolib-engine", daemon=True)
        thread.start()
        yield
        self.stop()
        self._closed = True
        self._wake.set()
        await asyncio.to_thread(thread.join)

    def stop(self) -> None:
        """Cancel all answers in progress."""
        self.stopped = True
        self.engine.cancel(*self.rows)
        self._tell(list(self.rows))

    @contextlib.contextmanager
    def writing(self, prompt: list[int], news: asyncio.Event, **settings):
        """Submit requests (`Engine.submit`) whose tokens set `news`; cancelled on exit."""
        requests = self.engine.submit([prompt], **settings)
        self.rows |= dict.fromkeys(requests, news)
        if self.stopped:
            self.stop()
        self._wake.set()
        try:
            yield requests
        finally:
            self.engine.cancel(*requests)
            self.counts['nanolib_tokens_total{kind="prompt"}'] += len(prompt)
            for request in requests:
                self.counts['nanolib_tokens_total{kind="answer"}'] += request.taken
                del self.rows[request]

    def _work(self) -> None:
        while not self._closed:
            self._wake.wait()
            self._wake.clear()
            while self.engine.busy:
                try:
                    written = self.engine.step()
                except Exception:
                    _log.exception("a step failed, and with it all answers")
                    written = list(self.rows)  # reading any of them raises the error
                self._loop.call_soon_threadsafe(self._tell, written)

    def _tell(self, written: Sequence[engine.Request]) -> None:
        for request in written:
            if request in self.rows:
                self.rows[request].set()

    async def complete(self, request: Request) -> Response:
        """Answer a `Question`, streamed or in one response."""
        # Pages of other origins cannot send this type without a preflight, which is denied.
        if request.headers.get("content-type", "").split(";")[0] != "application/json":
            raise HTTPException(415, "the content-type must be application/json")
        body = await _body(request)
        try:
            reply = await asyncio.to_thread(self.read, body)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        if reply.question.model not in (None, self.name):
            reason = f"there is no model {reply.question.model!r}; there is {self.name!r}"
            raise HTTPException(404, reason)
        if self.stopped:
            raise HTTPException(503, "the server is shutting down")
        if len(self.rows) + reply.settings["samples"] > AT_ONCE:
            raise HTTPException(429, f"{AT_ONCE} answers are in progress; try again later")
        if reply.question.stream:
            return StreamingResponse(reply.events(), media_type="text/event-stream")
        return await reply.whole(request)

    def read(self, body: bytes) -> Reply:
        """The reply to a body, not generated yet; ValueError if it cannot be answered."""
        given, conversation = read_question(body)
        asked = given.model_dump(include={"temperature", "top_k", "seed"}, exclude_none=True)
        most = given.max_completion_tokens or given.max_tokens or self.session.max_new_tokens
        system = next((m.text for m in conversation.messages if m.role == "system"), None)
        mine = {"system": system, "max_new_tokens": most, "seed": secrets.randbits(63)} | asked
        session = replace(self.session, **mine)
        *session.messages, last = conversation.turns
        prompt = session.prompt(last)
        more = {"samples": given.n or 1, "top_p": 1.0 if given.top_p is None else given.top_p}
        more["logprobs"] = bool(given.logprobs)
        return Reply(self, given, prompt, session.sampling() | more, session.notice)

    def metrics(self) -> str:
        """Counters and gauges in Prometheus's text format."""
        self.counts["nanolib_answers"] = len(self.rows)
        self.counts["nanolib_waiting"] = sum(row.prompt is not None for row in self.rows)
        lines = []
        for name, kind in KINDS.items():
            lines.append(f"# TYPE {name} {kind}")
            lines += [f"{key} {n:g}" for key, n in self.counts.items() if key.startswith(name)]
        return "\n".join(lines) + "\n"


async def _body(request: Request) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(HEAD_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > BODY_BYTES:
                    too_long = f"the body is over {BODY_BYTES} bytes; start a new chat"
                    raise HTTPException(413, too_long)
    except TimeoutError:
        raise HTTPException(408, f"the body did not come within {HEAD_SECONDS} s") from None
    return bytes(body)


@dataclass(eq=False)
class Choice:
    """One answer while it is read; `finish` is its finish reason, None until it ends."""

    request: engine.Request
    parser: AnswerParser
    finish: str | None = None
    logprobs: list[dict[str, Any]] = field(default_factory=list)  # of text that is not sent yet

    def read(self) -> list[Part]:
        """New pieces since the last call: each has a part's kind and its next characters."""
        pieces: list[Part] = []
        while self.finish is None and self.request.ready:
            token = self.request.take()
            if token.kind != "end":
                pieces += self.parser.feed(token.id)
            if token.kind == "chosen" and self.parser.kind == "text":
                self._score(token.id)
            if token.kind == "end" or self.parser.ended:
                self.finish = "stop"
        if self.finish is None and not self.request.live:
            self.finish = "length"  # token limit, full context, or server shutdown
        if self.finish:
            Engine.cancel(self.request)
            pieces += self.parser.finish()
        return pieces

    def _score(self, id: int) -> None:
        if self.request.settings.logprobs and id < self.parser.tokenizer.bos:
            text = self.parser.tokenizer.token_bytes(id)
            known = {"token": text.decode(errors="replace"), "bytes": [*text], "top_logprobs": []}
            self.logprobs.append(known | {"logprob": self.request.logprobs[self.request.taken - 1]})


@dataclass(eq=False)
class Reply:
    """The answer to one request; its choices are read while they are generated."""

    scribe: Scribe
    question: Question
    prompt: list[int]
    settings: dict[str, Any]  # the engine's
    notice: str | None  # a warning for the reader
    choices: list[Choice] = field(default_factory=list)

    def __post_init__(self) -> None:
        identity = f"chatcmpl-{secrets.token_hex(12)}"
        self.head = {"id": identity, "created": int(time.time()), "model": self.scribe.name}

    async def steps(self) -> AsyncGenerator[list[tuple[Choice, list[Part]]]]:
        """New pieces of each live choice, maybe none; closing the iterator cancels them all."""
        counts, news, begun, wrote = self.scribe.counts, asyncio.Event(), time.monotonic(), False
        with self.scribe.writing(self.prompt, news, **self.settings) as requests:
            for request in requests:
                parser = AnswerParser(self.scribe.engine.tokenizer, self.question.stop or ())
                self.choices.append(Choice(request, parser))
            while live := [choice for choice in self.choices if choice.finish is None]:
                await asyncio.sleep(PAUSE if wrote else 0)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK):  # unlike wait_for, creates no task
                        await news.wait()
                news.clear()
                yield [(choice, choice.read()) for choice in live]
                if not wrote and (wrote := any(choice.request.taken for choice in live)):
                    counts["nanolib_first_token_seconds_sum"] += time.monotonic() - begun
                    counts["nanolib_first_token_seconds_count"] += 1

    async def events(self) -> AsyncGenerator[str]:
        """The answer as server-sent events."""
        chunk = {**self.head, "object": "chat.completion.chunk"}
        try:
            async with contextlib.aclosing(self.steps()) as steps:
                async for step in steps:
                    for choice, pieces in step:
                        if pieces or choice.finish:
                            yield _event(chunk | {"choices": [self.said(choice, "delta", pieces)]})
            if (self.question.stream_options or {}).get("include_usage"):
                yield _event(chunk | {"choices": [], "usage": self.usage()})
        except Exception as error:
            _log.exception("an answer failed")
            yield _event(_error(500, f"{type(error).__name__}: {error}"))
        yield "data: [DONE]\n\n"

    async def whole(self, request: Request) -> Response:
        """All finished choices in one response; cancelled if the client disconnects."""
        try:
            async with contextlib.aclosing(self.steps()) as steps:
                async for _ in steps:
                    if await request.is_disconnected():
                        return Response(status_code=499)  # client closed request
        except Exception as error:
            _log.exception("an answer failed")
            raise HTTPException(500, f"{type(error).__name__}: {error}") from None
        choices = [self.said(choice, "message", choice.parser.parts) for choice in self.choices]
        body = {**self.head, "object": "chat.completion", "choices": choices, "usage": self.usage()}
        return JSONResponse(body)

    def said(self, choice: Choice, name: str, parts: Sequence[Part]) -> dict[str, Any]:
        """A choice in the API's schema; name: its key, "delta" or "message"."""
        text = "".join(part.text for part in parts if part.kind == "text")
        listed = [{"type": part.kind, "text": part.text} for part in parts]
        said = {"role": "assistant", "content": text, "parts": listed}
        if self.question.html:
            said["html"] = markup.answer_html(choice.parser.parts)
        found = {"index": choice.request.row, "finish_reason": choice.finish, name: said}
        reached = f"the answer reached its limit of {choice.request.taken} tokens"
        ended = "the server ended before the answer" if self.scribe.stopped else reached
        notices = [self.notice, ended if choice.finish == "length" else None]
        if choice.finish:
            found["notice"] = "; ".join(filter(None, notices)) or None
        new, choice.logprobs = choice.logprobs, []
        return found | {"logprobs": {"content": new} if self.question.logprobs else None}

    def usage(self) -> dict[str, int]:
        prompt, answers = len(self.prompt), sum(choice.request.taken for choice in self.choices)
        usage = {"prompt_tokens": prompt, "completion_tokens": answers}
        return usage | {"total_tokens": prompt + answers}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


# ---------------------------------------------------------------------------- the server


def _error(status: int, message: str) -> dict[str, Any]:
    kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}
    kind = kinds.get(min(status, 500), "invalid_request_error")
    code = {401: "invalid_api_key", 404: "not_found"}.get(status)
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _refusal(status: int, message: str) -> Response:
    return JSONResponse(_error(status, message), status)


def build(
    session: Session,
    name: str,
    *,
    local: bool = True,
    api_key: str | None = None,
    cors: str | None = None,
) -> FastAPI:
    """The app for a session's engine and settings.

    name: the model's. local: accept only a loopback Host header. api_key: required for all paths
    but the page and /health. cors: an origin whose pages may call the API.
    """
    scribe = Scribe(session, name)
    page, policy = _page()

    async def refused(request: Request, error: Any) -> Response:
        return _refusal(error.status_code, error.detail)

    app = FastAPI(lifespan=scribe.running, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.scribe = scribe
    app.exception_handler(HTTPException)(refused)
    if cors is not None:
        app.add_middleware(CORSMiddleware, allow_origins=[cors], allow_headers=["*"])
    app.add_middleware(_guard, local=local, policy=policy, api_key=api_key, counts=scribe.counts)
    app.post("/v1/chat/completions")(scribe.complete)
    app.get("/")(lambda: HTMLResponse(page))
    app.get("/v1/models")(lambda: {"object": "list", "data": [scribe.about]})
    app.get("/health")(lambda: {"status": "ok"})
    app.get("/metrics")(lambda: PlainTextResponse(scribe.metrics()))
    return app


def _page() -> tuple[str, str]:
    """The page, and a content security policy for its own script, style and server only."""
    page = Path(__file__).with_name("index.html").read_text(encoding="utf-8")
    page = page.replace("/* what was said */", markup.CSS)

    def only(tag: str) -> str:
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = hashlib.sha256(content.encode()).digest()
        return f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'"

    rules = ("default-src 'none'", only("script"), only("style"), "connect-src 'self'")
    rules += ("img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'")
    return page, "; ".join(rules)


def _guard(app: Any, *, local: bool, policy: str, api_key: str | None, counts: Any) -> Any:
    """Refuse requests for another host (DNS rebinding) or without the key, enforce a time limit and
    add security headers. Plain ASGI, since FastAPI's middleware does not notice when a streaming
    client disconnects."""
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff"}
    headers |= {"referrer-policy": "no-referrer", "cache-control": "no-store"}

    def refusal(given: Headers, path: str, method: str) -> Response | None:
        host = given.get("host", "")  # h11 refuses a request with more than one
        if local and re.sub(r":\d+$", "", host).lower() not in LOOPBACK:
            return _refusal(403, f"ask for {' or '.join(LOOPBACK)}, not for {host!r}")
        if api_key is None or path in ("/", "/health") or method == "OPTIONS":
            return None
        token = given.get("authorization", "").removeprefix("Bearer ")
        right = hmac.compare_digest(token.encode(), api_key.encode())
        wrong = "the API key is missing or wrong: Authorization: Bearer KEY"
        return None if right else _refusal(401, wrong)

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                counts[f'nanolib_requests_total{{status="{message["status"]}"}}'] += 1
                MutableHeaders(scope=message).update(headers)
            await send(message)

        answer = refusal(Headers(scope=scope), scope["path"], scope["method"]) or app
        with contextlib.suppress(TimeoutError):  # the connection is closed
            async with asyncio.timeout(ANSWER_SECONDS):
                await answer(scope, receive, send_with_headers)

    return guarded
