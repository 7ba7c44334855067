"""A session whose model says what is written here: for tests of what people see.

The engine and the sandbox are the real ones. `session()` answers a sum with a program, "count"
without end, and anything else by telling how many special tokens the prompt has.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from itertools import chain, count, islice

import torch
from conftest import TINY

from nanolib.config import ModelConfig
from nanolib.engine import Engine
from nanolib.runtime import Runtime
from nanolib.session import Session
from nanolib.tokenizer import Tokenizer
from nanolib.tools import Sandbox

PACE = 0.004  # seconds per token: an answer without end lasts minutes


class Script:
    """Looks like a model to the engine; says what a script has after the prompt.

    It keeps the ids in the cache and knows a row by them alone, like a real model.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer
        self.fails, self.logit = False, 1000.0
        self.scripts: dict[tuple[int, ...], tuple[list[int], Iterator[int]]] = {}

    def hidden(self, ids_BT, cache):
        for row, (ids, used) in enumerate(zip(ids_BT, cache.used, strict=True)):
            room = cache.keys_LBGSK[0, row, 0, used : used + len(ids), 0]
            room.copy_(ids[: len(room)])
        return ids_BT[..., None].float()

    def __call__(self, ids_B1, cache):
        time.sleep(PACE)
        if self.fails:
            raise ArithmeticError("the engine broke")
        self.hidden(ids_B1, cache)
        rows = cache.keys_LBGSK[0, :, 0, :, 0].long()
        following = [
            self.next(row[: n + 1].tolist()) for row, n in zip(rows, cache.used, strict=True)
        ]
        one_hot = torch.nn.functional.one_hot(torch.tensor(following), self.tokenizer.vocab_size)
        return one_hot[:, None] * self.logit

    def next(self, ids: list[int]) -> int:
        """What follows the tokens that are the script's, not forced by a tool."""
        names = ("<|assistant_start|>", "<|output_start|>", "<|output_end|>")
        start, *output = map(self.tokenizer.special, names)
        begin = len(ids) - ids[::-1].index(start)
        chosen, forced = 0, False
        for id in ids[begin:]:
            forced = forced or id == output[0]
            chosen += not forced
            forced = forced and id != output[1]
        key = tuple(ids[:begin])
        said, rest = self.scripts.setdefault(key, ([], self.script(ids[:begin])))
        said += islice(rest, max(0, chosen + 1 - len(said)))
        return said[min(chosen, len(said) - 1)]

    def script(self, prompt: list[int]) -> Iterator[int]:
        special, encode = self.tokenizer.special, self.tokenizer.encode
        asked = self.tokenizer.decode(prompt).rpartition("<|user_start|>")[2]
        end = [special("<|assistant_end|>")]
        if sums := re.search(r"(\d+) plus (\d+)", asked):
            program = encode(f"{sums[1]}+{sums[2]}")
            call = [special("<|python_start|>"), *program, special("<|python_end|>")]
            said = encode("Let me see. "), call, encode("So the *sum* is in the `output`."), end
            return chain(*said)
        if "count" in asked:
            return chain.from_iterable(encode(f"{number}, ") for number in count(1))
        found = sum(id >= self.tokenizer.bos for id in prompt)
        said = f"That prompt has {found} special tokens. You said: "
        return chain(encode(said), encode(asked.partition("<|user_end|>")[0]), end)


def session() -> Session:
    tokenizer = Tokenizer.train(["the cat sat on the mat"], 270)
    sandbox = Sandbox(workers=1).__enter__()
    config = ModelConfig(**(vars(TINY) | {"sequence_len": 20_000}))
    engine = Engine(
        Script(config, tokenizer),  # ty: ignore[invalid-argument-type]
        tokenizer,
        Runtime(device=torch.device("cpu"), dtype=torch.float32),
        lambda source: sandbox.run(source).text,
    )
    return Session(engine, temperature=0.0, max_new_tokens=15_000)
