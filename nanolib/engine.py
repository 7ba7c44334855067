"""Generation: read the prompts once, then write many rows, a token a step.

Rows have different lengths and end at different times. Every row draws from its own seed, so what
it says does not depend on what else is in the batch. With a tool, a row that writes
``<|python_start|> source <|python_end|>`` is answered: ``<|output_start|> result <|output_end|>``
is forced into it, a token a step, while the other rows go on.

Shapes: P prompts, B rows (samples of prompts), T time, V vocabulary.
"""

from __future__ import annotations

import random
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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

OUTPUT_NAMES = ("<|output_start|>", "<|output_end|>")  # the tool's alone
TOOL_CALLS = 16  # of one row; a further one is answered by an error
OUTPUT_TOKENS = 128  # of one result; a longer one is cut, so that the row can go on

Tool = Callable[[str], str]  # a program's source -> what it printed, or its error: any text


def end_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a generated row, ``<|assistant_end|>`` first."""
    return tuple(tokenizer.special(name) for name in END_NAMES)


# ---------------------------------------------------------------------------- choosing a token


def probabilities(logits_BV: Tensor, temperature: float, top_k: int | None = None) -> Tensor:
    """The distribution [B, V] that `choose` draws from; temperature must be positive.

    top_k keeps each row's k most likely tokens (all that tie with the k-th).
    """
    logits_BV = logits_BV.float() / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    return logits_BV.softmax(dim=-1)


def inverse_cdf(probabilities_BV: Tensor, uniform_B: Sequence[float]) -> Tensor:
    """For each row the token [B] at which the summed probability first exceeds its uniform draw.

    Never a token of probability zero.
    """
    # GPU prefix sums are not monotone in float32, so a zero-probability token could be drawn.
    exact = torch.float64 if probabilities_BV.is_cuda else probabilities_BV.dtype
    cdf_BV = probabilities_BV.cumsum(dim=-1, dtype=exact)
    below_one = torch.tensor(uniform_B, device=cdf_BV.device, dtype=exact).clamp(max=1 - 2**-24)
    target_B1 = below_one[:, None] * cdf_BV[:, -1:]  # rounding may keep the total from being 1
    return torch.searchsorted(cdf_BV, target_B1, right=True).squeeze(-1)


def choose(
    logits_BV: Tensor, uniform_B: Sequence[float], temperature: float, top_k: int | None = None
) -> Tensor:
    """The next token [B] of each row: the most likely one at temperature 0, else a draw."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    return inverse_cdf(probabilities(logits_BV, temperature, top_k), uniform_B)


# ---------------------------------------------------------------------------- recording

Replay = Callable[[], Tensor]
Record = Callable[[Replay], Replay]  # work whose tensors keep their addresses -> what repeats it


def record_graph(work: Replay) -> Replay:
    """`work` as a CUDA graph: one start for its several hundred small kernels, not one for each.

    It must have run once before. A replay reads what its inputs hold then, and overwrites the
    last result.
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
    """One token of one row: the model chose it, a tool's result forced it, or it ended the row."""

    row: int
    id: int
    kind: Literal["chosen", "forced", "end"]


@dataclass(slots=True)
class Answer:
    """A row. `ids` leave out the end token; `chosen[i]`: the model chose ``ids[i]``.

    `end` is the token that ended it; None: it met a limit.
    """

    ids: list[int] = field(default_factory=list)
    chosen: list[bool] = field(default_factory=list)
    end: int | None = None


class Engine:
    """A model that speaks: `generate` streams, `answers` and `complete` collect.

    `tool` runs what stands between ``<|python_start|>`` and ``<|python_end|>``; None: nothing is
    run. With a tool an output of the model's own making ends its row, as other tokens do that no
    assistant ever says.
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
        """The longest prompt and answer together, in tokens."""
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
        """Continue every prompt `samples` times; each step yields a token of every row in progress.

        Row p · samples + s is sample s of prompt p. A row's last token is of kind "end", unless it
        had max_new_tokens (forced ones count) or met the context's limit before. seeds: one a
        prompt (None: 0, 1, …); a prompt, its seed and the sample's number decide a row, whatever
        else is in the batch.
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
        """Each row of `generate`, whole.

        Any number of prompts: those of like length go together, at most `max_rows` rows at a time.
        """
        seeds = range(len(prompts)) if seeds is None else seeds
        said = [Answer() for _ in range(len(prompts) * samples)]
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
            for token in (token for step in steps for token in step):
                place = group[token.row // samples] * samples + token.row % samples
                if token.kind == "end":
                    said[place].end = token.id
                else:
                    said[place].ids.append(token.id)
                    said[place].chosen.append(token.kind == "chosen")
        return said

    def complete(self, prompts: Sequence[Sequence[int]], **settings) -> list[list[int]]:
        """The ids of `answers`, tool results included, without the end token."""
        return [answer.ids for answer in self.answers(prompts, **settings)]

    def _check(self, prompts, max_new_tokens, samples, temperature, top_k, seeds) -> None:
        for name, value in (("max_new_tokens", max_new_tokens), ("samples", samples)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1 or None, got {top_k}")
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
        for prompt in prompts:
            if not prompt:
                raise ValueError("a prompt must have at least one token (<|bos|>), got none")
            if len(prompt) >= self.context:
                raise ValueError(
                    f"a prompt of {len(prompt)} tokens leaves no room for an answer in a context "
                    f"of {self.context} (model.sequence_len); shorten it"
                )

    def _steps(
        self,
        prompts: Sequence[Sequence[int]],
        rows: list[_Row],
        temperature: float,
        top_k: int | None,
    ) -> Iterator[list[Token]]:
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
            speaking = [b for b, row in enumerate(rows) if row.left]
            if not speaking:
                return
            if len(speaking) <= len(rows) // 2:  # the rest would cost more than moving these
                cache = self._take(cache, speaking, cache.length)
                rows, step = [rows[b] for b in speaking], [step[b] for b in speaking]
            counts = [int(row.left > 0) for row in rows]
            logits_BV = self._decode([token.id for token in step], cache, counts)

    def _token(self, row: _Row, drawn: int) -> Token:
        """A row's next token: what the tool forces, else what was drawn."""
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
            result = self.tokenizer.encode(self._run(row))[:OUTPUT_TOKENS]
            row.forced.extend([special(OUTPUT_NAMES[0]), *result, special(OUTPUT_NAMES[1])])
            row.source = None
        else:
            row.source.append(token.id)

    def _run(self, row: _Row) -> str:
        row.calls += 1
        if row.calls > TOOL_CALLS:
            return f"RuntimeError: no more than {TOOL_CALLS} programs in an answer"
        assert self.tool is not None and row.source is not None
        return self.tool(self.tokenizer.decode(row.source))

    @torch.inference_mode()
    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, _Cache]:
        """The logits [P, V] after each prompt, and a cache that holds the prompts."""
        lengths = [len(prompt) for prompt in prompts]
        ids_PT = padded(prompts, pad=0)
        cache = self._cache(len(prompts), max(lengths))
        with self.runtime.autocast():
            hidden_PTD = self.model.hidden(ids_PT.to(self.runtime.device), cache=cache)
            last_P = torch.tensor(lengths, device=hidden_PTD.device) - 1
            rows_P = torch.arange(len(prompts), device=hidden_PTD.device)
            logits_PV = self.model.logits(hidden_PTD[rows_P, last_P])
        cache.advance(lengths)
        return logits_PV, cache

    @torch.inference_mode()
    def _decode(self, tokens: list[int], cache: _Cache, counts: list[int]) -> Tensor:
        """The logits [B, V] after one more token of each row; rows that count 0 are over.

        The first step of each reach runs as it is; later ones replay it where steps are recorded.
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
        """The step of this cache and reach, recorded; None where that cannot be done."""
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
        taken = self._cache(len(rows), length)
        taken.copy_rows(cache, rows)
        return taken

    def _cache(self, rows: int, length: int) -> _Cache:
        runtime = self.runtime
        return _Cache(self.model.config, rows, length, runtime.device, runtime.dtype)


class _Cache(KVCache):
    """With the addresses that a recorded step reads its tokens from, and what was recorded."""

    def __init__(
        self, config: ModelConfig, rows: int, length: int, device: torch.device, dtype: torch.dtype
    ):
        super().__init__(config, rows, length, device, dtype)
        self.ids_B1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.replays: dict[int, Replay | None] = {}  # by reach; None: that reach was met once


class _Row:
    """One sample while it is written."""

    def __init__(self, number: int, dice: random.Random, left: int):
        self.number, self.dice = number, dice
        self.left = left  # tokens it may still have; 0: it is over
        self.source: list[int] | None = None  # of the open python part
        self.forced: deque[int] = deque()  # what is still to come of a tool's result
        self.calls = 0
