"""A session whose model says what is written here: for tests of what people see.

The engine and the sandbox are the real ones. `session()` answers a sum with a program, "count"
without end, and anything else by telling how many special tokens the prompt has.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from itertools import chain, count

import torch
from conftest import TINY

from nanolib.config import ModelConfig
from nanolib.engine import Engine
from nanolib.runtime import Runtime
from nanolib.session import Session
from nanolib.tokenizer import Tokenizer
from nanolib.tools import Sandbox

PACE = 0.01  # seconds per token: an answer without end lasts minutes


class Script:
    """Looks like a model to the engine; follows a script from one token to the next."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer
        self.rest: Iterator[int] = iter(())
        self.next = 0

    def hidden(self, ids_BT, cache=None):
        self.rest = self.script(ids_BT[0].tolist())
        self.next = next(self.rest)
        return ids_BT[..., None].float()

    def logits(self, hidden):
        time.sleep(PACE)
        one_hot = torch.nn.functional.one_hot(torch.tensor([self.next]), self.tokenizer.vocab_size)
        return one_hot * 1000.0

    def __call__(self, ids_BT, cache=None):
        if ids_BT.item() == self.next:  # else the tool's result is being forced into the answer
            self.next = next(self.rest)
        return self.logits(None)[None]

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
