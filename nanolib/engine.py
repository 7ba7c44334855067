"""Batched generation with continuous batching and chunked prefill.

`Engine.step` prefills a chunk of the waiting prompts, moves ready ones into slots of the KV cache
and decodes one token for every active row; finished rows soon free their slots. Each row has its
own seed, so its tokens do not depend on other rows. With a tool, a program's output is forced into
its row one token per step; until it is available, what the row draws is dropped.

Shapes: B rows, T time, V vocabulary, L layers, G key/value heads, S cached positions, K head size.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain, count, groupby, islice, takewhile
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from nanolib.conversation import END_NAMES
from nanolib.data.packing import padded
from nanolib.model import GPT, REACH
from nanolib.runtime import Record, Runtime, record_graph, seed_of
from nanolib.sampling import choose, uniforms
from nanolib.slots import Kept, Slots

if TYPE_CHECKING:
    from nanolib.decoding import Writer
    from nanolib.tokenizer import Tokenizer

PYTHON_NAMES = ("<|python_start|>", "<|python_end|>")  # around a tool's program
OUTPUT_NAMES = ("<|output_start|>", "<|output_end|>")  # appear only around a tool's result
TOOL_CALLS = 16  # per row; further calls return an error
PROGRAMS = 4  # tool programs that run at once
WAIT = 0.05  # seconds to wait for a program when no other row can advance
OUTPUT_TOKENS = 128  # per tool result; longer ones are truncated
ROWS = 256  # decoded at once; further requests wait
SHARE, LATE = 32, 4  # ended rows leave once they are 1 in SHARE, or after LATE steps
CHUNK = {"cpu": 512, "cuda": 8192}  # prompt tokens prefilled per step
FINE_REACH = 16  # as REACH, for steps that are not captured in a CUDA graph
KEPT_BYTES = {"cpu": 2**27, "cuda": 2**31}  # prefix cache: keys and values of finished rows

Tool = Callable[[str], str]  # a program's source -> its output or error


# ---------------------------------------------------------------------------- rows

Kind = Literal["chosen", "forced", "end"]  # by the model; by a tool; ends the row


class Token(NamedTuple):
    """One token of one row."""

    row: int
    id: int
    kind: Kind


@dataclass(slots=True)
class Answer:
    """A finished answer."""

    ids: list[int] = field(default_factory=list)  # without the end token
    chosen: list[bool] = field(default_factory=list)  # False: forced by a tool's result
    end: int | None = None  # the end token; None: a length limit was reached


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Sampling settings; ValueError for a value out of bounds."""

    max_new_tokens: int  # including forced ones
    samples: int = 1  # per prompt
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    # Prefix caching: reuse the keys and values of an earlier row with the same beginning, and keep
    # these for later rows. Do not use it while the weights change.
    keep: bool = False
    # Keep each token's log-probability, before temperature and top-k, in `Request.logprobs`; such
    # steps are not captured in CUDA graphs.
    logprobs: bool = False

    def __post_init__(self) -> None:
        least = {"max_new_tokens": 1, "samples": 1, "temperature": 0, "top_k": 1, "top_p": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name} must be at least {bound}, got {value}")


@dataclass(eq=False, slots=True)
class _Prompt:
    """What all samples of a prompt share."""

    ids: list[int]
    keep: bool
    read: tuple[Slots, int] | None = None  # row with all ids but the last, once prefilled


@dataclass(eq=False, slots=True)
class Request:
    """One sample of a prompt: its state and the tokens so far."""

    row: int
    key: int  # seed of its draws
    settings: Settings
    ids: list[int]  # the prompt's
    prompt: _Prompt | None  # None once it has a slot, to free memory
    left: int  # tokens that may still be generated; 0: finished
    tokens: list[tuple[int, Kind]] = field(default_factory=list)  # generated ids
    logprobs: list[float] = field(default_factory=list)  # of `tokens`, if a row's settings ask
    taken: int = 0  # tokens already returned by `take`
    error: BaseException | None = None  # set if the engine failed
    cancelled: bool = False
    program: Future[list[int]] | None = None  # running; its result is forced into the row
    forced: deque[int] = field(default_factory=deque)  # tokens of a tool's result still to come
    calls: int = 0

    @property
    def ready(self) -> bool:
        """Whether `take` would return a token or raise."""
        return self.taken < len(self.tokens) or self.error is not None

    @property
    def longest(self) -> int:
        """The most tokens that the row may come to, prompt included."""
        return len(self.ids) + len(self.tokens) + self.left

    @property
    def state(self) -> tuple[int, int, int, int, float, float]:
        """What `Slots.set` takes; a slot has keys and values of all tokens but the latest."""
        used, how = len(self.ids) + len(self.tokens) - 1, self.settings
        latest = self.tokens[-1][0] if self.tokens else self.ids[-1]
        return used, latest, self.key, how.top_k or 0, how.temperature, how.top_p

    @property
    def live(self) -> bool:
        """Whether more tokens or an error are available, now or later."""
        return self.ready or (self.left > 0 and not self.cancelled)

    def take(self) -> Token:
        """The next token; raises `error` after the last one if the engine failed."""
        if self.error is not None and self.taken == len(self.tokens):
            raise self.error
        self.taken += 1
        return Token(self.row, *self.tokens[self.taken - 1])

    def answer(self) -> Answer:
        """All tokens so far as an Answer; raises `error` if the engine failed."""
        if self.error is not None:
            raise self.error
        own = [(id, kind == "chosen") for id, kind in self.tokens if kind != "end"]
        end = self.tokens[-1][0] if len(own) < len(self.tokens) else None
        return Answer([id for id, _ in own], [chosen for _, chosen in own], end)


# ---------------------------------------------------------------------------- the engine


class Engine:
    """Generates text: `submit` queues requests, and each `step` decodes one token of every row;
    `generate`, `answers` and `complete` do both. Thread-safe.

    With a `tool`, a row ends if the model itself writes an output marker. At most `max_rows` rows
    are decoded at once. The KV cache grows as needed; `release` frees it.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, runtime: Runtime, tool: Tool | None = None
    ):
        self.model, self.tokenizer, self.runtime, self.tool = model, tokenizer, runtime, tool
        own = () if tool is None else OUTPUT_NAMES
        self.ends = frozenset(map(tokenizer.special, (*END_NAMES, *own)))
        self.markers = [] if tool is None else [*map(tokenizer.special, PYTHON_NAMES)]
        self.record: Record | None = record_graph if runtime.device.type == "cuda" else None
        self.writer: Writer | None = None
        if runtime.dtype == torch.bfloat16 and model.fast_kernels("writing"):
            from nanolib.decoding import Writer

            self.writer = Writer(model)
        self.max_rows, self.chunk = ROWS, CHUNK.get(runtime.device.type, CHUNK["cpu"])
        self._lock, self._programs = threading.RLock(), ThreadPoolExecutor(PROGRAMS)
        self._waiting = deque[Request]()  # any thread may append; only `step` removes
        self._rows: list[Request] = []  # by slot; finished and cancelled rows leave in `step`
        self.release()

    @property
    def context(self) -> int:
        """Maximum number of tokens of prompt and answer together."""
        return self.model.config.sequence_len

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._waiting) or any(request.left for request in self._rows)

    def release(self) -> None:
        """Free the KV cache and the prefix cache; call it before the weights change."""
        if not all(request.cancelled for request in self._flight()):
            raise RuntimeError("rows are being written: cancel them, or step until they end")
        kept = KEPT_BYTES.get(self.runtime.device.type, KEPT_BYTES["cpu"])
        self._rows, self._kept, self._late = [], Kept(kept), 0
        self._waiting.clear()
        self._slots = self._prefill_cache = self._cache(0, 0)
        self._prefilling: list[_Prompt] = []  # prompts being prefilled, by row of `_prefill_cache`
        self._sampling = False, 0, False, False  # over all rows; see `_decode`

    def _flight(self) -> list[Request]:
        """All unfinished requests."""
        return [request for request in (*self._rows, *self._waiting) if request.left]

    # ------------------------------------------------------------------------ public methods

    def submit(
        self, prompts: Sequence[Sequence[int]], *, seeds: Sequence[int] | None = None, **settings
    ) -> list[Request]:
        """Queue `samples` requests per prompt and return at once; `step` generates their tokens.

        Row p · samples + s is sample s of prompt p. settings: those of `Settings`. seeds: one per
        prompt, by default 0, 1, …; a row depends only on its prompt, seed and s. Raises ValueError
        for bad settings and for prompts too long for the context.
        """
        given, requests = Settings(**settings), list[Request]()
        seeds = range(len(prompts)) if seeds is None else seeds
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
        for prompt, seed in zip(prompts, seeds, strict=True):
            if not 1 <= (got := len(prompt)) < self.context:
                room = f"tokens, so that the context of {self.context} has room for an answer"
                raise ValueError(f"a prompt must have 1 to {self.context - 1} {room}; got {got}")
            shared = _Prompt(list(prompt), given.keep)
            left = min(given.max_new_tokens, self.context - len(prompt))
            for s in range(given.samples):
                key = seed_of(seed, "sample", s)
                requests.append(Request(len(requests), key, given, shared.ids, shared, left))
        self._waiting.extend(sorted(requests, key=lambda request: len(request.ids)))
        return requests

    def generate(self, prompts: Sequence[Sequence[int]], **settings) -> Iterator[list[Token]]:
        """Like `submit`, but yields the new tokens of each step, one per active row. A row's last
        token has kind "end", unless it reached max_new_tokens or the context's end first."""
        going = self.submit(prompts, **settings)
        try:
            while going := [request for request in going if request.live]:
                if step := [request.take() for request in going if request.ready]:
                    yield step
                else:
                    self.step()
        finally:
            self.cancel(*going)

    def answers(self, prompts: Sequence[Sequence[int]], **settings) -> list[Answer]:
        """Like `submit`, but generates and returns the complete answers."""
        requests = self.submit(prompts, **settings)
        try:
            for request in requests:
                while request.left:
                    self.step()
        finally:
            self.cancel(*requests)
        return [request.answer() for request in requests]

    def complete(self, prompts: Sequence[Sequence[int]], **settings) -> list[list[int]]:
        """The ids of `answers`, tool results included, without the end token."""
        return [answer.ids for answer in self.answers(prompts, **settings)]

    @staticmethod
    def cancel(*requests: Request) -> None:
        """Cancel requests, from any thread: the next step drops them. Finished ones are kept."""
        for request in requests:
            request.cancelled = True

    # ------------------------------------------------------------------------ one step

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Prefill one chunk and decode one token per row; returns the rows that advanced.

        If it fails, all requests end with that error.
        """
        with self._lock:
            try:
                self._schedule()
                running = [row.program for row in self._rows if row.program is not None]
                if running and len(running) == len(self._rows):
                    wait(running, WAIT, FIRST_COMPLETED)
                return self._append(self._run() if self._rows else [])
            except BaseException as error:
                for request in self._flight():
                    request.left, request.error = 0, error
                self._rows, self._prefilling = [], []
                while self._waiting and not self._waiting[0].left:
                    self._waiting.popleft()
                raise

    def _schedule(self) -> None:
        """Remove finished rows, prefill a chunk, fill free slots with ready prompts, compact."""
        gaps = [slot for slot, row in enumerate(self._rows) if row.cancelled or not row.left]
        free = self.max_rows - len(self._rows) + len(gaps)
        # A change has a fixed cost: a few ended rows wait for more, unless all in the queue fit.
        few = 0 < len(gaps) < len(self._rows) // SHARE and not 0 < len(self._waiting) <= free
        self._late = (self._late + 1) % LATE if few else 0
        if self._late:
            return
        for slot in gaps:
            if (row := self._rows[slot]).settings.keep:
                ids = [*row.ids, *(id for id, _ in row.tokens)][:-1]
                self._kept.add(ids, self._slots.read_row(slot, len(ids)))
        ready = self._prefill_chunk(free) if self._waiting and free > 0 else []
        if not (gaps or ready):
            return
        if ready:
            self._seat(ready, gaps)
        if gaps := gaps[len(ready) :]:
            left = len(self._rows) - len(gaps)
            last = (slot for slot in range(left, len(self._rows)) if slot not in gaps)
            pairs = zip(gaps, last, strict=False)  # gaps at the end need no row
            self._place((gap, self._rows[slot], self._slots, slot) for gap, slot in pairs)
            del self._rows[left:]
            self._slots.set(range(left, left + len(gaps)), [(0,) * 6] * len(gaps))
        given = {id(row.settings): row.settings for row in self._rows}.values()
        most = max((s.top_k or 0 for s in given), default=0)
        greedy, top_p = not any(s.temperature for s in given), any(s.top_p < 1 for s in given)
        self._sampling = greedy, most, top_p, any(s.logprobs for s in given)

    def _prefill_chunk(self, free: int) -> list[Request]:
        """Prefill one chunk if a free slot needs it, of the current prompts or the next ones in the
        queue; returns the requests that can take the free slots, first come, first served."""
        nexts = [*islice(self._waiting, free)]
        if all(r.prompt and r.prompt.read and not r.cancelled for r in nexts):
            return nexts  # most steps: the rest takes time for each waiting request
        for request in (waiting := [*self._waiting]):  # a copy: other threads append
            if request.cancelled:
                self._waiting.remove(request)
        nexts = [*islice(self._waiting, free)]
        # All that fit a chunk, not only those with a slot: a batch costs little more than one prompt.
        prompts = dict.fromkeys(r.prompt for r in waiting if r.prompt and not r.cancelled)
        if not any(prompt in prompts for prompt in self._prefilling):  # none left, or all cancelled
            self._begin_prefill([prompt for prompt in prompts if prompt.read is None])
        known = zip(self._prefilling, self._prefill_cache.used, strict=False)
        unread = [prompt.ids[used:-1] for prompt, used in known]
        pieces = [ids[: max(1, self.chunk // len(unread))] for ids in unread]
        if any(pieces):
            ids_BT = padded(pieces, 0).to(self.runtime.device)
            with self.runtime.autocast(self.writer is None):
                (self.writer or self.model).hidden(ids_BT, cache=self._prefill_cache)
            self._prefill_cache.advance([*map(len, pieces)])
        if pieces == unread:
            for row, prompt in enumerate(self._prefilling):
                prompt.read = self._prefill_cache, row
            self._prefilling = []
        return [*takewhile(lambda request: request.prompt and request.prompt.read, nexts)]

    def _begin_prefill(self, unread: Sequence[_Prompt]) -> None:
        """Start prefilling the first prompts that fit a chunk together, in a separate cache that
        starts with their cached prefixes."""
        longest = [*accumulate((len(prompt.ids) for prompt in unread), max)]
        fitting = sum(n * (i + 1) <= self.chunk for i, n in enumerate(longest))
        self._prefilling = [*unread[: max(1, fitting)]]
        if not unread:
            return
        if self.writer is not None and not any(row.left for row in self._rows):
            self.writer.refresh()  # the weights may have changed
        found = [self._kept.find(p.ids[:-1]) if p.keep else None for p in self._prefilling]
        known = [len(read[0]) if read else 0 for read in found]
        rest = [len(p.ids) - 1 - k for p, k in zip(self._prefilling, known, strict=True)]
        self._prefill_cache = self._cache(len(found), max(1, max(known) + max(rest)))  # padded
        for row, read in enumerate(found):
            if read:
                self._prefill_cache.write_row(row, *read)

    def _seat(self, requests: Sequence[Request], gaps: Sequence[int]) -> None:
        """Move the first queued requests into free slots, growing the cache if needed."""
        old, slots = self._slots, [*islice(chain(gaps, count(len(self._rows))), len(requests))]
        if slots[-1] >= len(old.used) or max(r.longest for r in requests) > old.length:
            flight = [request for request in self._flight() if not request.cancelled]
            rows = min(self.max_rows, 1 << (len(flight) - 1).bit_length())
            length = min(self.context, REACH * math.ceil(max(r.longest for r in flight) / REACH))
            self._slots = self._cache(max(rows, len(old.used)), max(length, old.length))
            self._place((slot, row, old, slot) for slot, row in enumerate(self._rows))
        pairs = zip(slots, requests, strict=True)
        self._place((slot, r, *r.prompt.read) for slot, r in pairs if r.prompt and r.prompt.read)
        for _ in requests:
            self._waiting.popleft().prompt = None

    def _place(self, places: Iterable[tuple[int, Request, Slots, int]]) -> None:
        """Give slots to requests whose keys and values are in a cache's row."""
        for cache, group in groupby(places, lambda place: place[2]):
            slots, requests, _, rows = zip(*group, strict=True)
            for slot, request in zip(slots, requests, strict=True):
                self._rows[slot : slot + 1] = [request]
            self._slots.copy(cache, rows, slots)
            self._slots.set(slots, [request.state for request in requests])

    def _cache(self, rows: int, length: int) -> Slots:
        runtime = self.runtime
        cache = Slots(self.model.config, rows, length, runtime.device, runtime.dtype)
        cache.multiple = FINE_REACH if self.record is None else REACH
        return cache

    def _run(self) -> list[int]:
        """Sample the next token of every row and advance the cache."""
        slots, rows = self._slots, len(self._rows)
        # A CUDA graph has a fixed number of rows.
        view = slots.first(rows if self.record is None else 1 << (rows - 1).bit_length())
        drawn_B = self._draw(view)[:rows]
        slots.ids_B1[:rows, 0] = drawn_B
        most = slots.length - 1  # only for rows whose tokens are dropped
        slots.used_B[:rows].add_(1).clamp_(max=most)
        slots.used[:rows] = [used + (used < most) for used in slots.used[:rows]]
        return drawn_B.tolist()

    def _draw(self, slots: Slots) -> Tensor:
        """One decoding step: eager the first time for each configuration, then a CUDA graph."""
        work = partial(self._decode, slots, *self._sampling)
        if self.record is None or self._sampling[-1]:
            return work()
        # The writer's kernel handles row lengths itself, so one graph serves every reach.
        reach = (0, False) if self.writer else (slots.reach(1), any(slots.used))
        kind = *reach, *self._sampling
        if kind not in slots.replays:
            slots.replays[kind] = None
            return work()
        try:
            replay = slots.replays[kind] = slots.replays[kind] or self.record(work)
        except RuntimeError as error:
            warnings.warn(f"decoding steps cannot be recorded here ({error}): slower", stacklevel=2)
            self.record, replay = None, work
        return replay()

    def _decode(self, slots: Slots, greedy: bool, top_k: int, top_p: bool, score: bool) -> Tensor:
        """The next token [B] of every row; uses only tensors of fixed address and shape.

        greedy: all rows are greedy. top_k: the largest (0: none). top_p: whether any row has one.
        They only save work and change no row's token. score: also keep the tokens' log-probabilities.
        """
        if self.writer is not None:
            logits_BV = self.writer.logits(self.writer.hidden(slots.ids_B1, slots)[:, -1])
        else:
            with self.runtime.autocast():
                logits_BV = self.model(slots.ids_B1, cache=slots)[:, -1]
        if greedy:
            drawn_B = logits_BV.argmax(dim=-1)
        else:
            uniform_B = uniforms(slots.key_B, slots.used_B)
            top_k_B, top_p_B = slots.top_k_B if top_k else None, slots.top_p_B if top_p else None
            drawn_B = choose(logits_BV, uniform_B, slots.temperature_B, top_k_B, top_p_B, top_k)
        if score:
            self._logprobs_B = logits_BV.log_softmax(-1).gather(1, drawn_B[:, None])[:, 0]
        return drawn_B

    def _append(self, drawn: list[int]) -> list[Request]:
        """Append a token to each row, except ended ones and those that wait for a program."""
        logprobs = self._logprobs_B.tolist() if drawn and self._sampling[-1] else []
        forced = list[int]()  # slots whose next token is not the one drawn
        for slot, (request, id) in enumerate(zip(self._rows, drawn, strict=True)):
            if not request.left:
                continue
            kind = "end" if id in self.ends else "chosen"
            if request.program is not None:
                if not request.program.done():
                    continue  # its state is set when the first token is forced
                request.forced.extend(request.program.result())
                request.program = None
            if request.forced:
                id, kind = request.forced.popleft(), "forced"
                forced.append(slot)
            if logprobs:  # first, since other threads take tokens
                request.logprobs.append(logprobs[slot])
            request.tokens.append((id, kind))
            request.left = 0 if kind == "end" else request.left - 1
            if request.left and id in self.markers:
                self._call(request)
        if forced:
            self._slots.set(forced, [self._rows[slot].state for slot in forced])
        return list(self._rows)

    def _call(self, request: Request) -> None:
        """If a python part has just ended, run it in a thread."""
        ids = [id for id, _ in request.tokens]
        marks = [at for at, id in enumerate(ids) if id in self.markers][-2:]
        if [ids[at] for at in marks] == self.markers:
            request.calls += 1
            source = ids[marks[0] + 1 : -1]
            request.program = self._programs.submit(self._result, source, request.calls)

    def _result(self, source: list[int], call: int) -> list[int]:
        """Run a program; returns the ids of its output, to be forced into the row."""
        output = f"RuntimeError: no more than {TOOL_CALLS} programs in an answer"
        if self.tool is not None and call <= TOOL_CALLS:
            output = self.tool(self.tokenizer.decode(source))
        start, end = map(self.tokenizer.special, OUTPUT_NAMES)
        return [start, *self.tokenizer.encode(output)[:OUTPUT_TOKENS], end]
