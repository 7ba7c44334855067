"""Generation for many at once: rows of a KV cache that come and go (continuous batching).

A request is one sample of a prompt. `Engine.step` reads a chunk of the prompts that wait, gives
those that are read a slot of the cache, and writes one token of every row; a finished row leaves its
slot at once. A row's draws come from its own seed, so its tokens do not depend on the other rows.
With a tool, ``<|python_start|> source <|python_end|>`` is followed by ``<|output_start|> result
<|output_end|>``, forced into the row one token a step while the other rows go on.

Shapes: B rows, T time, V vocabulary, L layers, G key/value heads, S cached positions, K head size.
"""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count, islice, takewhile
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from nanolib.conversation import END_NAMES
from nanolib.data.packing import padded
from nanolib.model import GPT, REACH, KVCache
from nanolib.runtime import Runtime, seed_of

if TYPE_CHECKING:
    from nanolib.config import ModelConfig
    from nanolib.decoding import Writer
    from nanolib.tokenizer import Tokenizer

OUTPUT_NAMES = ("<|output_start|>", "<|output_end|>")  # only a tool's result has these
TOOL_CALLS = 16  # per row; the result of any further call is an error
OUTPUT_TOKENS = 128  # per result; a longer one is truncated to leave room for the answer
ROWS = 256  # written at once; further ones wait
CHUNK = {"cpu": 512, "cuda": 8192}  # prompt tokens read between two tokens of the rows
FINE_REACH = 16  # cached positions are read in multiples of this, where no step is recorded
KEPT_BYTES = {"cpu": 2**27, "cuda": 2**31}  # of finished rows' keys and values
KEPT_LEAST = 16  # a shorter common beginning is read again

Tool = Callable[[str], str]  # a program's source -> its output or error


def end_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a generated row, ``<|assistant_end|>`` first."""
    return tuple(tokenizer.special(name) for name in END_NAMES)


# ---------------------------------------------------------------------------- sampling


def uniforms(keys_B: Tensor, positions_B: Tensor) -> Tensor:
    """A row's draw [B] from [0, 1) at a position: a hash of both (splitmix64), on any device.

    Without a generator's state a draw depends on nothing that was drawn before.
    """
    mixed_B = keys_B + positions_B * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed_B = (mixed_B ^ _shifted(mixed_B, shift)) * factor
    return _shifted(mixed_B ^ _shifted(mixed_B, 31), 40).float() * 2**-24


def _shifted(bits: Tensor, by: int) -> Tensor:
    """int64 shifted right as if unsigned."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def probabilities(
    logits_BV: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    most: int | None = None,
) -> Tensor:
    """The distribution [B, V] that `choose` samples from; temperature must be positive.

    top_k keeps each row's k most likely tokens; top_p (arXiv:1904.09751) then the fewest of the
    most likely ones that have this share together; both keep all that tie with the last one kept.
    A setting is the same for all rows or a tensor [B]; of a tensor of top_k, 0 keeps all, and
    `most` is the largest.
    """
    logits_BV = logits_BV.float() / _column(temperature, logits_BV)
    most = min(top_k if isinstance(top_k, int) else most or 0, logits_BV.shape[-1])
    if top_k is not None and most:
        k_B1 = _column(top_k, logits_BV, torch.long).clamp(max=most).expand(len(logits_BV), 1)
        best_BK = logits_BV.topk(most, dim=-1).values
        least_B1 = best_BK.gather(1, (k_B1 - 1).clamp(min=0)).masked_fill(k_B1 == 0, -torch.inf)
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    probabilities_BV = logits_BV.softmax(dim=-1)
    if top_p is None:
        return probabilities_BV
    p_B1 = _column(top_p, logits_BV).clamp(min=1e-6)  # the likeliest always stays
    falling_BV = probabilities_BV.sort(dim=-1, descending=True).values
    before_BV = falling_BV.cumsum(dim=-1) - falling_BV
    least_B1 = falling_BV.masked_fill(before_BV >= p_B1, torch.inf).amin(dim=-1, keepdim=True)
    return probabilities_BV.masked_fill((probabilities_BV < least_B1) & (p_B1 < 1), 0)


def _column(setting: float | Tensor, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A setting of all rows, or of each, as [1, 1] or [B, 1]."""
    return torch.as_tensor(setting, device=like.device, dtype=dtype).reshape(-1, 1)


def inverse_cdf(probabilities_BV: Tensor, uniform_B: Sequence[float] | Tensor) -> Tensor:
    """Inverse-CDF sampling: for each row, the first token [B] whose cumulative probability exceeds
    the row's uniform draw. Never a token of probability zero."""
    # GPU prefix sums are not monotone in float32, so a zero-probability token could be drawn.
    exact = torch.float64 if probabilities_BV.is_cuda else probabilities_BV.dtype
    cdf_BV = probabilities_BV.cumsum(dim=-1, dtype=exact)
    below_one = torch.as_tensor(uniform_B, device=cdf_BV.device, dtype=exact).clamp(max=1 - 2**-24)
    target_B1 = below_one[:, None] * cdf_BV[:, -1:]  # the total is 1 only up to rounding
    return torch.searchsorted(cdf_BV, target_B1, right=True).squeeze(-1)


def choose(
    logits_BV: Tensor,
    uniform_B: Sequence[float] | Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    most: int | None = None,
) -> Tensor:
    """The next token [B] of each row: the most likely one at temperature 0, else a sample.

    Settings as for `probabilities`.
    """
    best_B = logits_BV.argmax(dim=-1)
    if isinstance(temperature, Tensor):
        warm_B = torch.where(temperature > 0, temperature, 1.0)
        drawn_B = inverse_cdf(probabilities(logits_BV, warm_B, top_k, top_p, most), uniform_B)
        return torch.where(temperature > 0, drawn_B, best_B)
    if temperature == 0:
        return best_B
    return inverse_cdf(probabilities(logits_BV, temperature, top_k, top_p), uniform_B)


# ---------------------------------------------------------------------------- CUDA graphs

Replay = Callable[[], Tensor]
Record = Callable[[Replay], Replay]  # work on tensors at fixed addresses -> its replay


def record_graph(work: Replay) -> Replay:
    """Capture `work` as a CUDA graph: one launch instead of several hundred.

    `work` must have run before. A replay reads its inputs' current contents and overwrites the
    previous result.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = work()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


# ---------------------------------------------------------------------------- rows


class Token(NamedTuple):
    """One token of one row: sampled by the model, forced by a tool's result, or the row's end."""

    row: int
    id: int
    kind: Literal["chosen", "forced", "end"]


@dataclass(slots=True)
class Answer:
    """A finished row."""

    ids: list[int] = field(default_factory=list)  # without the end token
    chosen: list[bool] = field(default_factory=list)  # by the model, not forced by a tool
    end: int | None = None  # the token that ended it; None: it reached a limit


@dataclass(eq=False, slots=True)
class _Prompt:
    """What some samples have in common: keys and values of all ids but the last, once read."""

    ids: list[int]
    keep: bool
    cache: _Cache | None = None
    row: int = 0  # of the cache


@dataclass(eq=False, slots=True)
class Request:
    """One sample of a prompt; `tokens` holds what was written and not yet taken from there."""

    row: int
    prompt: _Prompt
    key: int  # of its draws
    left: int  # tokens it may still produce; 0: finished
    temperature: float
    top_k: int | None
    top_p: float
    ids: list[int]  # the prompt's and its own
    tokens: deque[Token] = field(default_factory=deque)
    error: BaseException | None = None  # what ended it, if the engine failed
    cancelled: bool = False
    source: list[int] | None = None  # ids of the open python part
    forced: deque[int] = field(default_factory=deque)  # the rest of a tool's result
    calls: int = 0

    def take(self) -> Token:
        """The next token; raises `error` if there is none because the engine failed."""
        if self.error is not None and not self.tokens:
            raise self.error
        return self.tokens.popleft()

    @property
    def live(self) -> bool:
        """Whether there is anything to be taken, now or later."""
        return bool(self.tokens or self.error or (self.left and not self.cancelled))

    def answer(self) -> Answer:
        """What was not taken, as a whole."""
        said = [token for token in self.tokens if token.kind != "end"]
        end = next((token.id for token in self.tokens if token.kind == "end"), None)
        return Answer([t.id for t in said], [t.kind == "chosen" for t in said], end)


class _Cache(KVCache):
    """A KV cache with what a decoding step reads of each row, and recordings of that step."""

    def __init__(
        self, config: ModelConfig, rows: int, length: int, runtime: Runtime, multiple: int
    ):
        super().__init__(config, rows, length, runtime.device, runtime.dtype)
        self.multiple = multiple  # of positions that are read
        self.ids_B1 = torch.zeros_like(self.used_B)[:, None]  # each row's latest token
        self.key_B, self.top_k_B = torch.zeros_like(self.used_B), torch.zeros_like(self.used_B)
        self.temperature_B = torch.zeros_like(self.used_B, dtype=torch.float32)
        self.top_p_B = torch.ones_like(self.temperature_B)
        self.views: dict[int, _Cache] = {}
        self.replays: dict[tuple, Replay | None] = {}  # None: ran once, not recorded

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """What is kept for each row beside keys and values."""
        return self.ids_B1, self.key_B, self.temperature_B, self.top_k_B, self.top_p_B, self.used_B

    def reach(self, new_tokens: int) -> int:
        """As a cache's, in finer steps where none is recorded: each would need its own recording."""
        return min(
            self.length, self.multiple * math.ceil((max(self.used) + new_tokens) / self.multiple)
        )

    def first(self, rows: int) -> _Cache:
        """The first rows alone, in the same memory."""
        if rows not in self.views:
            view = self.views[rows] = copy.copy(self)
            view.views, view.replays = {}, {}
            for name, value in vars(self).items():
                if isinstance(value, Tensor):
                    setattr(view, name, value[:, :rows] if value.dim() == 5 else value[:rows])
        self.views[rows].used = self.used[:rows]
        return self.views[rows]

    def read_row(self, row: int) -> tuple[Tensor, Tensor]:
        """A row's keys and values [L, G, S, K]."""
        used = self.used[row]
        return self.keys_LBGSK[:, row, :, :used], self.values_LBGSK[:, row, :, :used]

    def write_row(self, row: int, keys_LGSK: Tensor, values_LGSK: Tensor) -> None:
        used = self.used[row] = keys_LGSK.shape[2]
        self.used_B[row] = used
        self.keys_LBGSK[:, row, :, :used] = keys_LGSK
        self.values_LBGSK[:, row, :, :used] = values_LGSK

    def take(self, other: _Cache, row: int, to: int) -> None:
        """Fill a row with another, of this cache or another one."""
        self.write_row(to, *other.read_row(row))
        for mine_B, theirs_B in zip(self.rows, other.rows, strict=True):
            mine_B[to] = theirs_B[row]

    def trim(self, rows: int) -> None:
        """Forget what further rows hold: it must not count in `reach`."""
        if any(self.used[rows:]):
            self.used_B[rows:] = 0
            self.used[rows:] = [0] * (len(self.used) - rows)

    def seat(self, seats: dict[int, Request]) -> None:
        """Let requests whose prompts are read go on in these rows."""
        for row, request in seats.items():
            assert request.prompt.cache is not None
            self.write_row(row, *request.prompt.cache.read_row(request.prompt.row))
        given = [(r.ids[-1], r.key, r.temperature, r.top_k or 0, r.top_p) for r in seats.values()]
        rows_N = torch.tensor([*seats], device=self.used_B.device)
        for mine_B, values in zip(self.rows, zip(*given, strict=True), strict=False):
            values_N = torch.tensor(values, dtype=mine_B.dtype, device=mine_B.device)
            mine_B[rows_N] = values_N.view(-1, *mine_B.shape[1:])


class _Kept:
    """At most so many bytes of finished rows' keys and values, for prompts that begin alike; the
    latest used last."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.rows: list[tuple[list[int], Tensor, Tensor]] = []

    def add(self, ids: list[int], keys_LGSK: Tensor, values_LGSK: Tensor) -> None:
        self.rows = [row for row in self.rows if row[0] != ids[: len(row[0])]]
        self.rows.append((ids, keys_LGSK.clone(), values_LGSK.clone()))
        while sum(row[1].nbytes + row[2].nbytes for row in self.rows) > self.most_bytes:
            del self.rows[0]

    def find(self, ids: list[int]) -> tuple[Tensor, Tensor] | None:
        """Those of the longest beginning of `ids` that a row has, if any is worth it."""
        pairs = [zip(ids, row[0], strict=False) for row in self.rows]
        common = [len([*takewhile(lambda pair: pair[0] == pair[1], each)]) for each in pairs]
        longest = max(common, default=0)
        if longest < KEPT_LEAST:
            return None
        found = self.rows.pop(common.index(longest))
        self.rows.append(found)
        return found[1][:, :, :longest], found[2][:, :, :longest]


# ---------------------------------------------------------------------------- the engine


class Engine:
    """A model with its tokenizer: `generate` streams, `answers` and `complete` collect; all of them
    `submit` requests and `step`. Several threads may do so at once.

    With a `tool`, a row in which the model itself writes an output marker ends there. At most
    `max_rows` are written at once. The memory for them grows with need; `release` gives it back.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        runtime: Runtime,
        tool: Tool | None = None,
        max_rows: int = ROWS,
    ):
        self.model, self.tokenizer, self.runtime, self.tool = model, tokenizer, runtime, tool
        own = () if tool is None else map(tokenizer.special, OUTPUT_NAMES)
        self.ends = frozenset([*end_tokens(tokenizer), *own])
        self.record: Record | None = record_graph if runtime.device.type == "cuda" else None
        self.writer: Writer | None = None
        if runtime.dtype == torch.bfloat16 and model.fast_kernels("writing"):
            from nanolib.decoding import Writer

            self.writer = Writer(model)
        self.max_rows, self.chunk = max_rows, CHUNK.get(runtime.device.type, CHUNK["cpu"])
        self._lock = threading.RLock()
        self._waiting: deque[Request] = deque()
        self._rows: list[Request | None] = []  # by slot; None: it has just left
        self.release()

    @property
    def context(self) -> int:
        """The most tokens that prompt and answer may have together."""
        return self.model.config.sequence_len

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._waiting or any(self._rows))

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    def release(self) -> None:
        """Give the cache's memory back and forget the kept rows: the weights may change now."""
        if not all(request.cancelled for request in self._flight()):
            raise RuntimeError("rows are being written: cancel them, or step until they end")
        kept = KEPT_BYTES.get(self.runtime.device.type, KEPT_BYTES["cpu"])
        self._waiting, self._rows, self._kept = deque(), [], _Kept(kept)
        self._slots = self._read = self._cache(0, 0)
        self._reading: list[_Prompt] = []  # in the rows of `_read`

    def _flight(self) -> list[Request]:
        """Every request that is not finished."""
        return [*filter(None, self._rows), *self._waiting]

    # ------------------------------------------------------------------------ for callers

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samples: int = 1,
        seeds: Sequence[int] | None = None,
        **settings,
    ) -> Iterator[list[Token]]:
        """Continue every prompt `samples` times; each step yields one token of every active row.

        Row p · samples + s is sample s of prompt p. A row's last token is of kind "end", unless the
        row reached max_new_tokens (forced tokens count) or the end of the context first. seeds: one
        per prompt, by default 0, 1, …; a row depends only on its prompt, the prompt's seed and s.
        settings: as for `submit`. Raises ValueError as it does, before anything runs.
        """
        seeds = self._check(prompts, seeds, samples=samples, **settings)

        def steps() -> Iterator[list[Token]]:
            requests: list[Request] = []
            try:
                for p, prompt in enumerate(prompts):
                    given: dict[str, Any] = {"samples": samples, "seed": seeds[p]}
                    requests += self.submit(prompt, row=p * samples, **given, **settings)
                while requests := [request for request in requests if request.live]:
                    if step := [r.take() for r in requests if r.tokens or r.error]:
                        yield step
                    else:
                        self.step()
            finally:
                self.cancel(*requests)

        return steps()

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samples: int = 1,
        seeds: Sequence[int] | None = None,
        **settings,
    ) -> list[Answer]:
        """All rows of `generate`, finished; shorter prompts first."""
        seeds = self._check(prompts, seeds, samples=samples, **settings)
        requests: list[list[Request]] = [[] for _ in prompts]
        try:
            for p in sorted(range(len(prompts)), key=lambda p: len(prompts[p])):
                requests[p] = self.submit(prompts[p], samples=samples, seed=seeds[p], **settings)
            rows = [request for of_prompt in requests for request in of_prompt]
            while any(request.left for request in rows):
                self.step()
        finally:
            self.cancel(*(request for of_prompt in requests for request in of_prompt))
        for request in rows:
            if request.error is not None:
                raise request.error
        return [request.answer() for request in rows]

    def complete(self, prompts: Sequence[Sequence[int]], **settings) -> list[list[int]]:
        """The ids of `answers`, tool results included, without the end token."""
        return [answer.ids for answer in self.answers(prompts, **settings)]

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        samples: int = 1,
        seed: int = 0,
        row: int = 0,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        keep: bool = False,
    ) -> list[Request]:
        """Queue samples of a prompt, whose tokens come with the next steps; numbered from `row`.

        keep: begin with the keys and values of an earlier such row, as far as it has the same ids,
        and leave these for later ones; not where weights change meanwhile. Raises ValueError for a
        prompt that is empty or leaves no room, and for bad settings.
        """
        sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        self._check([prompt], [seed], max_new_tokens=max_new_tokens, samples=samples, **sampling)
        shared, left = _Prompt(list(prompt), keep), min(max_new_tokens, self.context - len(prompt))
        keys = [seed_of(seed, "sample", s) for s in range(samples)]
        requests = [
            Request(row + s, shared, key, left, ids=list(prompt), **sampling)
            for s, key in enumerate(keys)
        ]
        with self._lock:
            if self.writer is not None and not self.busy:
                self.writer.refresh()  # the weights may have changed
            self._waiting += requests
        return requests

    @staticmethod
    def cancel(*requests: Request) -> None:
        """Let the next step drop them, from any thread; a finished one stays as it is."""
        for request in requests:
            request.cancelled = True

    def _check(self, prompts, seeds=None, *, max_new_tokens, samples, **sampling) -> Sequence[int]:
        """The seeds. Raises ValueError as `submit` and `generate` say."""
        least = {"max_new_tokens": 1, "samples": 1, "temperature": 0, "top_k": 1, "top_p": 0}
        given = {"max_new_tokens": max_new_tokens, "samples": samples, **sampling}
        for name, value in given.items():
            if name in least and value is not None and value < least[name]:
                raise ValueError(f"{name} must be at least {least[name]}, got {value}")
        seeds = range(len(prompts)) if seeds is None else seeds
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
        for prompt in prompts:
            if not prompt:
                raise ValueError("a prompt must have at least one token (<|bos|>), got none")
            if len(prompt) >= self.context:
                room = f"leaves no room for an answer in a context of {self.context}"
                raise ValueError(f"a prompt of {len(prompt)} tokens {room}; shorten it")
        return seeds

    # ------------------------------------------------------------------------ a step

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Read one chunk of prompts and write one token of every row; the rows that got one.

        If it fails, every request ends with that error.
        """
        with self._lock:
            try:
                self._schedule()
                drawn = self._run() if self._rows else []
                return self._take_over(drawn)
            except BaseException as error:
                for request in self._flight():
                    request.left, request.error = 0, error
                self._waiting, self._rows, self._reading = deque(), [], []
                raise

    def _schedule(self) -> None:
        """Read what the next free slots wait for, fill them, and close the gaps."""
        self._waiting = deque(request for request in self._waiting if not request.cancelled)
        for slot, request in enumerate(self._rows):
            if request is not None and request.cancelled:
                self._leave(slot, request)
        nexts = list(islice(self._waiting, self.max_rows - len([*filter(None, self._rows)])))
        self._read_chunk([request.prompt for request in nexts])
        ready = [*takewhile(lambda request: request.prompt.cache is not None, nexts)]
        if ready:
            self._fit()
        gaps = [slot for slot, request in enumerate(self._rows) if request is None]
        free = chain(gaps, count(len(self._rows)))
        seats = {next(free): self._waiting.popleft() for _ in ready}
        if seats:
            self._slots.seat(seats)
            self._rows += [None] * (max(seats) + 1 - len(self._rows))
        unseated = {request.prompt for request in self._waiting}
        for slot, request in seats.items():
            self._rows[slot] = request
            if request.prompt not in unseated:
                request.prompt.cache = None  # its memory is needed no more
        while None in self._rows:
            last = self._rows.pop()
            if last is not None:
                gap = self._rows.index(None)
                self._slots.take(self._slots, len(self._rows), gap)
                self._rows[gap] = last
        self._slots.trim(len(self._rows))

    def _read_chunk(self, prompts: Sequence[_Prompt]) -> None:
        """Go on with the prompts that are being read, or begin with the next of these."""
        if not any(prompt in prompts for prompt in self._reading):  # none, or all were cancelled
            unread = dict.fromkeys(prompt for prompt in prompts if prompt.cache is None)
            self._reading = self._next_batch(list(unread))
        if not self._reading:
            return
        known = zip(self._reading, self._read.used, strict=True)
        unread = [prompt.ids[used:-1] for prompt, used in known]
        longest = max(map(len, unread))
        pieces = [ids[: max(1, self.chunk // len(unread))] for ids in unread]
        if longest:
            with self.runtime.autocast(self.writer is None):
                (self.writer or self.model).hidden(
                    padded(pieces, 0).to(self.runtime.device), cache=self._read
                )
            self._read.advance([len(piece) for piece in pieces])
        if longest == max(map(len, pieces)):
            for row, prompt in enumerate(self._reading):
                prompt.cache, prompt.row = self._read, row
            self._reading = []

    def _next_batch(self, prompts: list[_Prompt]) -> list[_Prompt]:
        """The first prompts that are a chunk together, with a new cache; of a kept row's beginning
        it has the keys and values."""
        batch: list[_Prompt] = []
        for prompt in prompts:
            longest = max(len(prompt.ids) for prompt in (*batch, prompt))
            if batch and longest * (len(batch) + 1) > self.chunk:
                break
            batch.append(prompt)
        if not batch:
            return []
        found = [self._kept.find(prompt.ids[:-1]) if prompt.keep else None for prompt in batch]
        known = [0 if pair is None else pair[0].shape[2] for pair in found]
        unread = max(len(p.ids) - 1 - k for p, k in zip(batch, known, strict=True))
        length = max(1, max(known) + unread)
        self._read = self._cache(len(batch), length)
        for row, pair in enumerate(found):
            if pair is not None:
                self._read.write_row(row, *pair)
        return batch

    def _fit(self) -> None:
        """Enlarge the slots if all requests that there are need more or longer ones."""
        old, flight = self._slots, self._flight()
        rows = min(self.max_rows, 1 << (len(flight) - 1).bit_length())
        length = max(len(request.ids) + request.left for request in flight)
        length = min(self.context, REACH * math.ceil(length / REACH))
        if rows > len(old.used) or length > old.length:
            self._slots = self._cache(max(rows, len(old.used)), max(length, old.length))
            for slot in range(len(self._rows)):
                self._slots.take(old, slot, slot)

    def _cache(self, rows: int, length: int) -> _Cache:
        multiple = FINE_REACH if self.record is None else REACH
        return _Cache(self.model.config, rows, length, self.runtime, multiple)

    def _run(self) -> list[int]:
        """The next token of every row, as drawn."""
        slots, rows = self._slots, len(self._rows)
        # A recording serves as many rows as it was made with.
        view = slots.first(rows if self.record is None else 1 << (rows - 1).bit_length())
        drawn_B = self._draw(view, [request for request in self._rows if request is not None])
        slots.ids_B1[:rows, 0] = drawn_B[:rows]
        slots.used_B[:rows] += 1
        slots.used[:rows] = [used + 1 for used in slots.used[:rows]]
        return drawn_B[:rows].tolist()

    def _draw(self, slots: _Cache, requests: list[Request]) -> Tensor:
        """One decoding step. The first of its kind runs eagerly; later ones replay a recording."""
        top_k = max(request.top_k or 0 for request in requests)
        top_p = any(request.top_p < 1 for request in requests)
        greedy = not any(request.temperature for request in requests)
        # The writer's kernel reads as much as each row has: one recording for every reach.
        reach = (0, False) if self.writer else (slots.reach(1), any(slots.used))
        kind = *reach, greedy, top_k, top_p
        work = partial(self._decode, slots, *kind[2:])
        if self.record is not None and kind in slots.replays and slots.replays[kind] is None:
            slots.replays[kind] = self._recorded(self.record, work)
        replay = slots.replays.setdefault(kind, None) if self.record else None
        return work() if replay is None else replay()

    def _decode(self, slots: _Cache, greedy: bool, top_k: int, top_p: bool) -> Tensor:
        """The next token [B] of every row, from tensors of fixed address and shape alone.

        Whether all rows are `greedy`, the largest `top_k` (or 0) and whether any row has a `top_p`
        spare work that no row asks for; they change no row's token.
        """
        if self.writer is not None:
            logits_BV = self.writer.logits(self.writer.hidden(slots.ids_B1, slots)[:, -1])
        else:
            with self.runtime.autocast():
                logits_BV = self.model(slots.ids_B1, cache=slots)[:, -1]
        if greedy:
            return logits_BV.argmax(dim=-1)
        uniform_B = uniforms(slots.key_B, slots.used_B)
        top_k_B, top_p_B = slots.top_k_B if top_k else None, slots.top_p_B if top_p else None
        return choose(logits_BV, uniform_B, slots.temperature_B, top_k_B, top_p_B, top_k)

    def _recorded(self, record: Record, work: Replay) -> Replay | None:
        """A recording of the step; None if recording fails."""
        try:
            return record(work)
        except RuntimeError as error:
            warnings.warn(f"decoding steps cannot be recorded here ({error}): slower", stacklevel=2)
            self.record = None
            return None

    def _take_over(self, drawn: list[int]) -> list[Request]:
        """Give each row its token, and empty the slots of those that end."""
        written = [request for request in self._rows if request is not None]
        for slot, (request, id) in enumerate(zip(written, drawn, strict=True)):
            token = Token(request.row, id, "end" if id in self.ends else "chosen")
            if request.forced:
                token = Token(request.row, request.forced.popleft(), "forced")
                self._slots.ids_B1[slot] = token.id
            request.tokens.append(token)
            request.ids.append(token.id)
            self._advance(request, token)
            if not request.left:
                self._leave(slot, request)
        return written

    def _leave(self, slot: int, request: Request) -> None:
        """Empty its slot; what it has read may serve later requests."""
        self._rows[slot] = None
        if request.prompt.keep:
            self._kept.add(request.ids[: self._slots.used[slot]], *self._slots.read_row(slot))

    def _advance(self, request: Request, token: Token) -> None:
        """Count the token, and run the tool if it closes a python part."""
        request.left = 0 if token.kind == "end" else request.left - 1
        if self.tool is None or not request.left:
            return
        special = self.tokenizer.special
        if token.id == special("<|python_start|>"):
            request.source = []
        elif request.source is None:
            return
        elif token.id == special("<|python_end|>"):
            request.calls += 1
            output = f"RuntimeError: no more than {TOOL_CALLS} programs in an answer"
            if request.calls <= TOOL_CALLS:
                output = self.tool(self.tokenizer.decode(request.source))
            ids = self.tokenizer.encode(output)[:OUTPUT_TOKENS]
            request.forced.extend([special(OUTPUT_NAMES[0]), *ids, special(OUTPUT_NAMES[1])])
            request.source = None
        else:
            request.source.append(token.id)
