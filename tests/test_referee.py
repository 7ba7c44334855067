"""The referee's adapter: our scores of a Llama beside one forward pass of transformers."""

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nanolib.evals import core
from nanolib.model import KVCache
from nanolib.runtime import Runtime
from runs.bench import referee


def random_llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes, **heads)).eval()


def test_scores_through_our_cache_are_those_of_a_plain_forward_pass():
    """Of contexts of different lengths, one of them BOS alone, with different continuations."""
    theirs = random_llama()
    rng = random.Random(1)
    prompts = [
        core.Prompt(
            [0, *rng.choices(range(50), k=size)], [rng.choices(range(50), k=n) for n in ends]
        )
        for size, ends in ((0, (1, 4)), (3, (2, 5, 1)), (40, (7,)), (300, (3, 2)))
    ]
    runtime = Runtime(device=torch.device("cpu"), dtype=torch.float32)
    for tokens_at_once in (1, 10_000):
        scores = core.score(referee.Llama(theirs), prompts, runtime, tokens_at_once)
        for prompt, found in zip(prompts, scores, strict=True):
            for ids, score in zip(prompt.continuations, found, strict=True):
                with torch.inference_mode():
                    logits_TV = theirs(torch.tensor([prompt.context + ids])).logits[0]
                logp_TV = logits_TV[-len(ids) - 1 : -1].log_softmax(-1)
                plain = float(logp_TV[torch.arange(len(ids)), ids].sum())
                assert score.logprob == pytest.approx(plain, abs=1e-3) and score.tokens == len(ids)
                assert score.greedy == (logp_TV.argmax(-1).tolist() == ids)


@torch.inference_mode()
def test_all_tensors_are_on_the_device_of_the_model():
    """Seen on `meta`, which computes nothing, but objects to a tensor of another device."""
    model, device = referee.Llama(random_llama().to("meta")), torch.device("meta")
    cache = KVCache(model.config, 2, 20, device, torch.float32)
    for size in (0, 3, 5):  # nothing to read, a context, its continuations
        hidden_BTD = model.hidden(torch.zeros(2, size, dtype=torch.long, device=device), cache)
        assert hidden_BTD.shape == (2, size, 32) and hidden_BTD.device == device
        cache.advance(size)
