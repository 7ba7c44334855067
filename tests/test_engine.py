"""Generation against the plain loop: run the whole row again for every token."""

from __future__ import annotations

import collections

import pytest
import torch
from test_model import CPU, VOCAB, random_ids, random_model, tiny
from torch.testing import assert_close

from nanolib.engine import END_NAMES, Engine, choose, end_tokens, inverse_cdf, probabilities
from nanolib.runtime import Runtime


class Specials:
    """As much of a tokenizer as the engine needs: the last ids are special."""

    def special(self, name: str) -> int:
        return VOCAB - 1 - END_NAMES.index(name)


def engine(seed: int = 0, **changes) -> Engine:
    """Its random model ends a row about every dozen tokens."""
    model = random_model(tiny(**changes), seed)
    return Engine(model, Specials(), Runtime(device=CPU, dtype=torch.float32))


def prompts(*lengths: int) -> list[list[int]]:
    return [random_ids(1, n, seed=n)[0].clamp(max=VOCAB - 6).tolist() for n in lengths]


def plain_greedy(engine: Engine, prompt: list[int], limit: int) -> list[int]:
    """No cache, no batch."""
    ids, said = list(prompt), []
    while len(said) < limit and len(ids) < engine.context:
        with torch.no_grad():
            token = int(engine.model(torch.tensor([ids]))[0, -1].argmax())
        if token in engine.ends:
            break
        ids.append(token)
        said.append(token)
    return said


# ---------------------------------------------------------------------------- choosing a token


def test_probabilities_are_softmax_with_temperature_and_top_k():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 5.0, 5.0, 5.0]])
    assert_close(probabilities(logits, 0.5), (logits / 0.5).softmax(-1))
    kept = probabilities(logits, 1.0, top_k=2)
    assert_close(kept[0], torch.cat((logits[0, :2].softmax(0), torch.zeros(2))))
    assert_close(kept[1], torch.tensor([0, 1 / 3, 1 / 3, 1 / 3]))  # a tie with the k-th stays
    assert_close(probabilities(logits, 1.0, top_k=9), logits.softmax(-1))


def test_inverse_cdf_draws_each_token_as_often_as_it_should():
    weights = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.2, 0.0]])
    uniform = (torch.arange(1000) / 1000).tolist()
    drawn = collections.Counter(inverse_cdf(weights.expand(1000, -1), uniform).tolist())
    assert {token: round(count, -1) for token, count in drawn.items()} == {1: 500, 3: 300, 4: 200}


def test_inverse_cdf_at_its_ends_never_draws_the_impossible():
    weights = torch.tensor([[0.0, 1.0, 2.0, 0.0]] * 2)  # need not sum to 1
    assert inverse_cdf(weights, [0.0, 1.0 - 2**-53]).tolist() == [1, 2]


def test_temperature_zero_is_greedy_and_top_1_is_too():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    assert choose(logits, [], 0.0).equal(logits.argmax(-1))
    assert choose(logits, [0.1, 0.3, 0.5, 0.7, 0.9], 1.0, top_k=1).equal(logits.argmax(-1))


# ---------------------------------------------------------------------------- rows


@pytest.mark.parametrize("kv_heads", [None, 3])
def test_greedy_batch_equals_plain_loop(kv_heads):
    """Rows of different length that end at different times, some at the limit."""
    speaker = engine(kv_heads=kv_heads, sequence_len=48)
    asked = prompts(1, 9, 4, 17, 5, 6, 30, 11)
    want = [plain_greedy(speaker, prompt, limit=20) for prompt in asked]
    assert len({len(said) for said in want}) > 2, "the rows should end at different times"
    assert speaker.complete(asked, max_new_tokens=20) == want
    assert speaker.complete(asked, max_new_tokens=20, max_rows=3) == want


def test_seed_decides_a_row_whatever_else_is_in_the_batch():
    speaker, asked = engine(sequence_len=64), prompts(5, 12, 3, 8)
    settings = {"max_new_tokens": 30, "temperature": 1.0, "top_k": 40}
    together = speaker.complete(asked, samples=3, seeds=[7, 8, 9, 7], **settings)
    for p, prompt in enumerate(asked):
        alone = speaker.complete([prompt], samples=3, seeds=[[7, 8, 9, 7][p]], **settings)
        assert alone == together[3 * p : 3 * p + 3]
    few = speaker.complete(asked[:1], samples=1, seeds=[7], **settings)
    assert few == together[:1]
    other = speaker.complete(asked[:1], samples=3, seeds=[70], **settings)
    assert other != together[:3]


def test_first_tokens_of_samples_are_drawn_apart():
    """One prefill, but not one first token copied to every sample; and as often as they should."""
    speaker, prompt = engine(), prompts(6)
    with torch.no_grad():
        expected = probabilities(speaker.model(torch.tensor(prompt))[:, -1], 1.0)[0]
    steps = speaker.generate(prompt, samples=2000, max_new_tokens=1, temperature=1.0)
    drawn = collections.Counter(token for _, token, _ in next(steps))
    share = torch.tensor([drawn[token] / 2000 for token in range(VOCAB)])
    assert len(drawn) > 10
    assert (share - expected).abs().max() < 4 * (0.25 / 2000) ** 0.5


def test_steps_stream_rows_until_their_end_token():
    speaker, asked = engine(sequence_len=64), prompts(4, 7)
    rows = collections.defaultdict(list)
    steps = list(speaker.generate(asked, samples=4, max_new_tokens=25, temperature=1.0))
    for step in steps:
        assert [row for row, *_ in step] == sorted({row for row, *_ in step})
        for row, token, kind in step:
            assert kind == ("end" if token in speaker.ends else "chosen")
            rows[row].append(token)
    assert sorted(rows) == list(range(8))
    assert len(steps) == max(map(len, rows.values()))
    for said in rows.values():
        assert not speaker.ends & set(said[:-1])
        assert said[-1] in speaker.ends or len(said) == 25
    whole = speaker.complete(asked, samples=4, max_new_tokens=25, temperature=1.0)
    assert whole == [[t for t in rows[row] if t not in speaker.ends] for row in range(8)]


def test_rows_stop_at_the_context_and_longer_prompts_are_refused():
    speaker = engine(sequence_len=16)
    speaker.ends = frozenset()
    said = speaker.complete(prompts(15, 10, 2), max_new_tokens=8)
    assert [len(row) for row in said] == [1, 6, 8]
    with pytest.raises(ValueError, match=r"16 tokens leaves no room.* context of 16"):
        speaker.generate(prompts(3, 16), max_new_tokens=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"seeds": [1, 2]}, "1 prompts need as many seeds, got 2"),
    ],
)
def test_bad_settings_are_named_before_anything_runs(settings, message):
    with pytest.raises(ValueError, match=message):
        engine().generate(prompts(3), **{"max_new_tokens": 4, **settings})
    with pytest.raises(ValueError, match="at least one token"):
        engine().generate([[]], max_new_tokens=4)


def test_batches_keep_to_max_rows_and_shrink_as_rows_end():
    speaker, asked, sizes = engine(sequence_len=64), prompts(5, 12, 3, 8), []
    decode = speaker._decode

    def recording(tokens, cache, counts):
        sizes.append((len(tokens), sum(counts)))
        return decode(tokens, cache, counts)

    speaker._decode = recording
    settings = {"samples": 3, "max_new_tokens": 40, "temperature": 1.0}
    speaker.complete(asked, max_rows=7, **settings)
    assert max(rows for rows, _ in sizes) == 6, "two prompts at a time"
    assert all(rows < 2 * speaking for rows, speaking in sizes)
    sizes.clear()
    speaker.complete(asked, max_rows=1, **settings)
    assert max(rows for rows, _ in sizes) == 3, "a prompt's samples stay together"


def test_nothing_to_say_is_nothing_said():
    assert engine().complete([], max_new_tokens=4) == []


def test_end_tokens_begin_with_the_assistants():
    assert end_tokens(Specials())[0] == Specials().special("<|assistant_end|>")
