"""Batched generation with a KV cache: one prefill, then one token for every row in each step.

Rows have different lengths and end at different times. Every row samples from its own seed, so its
tokens do not depend on the rest of the batch. With a tool, ``<|python_start|> source
<|python_end|>`` is followed by ``<|output_start|> result <|output_end|>``, forced into the row one
token a step while the other rows go on.

Shapes: P prompts, B rows (samples of prompts), T time, V vocabulary.
"""

from __future__ import annotations

import random
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from nanolib.conversation import END_NAMES
from nanolib.data.packing import padded
from nanolib.model import GPT, KVCache
from nanolib.runtime import Runtime, seed_of

if TYPE_CHECKING:
    from nanolib.config import ModelConfig
    from nanolib.tokenizer import Tokenizer

OUTPUT_NAMES = ("<|output_start|>", "<|output_end|>")  # only a tool's result has these
TOOL_CALLS = 16  # per row; the result of any further call is an error
OUTPUT_TOKENS = 128  # per result; a longer one is truncated to leave room for the answer

Tool = Callable[[str], str]  # a program's source -> its output or error


def end_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a generated row, ``<|assistant_end|>`` first."""
    return tuple(tokenizer.special(name) for name in END_NAMES)


# ---------------------------------------------------------------------------- sampling


def probabilities(logits_BV: Tensor, temperature: float, top_k: int | None = None) -> Tensor:
    """The distribution [B, V] that `choose` samples from; temperature must be positive.

    top_k keeps each row's k most likely tokens, and all that tie with the k-th.
    """
    logits_BV = logits_BV.float() / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    return logits_BV.softmax(dim=-1)


def inverse_cdf(probabilities_BV: Tensor, uniform_B: Sequence[float]) -> Tensor:
    """Inverse-CDF sampling: for each row, the first token [B] whose cumulative probability exceeds
    the row's uniform draw. Never a token of probability zero."""
    # GPU prefix sums are not monotone in float32, so a zero-probability token could be drawn.
    exact = torch.float64 if probabilities_BV.is_cuda else probabilities_BV.dtype
    cdf_BV = probabilities_BV.cumsum(dim=-1, dtype=exact)
    below_one = torch.tensor(uniform_B, device=cdf_BV.device, dtype=exact).clamp(max=1 - 2**-24)
    target_B1 = below_one[:, None] * cdf_BV[:, -1:]  # the total is 1 only up to rounding
    return torch.searchsorted(cdf_BV, target_B1, right=True).squeeze(-1)


def choose(
    logits_BV: Tensor, uniform_B: Sequence[float], temperature: float, top_k: int | None = None
) -> Tensor:
    """The next token [B] of each row: the most likely one at temperature 0, else a sample."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    return inverse_cdf(probabilities(logits_BV, temperature, top_k), uniform_B)


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


# ---------------------------------------------------------------------------- the engine


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


class Engine:
    """A model with its tokenizer: `generate` streams, `answers` and `complete` collect.

    With a `tool`, a row in which the model itself writes an output marker ends there.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, runtime: Runtime, tool: Tool | None = None
    ):
        self.model, self.tokenizer, self.runtime, self.tool = model, tokenizer, runtime, tool
        own = () if tool is None else map(tokenizer.special, OUTPUT_NAMES)
        self.ends = frozenset([*end_tokens(tokenizer), *own])
        self.record: Record | None = record_graph if runtime.device.type == "cuda" else None

    @property
    def context(self) -> int:
        """The most tokens that prompt and answer may have together."""
        return self.model.config.sequence_len

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        samples: int = 1,
        temperature: float = 0.0,
        top_k: int | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Iterator[list[Token]]:
        """Continue every prompt `samples` times; each step yields one token of every active row.

        Row p · samples + s is sample s of prompt p. A row's last token is of kind "end", unless the
        row reached max_new_tokens (forced tokens count) or the end of the context first. seeds: one
        per prompt, by default 0, 1, …; a row depends only on its prompt, the prompt's seed and s.
        Raises ValueError for prompts that are empty or leave no room, and for bad settings.
        """
        seeds = range(len(prompts)) if seeds is None else seeds
        self._check(prompts, max_new_tokens, samples, temperature, top_k, seeds)
        limits = [min(max_new_tokens, self.context - len(prompt)) for prompt in prompts]
        rows = [
            _Row(p * samples + s, random.Random(seed_of(seeds[p], "sample", s)), limits[p])
            for p in range(len(prompts))
            for s in range(samples)
        ]
        return self._steps(prompts, rows, temperature, top_k)

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samples: int = 1,
        seeds: Sequence[int] | None = None,
        max_rows: int = 128,
        **settings,
    ) -> list[Answer]:
        """All rows of `generate`, finished; run in batches of `max_rows`, shorter prompts first."""
        seeds = range(len(prompts)) if seeds is None else seeds
        answers = [Answer() for _ in range(len(prompts) * samples)]
        order = sorted(range(len(prompts)), key=lambda p: len(prompts[p]))
        at_once = max(1, max_rows // samples)
        for start in range(0, len(order), at_once):
            group = order[start : start + at_once]
            steps = self.generate(
                [prompts[p] for p in group],
                samples=samples,
                seeds=[seeds[p] for p in group],
                **settings,
            )
            for token in chain.from_iterable(steps):
                answer = answers[group[token.row // samples] * samples + token.row % samples]
                if token.kind == "end":
                    answer.end = token.id
                else:
                    answer.ids.append(token.id)
                    answer.chosen.append(token.kind == "chosen")
        return answers

    def complete(self, prompts: Sequence[Sequence[int]], **settings) -> list[list[int]]:
        """The ids of `answers`, tool results included, without the end token."""
        return [answer.ids for answer in self.answers(prompts, **settings)]

    def _check(self, prompts, max_new_tokens, samples, temperature, top_k, seeds) -> None:
        least = {"max_new_tokens": 1, "samples": 1, "temperature": 0, "top_k": 1}
        for name, value in zip(least, (max_new_tokens, samples, temperature, top_k), strict=True):
            if value is not None and value < least[name]:
                raise ValueError(f"{name} must be at least {least[name]}, got {value}")
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
        for prompt in prompts:
            if not prompt:
                raise ValueError("a prompt must have at least one token (<|bos|>), got none")
            if len(prompt) >= self.context:
                room = f"leaves no room for an answer in a context of {self.context}"
                raise ValueError(f"a prompt of {len(prompt)} tokens {room}; shorten it")

    def _steps(self, prompts, rows: list[_Row], temperature, top_k) -> Iterator[list[Token]]:
        """The steps of `generate`."""
        if not rows:
            return
        logits_PV, cache = self._prefill(prompts)
        samples = len(rows) // len(prompts)
        of_prompt = [p for p in range(len(prompts)) for _ in range(samples)]
        longest = max(len(prompts[p]) + rows[p * samples].left for p in range(len(prompts)))
        cache, logits_BV = self._take(cache, of_prompt, longest), logits_PV[of_prompt]
        while True:
            uniform_B = [row.dice.random() for row in rows] if temperature else []
            drawn = choose(logits_BV, uniform_B, temperature, top_k).tolist()
            step = [self._token(row, id) for row, id in zip(rows, drawn, strict=True)]
            yield [token for row, token in zip(rows, step, strict=True) if row.left]
            for row, token in zip(rows, step, strict=True):
                self._advance(row, token)
            active = [b for b, row in enumerate(rows) if row.left]
            if not active:
                return
            if len(active) <= len(rows) // 2:  # copying costs less than steps of finished rows
                cache = self._take(cache, active, cache.length)
                rows, step = [rows[b] for b in active], [step[b] for b in active]
            counts = [int(row.left > 0) for row in rows]
            logits_BV = self._decode([token.id for token in step], cache, counts)

    def _token(self, row: _Row, drawn: int) -> Token:
        """A row's next token: forced by a tool's result, else the sampled one."""
        if row.forced:
            return Token(row.number, row.forced.popleft(), "forced")
        return Token(row.number, drawn, "end" if drawn in self.ends else "chosen")

    def _advance(self, row: _Row, token: Token) -> None:
        """Count the token, and run the tool if it closes a python part."""
        row.left = 0 if token.kind == "end" else max(0, row.left - 1)
        if self.tool is None or not row.left:
            return
        special = self.tokenizer.special
        if token.id == special("<|python_start|>"):
            row.source = []
        elif row.source is None:
            return
        elif token.id == special("<|python_end|>"):
            row.calls += 1
            output = f"RuntimeError: no more than {TOOL_CALLS} programs in an answer"
            if row.calls <= TOOL_CALLS:
                output = self.tool(self.tokenizer.decode(row.source))
            ids = self.tokenizer.encode(output)[:OUTPUT_TOKENS]
            row.forced.extend([special(OUTPUT_NAMES[0]), *ids, special(OUTPUT_NAMES[1])])
            row.source = None
        else:
            row.source.append(token.id)

    @torch.inference_mode()
    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, _Cache]:
        """The logits [P, V] after each prompt, and a cache that holds the prompts."""
        lengths = [len(prompt) for prompt in prompts]
        ids_PT = padded(prompts, pad=0)
        cache = _Cache(self.model.config, len(prompts), max(lengths), self.runtime)
        with self.runtime.autocast():
            hidden_PTD = self.model.hidden(ids_PT.to(self.runtime.device), cache=cache)
            last_P = torch.tensor(lengths, device=hidden_PTD.device) - 1
            rows_P = torch.arange(len(prompts), device=hidden_PTD.device)
            logits_PV = self.model.logits(hidden_PTD[rows_P, last_P])
        cache.advance(lengths)
        return logits_PV, cache

    @torch.inference_mode()
    def _decode(self, tokens: list[int], cache: _Cache, counts: list[int]) -> Tensor:
        """The logits [B, V] after one more token of each row; finished rows have count 0.

        The first step of each reach runs eagerly; later ones replay a recording of it, if any.
        """
        cache.ids_B1.copy_(torch.tensor(tokens)[:, None])
        reach = cache.reach(1)
        if reach in cache.replays and cache.replays[reach] is None:
            cache.replays[reach] = self._recorded(cache)
        replay = cache.replays.setdefault(reach, None)
        logits_BV = self._step(cache) if replay is None else replay()
        cache.advance(1 if all(counts) else counts)
        return logits_BV

    def _recorded(self, cache: _Cache) -> Replay | None:
        """A recording of the step with this cache and reach; None if recording fails."""
        if self.record is None:
            return None
        try:
            return self.record(lambda: self._step(cache))
        except RuntimeError as error:
            warnings.warn(f"decoding steps cannot be recorded here ({error}): slower", stacklevel=2)
            self.record = None
            return None

    def _step(self, cache: _Cache) -> Tensor:
        with self.runtime.autocast():
            return self.model(cache.ids_B1, cache=cache)[:, -1]

    @torch.inference_mode()
    def _take(self, cache: _Cache, rows: list[int], length: int) -> _Cache:
        """A new cache of those rows, with `length` positions."""
        taken = _Cache(self.model.config, len(rows), length, self.runtime)
        taken.copy_rows(cache, rows)
        return taken


class _Cache(KVCache):
    """A KV cache with the input that recorded steps read, and those recordings."""

    def __init__(self, config: ModelConfig, rows: int, length: int, runtime: Runtime):
        super().__init__(config, rows, length, runtime.device, runtime.dtype)
        self.ids_B1 = torch.zeros(rows, 1, dtype=torch.long, device=runtime.device)
        self.replays: dict[int, Replay | None] = {}  # by reach; None: ran once, not recorded


class _Row:
    """The state of one sample during generation."""

    def __init__(self, number: int, dice: random.Random, left: int):
        self.number, self.dice = number, dice
        self.left = left  # tokens it may still produce; 0: finished
        self.source: list[int] | None = None  # ids of the open python part
        self.forced: deque[int] = deque()  # the rest of a tool's result
        self.calls = 0
