"""Generation against the plain loop: run the whole row again for every token."""

from __future__ import annotations

import collections
import gc
import itertools
import random
import threading
import time
import weakref
from itertools import chain

import pytest
import torch
from browser import PATIENCE
from test_model import ALL, CPU, VOCAB, random_ids, random_model, tiny
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from nanolib.engine import (
    END_NAMES,
    LATE,
    OUTPUT_TOKENS,
    SHARE,
    TOOL_CALLS,
    Engine,
    Token,
)
from nanolib.model import GPT
from nanolib.runtime import Runtime, record_graph, seed_of
from nanolib.sampling import choose, inverse_cdf, probabilities, uniforms
from nanolib.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanolib.tools import Sandbox


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
    assert choose(logits, [0.1, 0.3, 0.5, 0.7, 0.9], 0.0).equal(logits.argmax(-1))
    assert choose(logits, [0.1, 0.3, 0.5, 0.7, 0.9], 1.0, top_k=1).equal(logits.argmax(-1))


def test_top_p_keeps_the_fewest_that_have_the_share_together():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.3, 0.2]]))
    want = [
        ([0, 4, 0, 3], [1, 1, 1, 0]),
        ([0, 1, 0, 0], [0, 0, 1, 0]),
        ([1, 4, 2, 3], [5, 5, 6, 4]),
    ]
    for top_p, rows in zip((0.6, 0.0, 1.0), want, strict=True):
        kept = probabilities(logits, 1.0, top_p=top_p)
        assert ((kept > 0) == (torch.tensor(rows) > 0)).all(), "a tie with the last one stays"
    cut = probabilities(logits, 1.0, top_k=2, top_p=0.5)[0]  # of what top_k leaves: 4/7 and 3/7
    assert (cut > 0).tolist() == [False, True, False, False]


def test_each_row_has_its_own_settings():
    draw = torch.Generator().manual_seed(0)
    logits, uniform = torch.randn(60, 40, generator=draw) * 3, torch.rand(60, generator=draw)
    temperature = torch.tensor([0.0, 0.3, 1.0, 2.0] * 15)
    top_k, top_p = torch.tensor([0, 5, 50] * 20), torch.tensor([1.0, 0.9, 0.2, 0.0, 0.999] * 12)
    together = choose(logits, uniform, temperature, top_k, top_p, most=50)
    settings = zip(temperature.tolist(), top_k.tolist(), top_p.tolist(), strict=True)
    for row, (t, k, p) in enumerate(settings):
        one = logits[row : row + 1], uniform[row : row + 1], t, k or None, p if p < 1 else None
        assert choose(*one).item() == together[row], (t, k, p)


def test_a_row_without_top_p_keeps_its_tail_beside_one_that_has_it():
    logits = torch.randn(40, 50_000, generator=torch.Generator().manual_seed(0)) * 3
    both = probabilities(logits, 1.0, top_p=torch.tensor([1.0, 0.5] * 20))
    assert both[::2].equal(probabilities(logits, 1.0)[::2]), "sums of shares are not exact"


def splitmix(key: int, position: int) -> float:
    """`uniforms` with whole numbers."""
    x = (key + position * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return ((x ^ x >> 31) >> 40) / 2**24


def test_draws_are_hashes_of_key_and_position():
    keys = [seed_of(seed, "sample", s) for seed in range(40) for s in range(5)]
    places = torch.arange(50).repeat(200)
    draws = uniforms(torch.tensor(keys).repeat_interleave(50), places)
    assert draws.tolist() == [splitmix(key, place) for key in keys for place in range(50)]
    counts = (draws * 10).long().bincount(minlength=10)
    assert counts.sum() == 10_000 and (counts - 1000).abs().max() < 120
    both = draws.view(200, 50)
    for apart in (both[:, 1:], both[:, :-1]), (both[1:], both[:-1]):
        pair = torch.stack([part.flatten() for part in apart])
        assert torch.corrcoef(pair)[0, 1].abs() < 0.04


# ---------------------------------------------------------------------------- rows


@pytest.mark.parametrize("ingredients", [(), ALL])
@pytest.mark.parametrize(("kv_heads", "reach"), [(None, 64), (3, 8)])
def test_greedy_batch_equals_plain_loop(kv_heads, reach, ingredients, monkeypatch):
    """Rows of different length that end at different times, some at the limit."""
    monkeypatch.setattr("nanolib.model.REACH", reach)
    speaker = engine(kv_heads=kv_heads, sequence_len=48, ingredients=ingredients)
    asked = prompts(1, 9, 4, 17, 5, 6, 30, 11)
    want = [plain_greedy(speaker, prompt, limit=20) for prompt in asked]
    assert len({len(said) for said in want}) > 2, "the rows should end at different times"
    assert speaker.complete(asked, max_new_tokens=20) == want
    speaker.max_rows, speaker.chunk = 3, 7  # rows wait, and longer prompts are read in pieces
    assert speaker.complete(asked, max_new_tokens=20) == want


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
    speaker.max_rows = 2000
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
    with pytest.raises(ValueError, match=r"1 to 15 tokens, .* context of 16 .*; got 16"):
        next(speaker.generate(prompts(3, 16), max_new_tokens=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"seeds": [1, 2]}, "1 prompts need as many seeds, got 2"),
    ],
)
def test_bad_settings_are_named_before_anything_runs(settings, message):
    with pytest.raises(ValueError, match=message):
        next(engine().generate(prompts(3), **{"max_new_tokens": 4, **settings}))
    with pytest.raises(ValueError, match=r"1 to 31 tokens, .*; got 0"):
        next(engine().generate([[]], max_new_tokens=4))


def test_a_freed_slot_does_not_cost_a_look_at_everyone_who_waits(monkeypatch):
    speaker, looks, in_flight = engine(), [], Engine._flight
    monkeypatch.setattr(Engine, "_flight", lambda self: looks.append(1) or in_flight(self))
    speaker.max_rows = 2
    assert len(speaker.complete([[1 + i] for i in range(40)], max_new_tokens=12)) == 40
    assert len(looks) <= 2  # to size the cache, not once for each of 20 or more refills


def test_a_slot_is_filled_again_at_once_and_no_step_is_wasted_on_an_empty_one():
    speaker, asked, sizes = engine(sequence_len=64), prompts(5, 12, 3, 8), []
    draw = speaker._draw

    def counting(slots):
        sizes.append(sum(request.left > 0 for request in speaker._rows))
        assert len(slots.ids_B1) == len(speaker._rows) == sizes[-1]
        return draw(slots)

    speaker._draw, speaker.max_rows = counting, 7
    settings = {"samples": 3, "max_new_tokens": 40, "temperature": 1.0}
    said = speaker.complete(asked, **settings)
    ends = [len(row) + (len(row) < 40) for row in said]
    assert sum(sizes) == sum(ends)
    assert sizes == sorted(sizes, reverse=True), "seven, until nobody waits"
    assert sizes[: sum(ends) // 10] == [7] * (sum(ends) // 10)
    speaker.max_rows = 1
    sizes.clear()
    assert speaker.complete(asked, **settings) == said
    assert sizes == [1] * sum(ends)


def test_few_ended_rows_leave_together_but_not_late_and_not_while_all_who_wait_could_begin():
    speaker = engine(sequence_len=64)
    speaker.max_rows, speaker.ends = 64, frozenset()
    lengths = [*range(2, 10), *[20] * 4, 26, 32, *[50] * 50]
    first = [*chain(*(speaker.submit([[1]], max_new_tokens=length) for length in lengths))]
    more = [*chain(*(speaker.submit([[2]], max_new_tokens=40) for _ in range(14)))]
    begun = []
    for _ in range(33):
        speaker.step()
        begun.append(sum(bool(request.tokens) for request in more))
    assert begun[:9] == [0, 0, 0, 2, 2, 4, 4, 6, 6], "one ends at each step: two leave together"
    assert begun[9:20] == [8] * 11 and begun[20:26] == [12] * 6, (
        "four that end at once leave at once"
    )
    assert begun[26:30] == [12] * (LATE - 1) + [13], "one alone stays for LATE - 1 steps"
    assert begun[31:] == [13, 14], "the last who waits has a slot at once"
    while speaker.busy:
        speaker.step()
    assert [len(request.tokens) for request in (*first, *more)] == [*lengths, *[40] * 14]


def test_a_row_that_stays_after_its_end_writes_within_the_cache(monkeypatch):
    monkeypatch.setattr("nanolib.engine.SHARE", 1)
    speaker, (short, full, long) = engine(sequence_len=128), prompts(5, 60, 100)
    speaker.ends = frozenset()
    first, ended = speaker.submit([short, full], max_new_tokens=4)
    first.left = 30
    for _ in range(6):
        speaker.step()
    assert not ended.left and ended in speaker._rows and speaker._slots.length == 64
    (last,) = speaker.submit([long], max_new_tokens=4)  # the cache grows
    while speaker.busy:
        speaker.step()
    for request, prompt, limit in ((first, short, 30), (ended, full, 4), (last, long, 4)):
        assert request.answer().ids == plain_greedy(speaker, prompt, limit)


class Kernels(TorchDispatchMode):
    """Counts operations that would start a kernel or a copy on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += not op.is_view
        return op(*args, **(kwargs or {}))


def test_many_rows_come_move_and_go_with_as_many_kernels_as_few():
    counts = []
    for rows in (2, 8):
        speaker, asked = engine(sequence_len=64), prompts(*range(3, 3 + 3 * rows))
        speaker.max_rows, speaker.chunk, speaker.ends = 2 * rows, 8192, frozenset()
        for each, length in enumerate((3, 9, 5)):  # the third ones take the first ones' slots
            for prompt in asked[each * rows : (each + 1) * rows]:
                speaker.submit([prompt], max_new_tokens=length)
        counts.append(list[int]())
        while speaker.busy:
            with Kernels() as kernels:
                speaker.step()
            counts[-1].append(kernels.count)
            if len(counts[-1]) == 6:
                speaker.cancel(*speaker._rows[:rows])  # the second ones move
    assert counts[0] == counts[1] and len(counts[0]) == 9
    assert 10 < counts[0][3] - counts[0][2] < 20 and 10 < counts[0][6] - counts[0][5] < 20


def plain_sampled(engine: Engine, prompt: list[int], limit: int, seed: int, s: int, **how) -> list:
    """No cache, no batch, no scheduler."""
    ids, key = list(prompt), seed_of(seed, "sample", s)
    for _ in range(min(limit, engine.context - len(prompt))):
        with torch.no_grad():
            logits = engine.model(torch.tensor([ids]))[:, -1]
        ids.append(int(choose(logits, [splitmix(key, len(ids) - 1)], **how)))
        if ids[-1] in engine.ends:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("share", [SHARE, 1])
@pytest.mark.parametrize("seed", range(4))
def test_whoever_comes_and_goes_a_row_says_what_it_says_alone(seed, share, monkeypatch):
    """Requests at random times, some cancelled, with settings, prompts and kept rows of all kinds.
    With a share of 1, rows that have ended stay as long as they may."""
    monkeypatch.setattr("nanolib.engine.SHARE", share)
    ingredients = ALL if seed % 2 else ()
    draw, speaker = random.Random(seed), engine(sequence_len=72, ingredients=ingredients)
    speaker.max_rows, speaker.chunk = draw.choice([3, 5, 16]), draw.choice([4, 30, 400])
    asked, told, most = prompts(*range(1, 60, 7)), [], 0
    for _ in range(160):
        if draw.random() < 0.3 and len(told) < 24:
            how = {"temperature": draw.choice([0.0, 0.7, 1.3]), "top_k": draw.choice([None, 3, 20])}
            how["top_p"] = draw.choice([1.0, 0.8])
            some = {"samples": draw.choice([1, 1, 4]), "seeds": [draw.randrange(3)]}
            prompt, limit = draw.choice(asked), draw.choice([1, 9, 30])
            keep = {"keep": draw.random() < 0.5}
            new = speaker.submit([prompt], max_new_tokens=limit, **some, **how, **keep)
            told += [(request, prompt, limit, *some["seeds"], how) for request in new]
        if told and draw.random() < 0.1:
            speaker.cancel(draw.choice(told)[0])
        speaker.step()
        assert len(speaker._rows) <= speaker.max_rows
        assert share == 1 or not any(row.cancelled for row in speaker._rows)
        assert not any(speaker._slots.used[len(speaker._rows) :]), "a row that left counts no more"
        most = max(most, len(speaker._rows))
    while speaker.busy:
        speaker.step()
    finished = 0
    for request, prompt, limit, seed, how in told:
        said = [id for id, _ in request.tokens]
        want = plain_sampled(speaker, prompt, limit, seed, request.row, **how)
        assert said == want if request.left == 0 else said == want[: len(said)]
        finished += request.left == 0
    assert most > 2 and finished > 15 and any(row.cancelled for row, *_ in told)


def test_logprobs_are_those_of_one_forward_pass_whatever_is_in_flight():
    """Of the chosen tokens, their end too, before temperature and top-k; rows without them beside."""
    speaker, texts = engine(sequence_len=64), prompts(5, 9, 20)
    speaker.max_rows = 2
    given = {"max_new_tokens": 12, "temperature": 0.7, "top_k": 5}
    plain = speaker.submit(texts[:1], seeds=[8], **given)
    requests = speaker.submit(texts, seeds=[1, 2, 3], samples=2, logprobs=True, **given)
    while speaker.busy:
        speaker.step()
    for request in requests:
        ids = [id for id, _ in request.tokens]
        with torch.no_grad():
            logits_TV = speaker.model(torch.tensor([[*request.ids, *ids]]))[
                0, len(request.ids) - 1 : -1
            ]
        want = [float(row.log_softmax(-1)[id]) for row, id in zip(logits_TV, ids, strict=True)]
        assert request.logprobs == pytest.approx(want, abs=1e-5)
    assert any(request.tokens[-1][1] == "end" for request in requests)
    assert [r.tokens for r in plain] == [r.tokens for r in _alone(texts[:1], seeds=[8], **given)]


def _alone(texts, **given):
    speaker = engine(sequence_len=64)
    requests = speaker.submit(texts, **given)
    while speaker.busy:
        speaker.step()
    assert not any(request.logprobs for request in requests)
    return requests


def reads(speaker: Engine) -> list[tuple[int, int]]:
    """Rows and columns of everything that the model will be given, as a list that grows."""
    seen, hidden = [], speaker.model.hidden
    speaker.model.hidden = lambda ids, cache=None: (seen.append(tuple(ids.shape)), hidden(ids, cache))[1]  # fmt: skip
    return seen


def test_samples_share_one_reading_of_their_prompt_also_while_some_wait():
    speaker = engine(sequence_len=64)
    speaker.max_rows, speaker.ends, seen = 2, frozenset(), reads(speaker)
    said = speaker.complete(prompts(20), samples=5, max_new_tokens=4, temperature=1.0)
    assert len({tuple(row) for row in said}) == 5
    assert seen == [(1, 19), *[(2, 1)] * 8, *[(1, 1)] * 4]


def test_prompts_are_read_together_before_slots_are_free():
    """One forward pass for all that fit a chunk, however few slots there are."""
    speaker, seven = engine(sequence_len=64), prompts(5, 5, 5, 5, 9, 9, 9)
    speaker.max_rows, speaker.chunk, speaker.ends, seen = 2, 36, frozenset(), reads(speaker)
    said = speaker.complete(seven, max_new_tokens=6)
    assert [shape for shape in seen if shape[1] > 1] == [(4, 4), (3, 8)]
    alone = engine(sequence_len=64)
    alone.ends = frozenset()
    assert said == [alone.complete([prompt], max_new_tokens=6)[0] for prompt in seven]


def test_a_long_prompt_is_read_between_the_tokens_of_the_others():
    speaker = engine(sequence_len=64)
    speaker.chunk, speaker.ends = 10, frozenset()
    (first,) = speaker.submit(prompts(5), max_new_tokens=20)
    speaker.step()
    assert first.prompt is None, "its memory is needed no more"
    (long,) = speaker.submit(prompts(41), max_new_tokens=2)
    for step in range(1, 7):
        speaker.step()
        assert len(first.tokens) == 1 + step
        assert len(long.tokens) == min(2, max(0, step - 3)), (
            "four chunks, and the last is followed at once"
        )


@pytest.mark.parametrize("ingredients", [(), ALL])
def test_a_kept_beginning_is_not_read_again_and_memory_is_bounded(ingredients):
    speaker, (asked,) = engine(sequence_len=128, ingredients=ingredients), prompts(40)
    speaker.ends, seen = frozenset(), reads(speaker)
    alone = speaker.complete([asked], max_new_tokens=8)[0]
    assert [*chain(*speaker.generate([asked], max_new_tokens=8, keep=True))][-1].id == alone[-1]
    longer = [*asked, *alone, *asked[:5]]
    want = speaker.complete([longer], max_new_tokens=8)
    seen.clear()
    assert speaker.complete([longer], max_new_tokens=8, keep=True) == want
    assert seen[0] == (1, 44 - 39 - 8 + 8), "all but the last token of the answer was known"
    seen.clear()
    speaker.complete([longer], max_new_tokens=8)
    assert seen[0] == (1, 52), "who does not ask for it gets nothing kept"
    each = speaker._kept.rows[0][1].nbytes
    assert len(speaker._kept.rows) == 1, "the longer row has all of the shorter"
    speaker._kept.most_bytes = each * 3
    others = prompts(*range(41, 50))
    for prompt in others:
        speaker.complete([prompt], max_new_tokens=8, keep=True)
    speaker.step()  # the last row leaves
    held = [row[0] for row in speaker._kept.rows]
    assert 1 < len(held) < 5
    assert [row[:40] for row in held] == [prompt[:40] for prompt in others[-len(held) :]]
    speaker.release()
    seen.clear()
    speaker.complete([longer], max_new_tokens=1, keep=True)
    assert seen[0] == (1, 52)


def test_a_prompt_that_is_known_and_one_that_is_not_are_read_together():
    speaker, asked = engine(sequence_len=128), prompts(30, 60)
    want = speaker.complete(asked, max_new_tokens=4)
    speaker.complete(asked[1:], max_new_tokens=1, keep=True)
    seen = reads(speaker)
    assert speaker.complete(asked, max_new_tokens=4, keep=True) == want
    assert seen[0] == (2, 29), "the other's padding is as long"


def test_two_callers_share_the_steps_and_neither_waits_for_the_other():
    speaker, (one, two) = engine(sequence_len=64), prompts(5, 9)
    speaker.ends = frozenset()
    want = [speaker.complete([prompt], max_new_tokens=20)[0] for prompt in (one, two)]
    pair = [speaker.generate([prompt], max_new_tokens=20) for prompt in (one, two)]
    both = [*zip(*pair, strict=True)]
    assert [[step[0].id for step in steps] for steps in zip(*both, strict=True)] == want
    said = {}
    asks = [threading.Thread(target=lambda p=p: said.update({p: speaker.complete([(one, two)[p % 2]], max_new_tokens=20)[0]})) for p in range(6)]  # fmt: skip
    for thread in asks:
        thread.start()
    for thread in asks:
        thread.join()
    assert said == {p: want[p % 2] for p in range(6)}
    with pytest.raises(ValueError, match=r"1 to 63 tokens, .*; got 64"):
        speaker.answers(prompts(3, 64), max_new_tokens=2)
    assert not speaker.busy


def test_a_step_that_fails_ends_every_request_with_the_error(monkeypatch):
    speaker = engine(sequence_len=64)
    speaker.ends, speaker.max_rows = frozenset(), 1
    want = speaker.complete(prompts(5), max_new_tokens=4)
    steps = speaker.generate(prompts(5), max_new_tokens=20)
    next(steps)
    (waiting,) = speaker.submit(prompts(9), max_new_tokens=4)

    def broken(*_, **__):
        raise ArithmeticError("no such product")

    monkeypatch.setattr(GPT, "hidden", broken)
    with pytest.raises(ArithmeticError):
        next(steps)
    monkeypatch.undo()
    assert waiting.live
    with pytest.raises(ArithmeticError):
        waiting.take()
    assert not speaker.busy and speaker.complete(prompts(5), max_new_tokens=4) == want


def test_release_gives_the_memory_back_and_only_at_rest():
    speaker = engine(sequence_len=64)
    speaker.ends = frozenset()
    steps = speaker.generate(prompts(5), max_new_tokens=20)
    next(steps)
    with pytest.raises(RuntimeError, match="rows are being written"):
        speaker.release()
    steps.close()
    held = [weakref.ref(cache) for cache in (speaker._slots, speaker._slots.first(1))]
    gc.disable()
    speaker.release()
    gc.enable()
    assert [cache() for cache in held] == [None, None]
    assert len(speaker.complete(prompts(5), max_new_tokens=20)[0]) == 20


def traced(work):
    """In a CUDA graph's place: what the host knew is frozen, and each result overwrites the last."""
    program = make_fx(work)()
    result = program()

    def replay() -> torch.Tensor:
        return result.copy_(program())

    return replay


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_recorded_steps_say_the_same(device, monkeypatch):
    """Over three reaches, with rows that end, and weights that change between."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    for module in "engine", "model":
        monkeypatch.setattr(f"nanolib.{module}.REACH", 16)
    plain, recorded = engine(sequence_len=48), []
    plain.model.to(device)
    plain.runtime, plain.record = Runtime(device=torch.device(device), dtype=torch.float32), None
    speaker = Engine(plain.model, Specials(), plain.runtime)
    record = record_graph if device == "cuda" else traced
    speaker.record = lambda work: recorded.append(record(work)) or recorded[-1]
    settings = {"samples": 2, "max_new_tokens": 36, "temperature": 1.0, "seeds": [4, 5]}
    counts = []
    for round in range(4):
        said = plain.complete(prompts(5, 9), **settings)
        assert speaker.complete(prompts(5, 9), **settings) == said
        assert max(map(len, said)) > 24
        counts.append(len(recorded))
        if round == 2:
            with torch.no_grad():
                plain.model.head.weight.mul_(1.01)
    assert set(speaker._slots.views) <= {1, 2, 4}, "few kinds to record"
    assert 3 <= counts[1] <= 9, "each reach once for each number of rows"
    assert counts[1] == counts[2] and counts[3] <= counts[1] + 2


def test_where_steps_cannot_be_recorded_they_run_one_by_one():
    def refuse(work):
        raise RuntimeError("operation not permitted when stream is capturing")

    speaker = engine(sequence_len=64)
    plain = speaker.complete(prompts(5, 12), max_new_tokens=20)
    speaker.record = refuse
    with pytest.warns(UserWarning, match="cannot be recorded here .*capturing.*slower") as told:
        assert speaker.complete(prompts(5, 12), max_new_tokens=20) == plain
    assert len(told) == 1


def test_nothing_to_say_is_nothing_said():
    assert engine().complete([], max_new_tokens=4) == []


# ---------------------------------------------------------------------------- the tool

TOKENIZER = Tokenizer.train(["no merges"], 256 + len(SPECIAL_TOKENS))
(BOS, _, _, _, END, PYTHON, PYTHON_END, OUTPUT, OUTPUT_END) = map(TOKENIZER.special, SPECIAL_TOKENS)


def reverse(source: str) -> str:
    """A tool whose every result differs, and some are empty."""
    return source[:0:-1]


def tool_engine(seed: int, sequence_len: int = 96, tool=reverse) -> Engine:
    """Its random model often opens and closes python parts, and sometimes ends its answer."""
    model = GPT.build(tiny(sequence_len=sequence_len), TOKENIZER.vocab_size, CPU, seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw) * weight.shape[-1] ** -0.5)
        model.head.weight[[PYTHON, PYTHON_END, END]] *= 3
        model.head.weight[[OUTPUT, OUTPUT_END]] *= 0.1
    return Engine(model, TOKENIZER, Runtime(device=CPU, dtype=torch.float32), tool)


def plain_with_tool(engine: Engine, prompt: list[int], limit: int) -> list[Token]:
    """No cache, no batch, no state: after each token, look back for a python part."""
    ids, row, waiting = list(prompt), [], []
    while len(row) < limit and len(ids) < engine.context:
        with torch.no_grad():
            best = int(engine.model(torch.tensor([ids]))[0, -1].argmax())
        kind = "forced" if waiting else "end" if best in engine.ends else "chosen"
        row.append(Token(0, waiting.pop(0) if waiting else best, kind))
        ids.append(row[-1].id)
        if kind == "end":
            break
        said = ids[len(prompt) :]
        marks = [i for i, id in enumerate(said) if id in (PYTHON, PYTHON_END)]
        if said[-1] == PYTHON_END and [said[i] for i in marks[-2:]] == [PYTHON, PYTHON_END]:
            result = reverse(TOKENIZER.decode(said[marks[-2] + 1 : -1]))
            waiting = [OUTPUT, *TOKENIZER.encode(result)[:OUTPUT_TOKENS], OUTPUT_END]
    return row


def test_a_batch_with_tools_equals_the_plain_loop():
    speaker = tool_engine(seed=4)
    asked = [random_ids(1, n, seed=n)[0].tolist() for n in (1, 9, 4, 17, 5, 6, 30, 11)]
    want = [plain_with_tool(speaker, prompt, limit=60) for prompt in asked]
    assert sum(token.kind == "forced" for row in want for token in row) > 30
    assert len({len(row) for row in want}) > 2, "the rows should end at different times"
    rows = collections.defaultdict(list)
    for step in speaker.generate(asked, max_new_tokens=60):
        for token in step:
            rows[token.row].append(token._replace(row=0))
    assert [rows[row] for row in range(8)] == want
    speaker.max_rows, speaker.chunk = 3, 7
    answers = speaker.answers(asked, max_new_tokens=60)
    for answer, row in zip(answers, want, strict=True):
        assert answer.ids == [token.id for token in row if token.kind != "end"]
        assert answer.chosen == [token.kind == "chosen" for token in row if token.kind != "end"]
        assert answer.end == (row[-1].id if row[-1].kind == "end" else None)


def test_seed_decides_a_row_with_tools_too():
    speaker = tool_engine(seed=5)
    asked = [random_ids(1, n, seed=n)[0].tolist() for n in (1, 9, 4)]
    settings = {"max_new_tokens": 60, "temperature": 1.0, "samples": 3}
    together = speaker.answers(asked, seeds=[7, 8, 9], **settings)
    assert sum(not chosen for answer in together for chosen in answer.chosen) > 10
    for p, prompt in enumerate(asked):
        alone = speaker.answers([prompt], seeds=[7 + p], **settings)
        assert alone == together[3 * p : 3 * p + 3]


class Chain:
    """A model that follows each token by the one its table says."""

    def __init__(self, *chains: str | list[int | str]):
        self.config, self.table = tiny(sequence_len=400), {}
        for links in chains:
            ids = [ord(item) if isinstance(item, str) else item for item in links]
            self.table |= dict(itertools.pairwise(ids))

    def hidden(self, ids_BT, cache=None):
        return ids_BT[..., None].float()

    def logits(self, hidden):
        following = hidden[..., 0].long().apply_(lambda id: self.table.get(id, END))
        return torch.nn.functional.one_hot(following, TOKENIZER.vocab_size).float()

    def __call__(self, ids_BT, cache=None):
        return self.logits(self.hidden(ids_BT))


def scripted(*chains, prompts="a", tool=None, **settings):
    """Answers of a chain to prompts of one letter each."""
    speaker = Engine(Chain(*chains), TOKENIZER, Runtime(device=CPU, dtype=torch.float32), tool)
    asked = [TOKENIZER.encode(prompt) for prompt in prompts]
    return speaker.answers(asked, **{"max_new_tokens": 80, **settings})


def test_the_result_is_forced_while_other_rows_go_on():
    calls = []

    def tool(source):
        calls.append(source)
        return "84 <|bos|>é"  # a special token that a tool prints is ordinary text

    sums = ["a", PYTHON, *"12*7", PYTHON_END], [OUTPUT_END, "b", END]
    first, second, third = scripted(*sums, [*"cdefghijklmn", END], prompts="acb", tool=tool)
    forced = [OUTPUT, *TOKENIZER.encode("84 <|bos|>é"), OUTPUT_END]
    assert BOS not in forced
    assert calls == ["12*7"]
    assert first.ids == [PYTHON, *b"12*7", PYTHON_END, *forced, ord("b")]
    assert [id for id, chosen in zip(first.ids, first.chosen, strict=True) if not chosen] == forced
    assert first.end == END
    assert second.ids == list(b"defghijklmn") and all(second.chosen)
    assert third.ids == [] and third.end == END


def test_a_program_that_runs_holds_no_other_row_up():
    others_ended = threading.Event()
    chain = ["a", PYTHON, "1", PYTHON_END], [*"cdefghijklmn", END], [OUTPUT_END, "b", END]
    runtime = Runtime(device=CPU, dtype=torch.float32)
    speaker = Engine(Chain(*chain), TOKENIZER, runtime, lambda _: str(others_ended.wait(PATIENCE)))
    slow, quick = speaker.submit([[ord("a")], [ord("c")]], max_new_tokens=80)
    while quick.left:
        speaker.step()
    assert slow.tokens[-1] == (PYTHON_END, "chosen")
    speaker.cancel(*speaker.submit([[ord("c")]], max_new_tokens=80))
    speaker.step()  # the row that waits for its program is the only one
    others_ended.set()
    while slow.left:
        speaker.step()
    said = [PYTHON, ord("1"), PYTHON_END, OUTPUT, *b"True", OUTPUT_END, ord("b")]
    assert slow.answer().ids == said and quick.answer().ids == list(b"defghijklmn")


@pytest.mark.parametrize("seed", range(3))
def test_how_long_a_program_takes_changes_no_row(seed):
    draw, speaker = random.Random(seed), tool_engine(seed=4)

    def slowly(source: str) -> str:
        time.sleep(draw.choice([0, 0.002, 0.01]))
        return reverse(source)

    asked = [random_ids(1, n, seed=n)[0].tolist() for n in (1, 9, 4, 17, 5, 6, 30, 11)]
    settings = {"max_new_tokens": 60, "temperature": 1.0, "samples": 2}
    want = speaker.answers(asked, **settings)
    speaker.tool, speaker.max_rows = slowly, draw.choice([1, 5, 16])
    assert speaker.answers(asked, **settings) == want
    assert sum(not chosen for answer in want for chosen in answer.chosen) > 30


def test_a_real_sandbox_answers_and_its_errors_are_text():
    with Sandbox(workers=1) as sandbox:
        for program, result in (("12*7", "84"), ("1/0", "ZeroDivisionError: division by zero")):
            chain = [["a", PYTHON, *program, PYTHON_END], [OUTPUT_END, END]]
            (answer,) = scripted(*chain, tool=lambda source: sandbox.run(source).text)
            said = [PYTHON, *program.encode(), PYTHON_END, OUTPUT, *result.encode(), OUTPUT_END]
            assert answer.ids == said


def test_without_a_tool_nothing_is_forced():
    (answer,) = scripted(["a", PYTHON, "1", PYTHON_END, OUTPUT, "2", OUTPUT_END, "b", END])
    assert answer.ids == [PYTHON, ord("1"), PYTHON_END, OUTPUT, ord("2"), OUTPUT_END, ord("b")]
    assert all(answer.chosen)


@pytest.mark.parametrize(
    ("chain", "ids", "end"),
    [
        (["a", PYTHON, "1", END], [PYTHON, ord("1")], END),  # the end inside a python part
        (["a", PYTHON_END, "b", END], [PYTHON_END, ord("b")], END),  # nothing was opened
        (["a", OUTPUT, "4", END], [], OUTPUT),  # an output of its own making
        (["a", "b", OUTPUT_END, END], [ord("b")], OUTPUT_END),
    ],
)
def test_what_is_no_call_runs_nothing(chain, ids, end):
    def tool(source):
        raise AssertionError(f"ran {source!r}")

    (answer,) = scripted(chain, tool=tool)
    assert (answer.ids, answer.end) == (ids, end)


def test_calls_have_a_limit_that_the_model_is_told():
    chain = [["a", PYTHON, "1", PYTHON_END], [OUTPUT_END, PYTHON]]
    calls = []
    (answer,) = scripted(*chain, tool=lambda s: calls.append(s) or "", max_new_tokens=390)
    assert calls == ["1"] * TOOL_CALLS
    assert f"RuntimeError: no more than {TOOL_CALLS} programs" in TOKENIZER.decode(answer.ids)
    assert len(answer.ids) == 390 and answer.end is None


def test_a_long_result_is_cut_and_limits_hold_inside_it():
    chain = [["a", PYTHON, "1", PYTHON_END], [OUTPUT_END, "b", END]]
    (answer,) = scripted(*chain, tool=lambda source: "x" * 1000, max_new_tokens=300)
    assert answer.ids[3:] == [OUTPUT, *b"x" * OUTPUT_TOKENS, OUTPUT_END, ord("b")]
    (answer,) = scripted(*chain, tool=lambda source: "x" * 1000, max_new_tokens=10)
    assert answer.ids[3:] == [OUTPUT, *b"x" * 6] and answer.end is None
    (answer,) = scripted(*chain, tool=lambda source: 1 / 0, max_new_tokens=3)
    assert answer.ids == [PYTHON, ord("1"), PYTHON_END]  # no room for its result: not run


def test_a_tool_that_fails_is_heard():
    with pytest.raises(ZeroDivisionError):
        scripted(["a", PYTHON, "1", PYTHON_END], tool=lambda source: 1 / 0)
