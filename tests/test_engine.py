"""Generation against the plain loop: run the whole row again for every token."""

from __future__ import annotations

import collections
import itertools

import pytest
import torch
from test_model import CPU, VOCAB, random_ids, random_model, tiny
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from nanolib.engine import (
    END_NAMES,
    OUTPUT_TOKENS,
    TOOL_CALLS,
    Engine,
    Token,
    choose,
    end_tokens,
    inverse_cdf,
    probabilities,
    record_graph,
)
from nanolib.model import GPT
from nanolib.runtime import Runtime
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
    assert choose(logits, [], 0.0).equal(logits.argmax(-1))
    assert choose(logits, [0.1, 0.3, 0.5, 0.7, 0.9], 1.0, top_k=1).equal(logits.argmax(-1))


# ---------------------------------------------------------------------------- rows


@pytest.mark.parametrize(("kv_heads", "reach"), [(None, 64), (3, 8)])
def test_greedy_batch_equals_plain_loop(kv_heads, reach, monkeypatch):
    """Rows of different length that end at different times, some at the limit."""
    monkeypatch.setattr("nanolib.model.REACH", reach)
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
        ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
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


def traced(work):
    """In a CUDA graph's place: what the host knew is frozen, and each result overwrites the last."""
    program = make_fx(work)()
    result = program()

    def replay() -> torch.Tensor:
        return result.copy_(program())

    return replay


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_recorded_steps_say_the_same(device, monkeypatch):
    """Over four reaches, with rows that end, rows taken along and weights that change between."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.setattr("nanolib.model.REACH", 16)
    speaker, recorded = engine(sequence_len=64), []
    record = record_graph if device == "cuda" else traced
    speaker.model.to(device)
    speaker.runtime = Runtime(device=torch.device(device), dtype=torch.float32)
    settings = {"samples": 3, "max_new_tokens": 50, "temperature": 1.0}
    for _ in range(2):
        speaker.record = None
        plain = speaker.complete(prompts(5, 12, 3, 8), **settings)
        speaker.record = lambda work: recorded.append(record(work)) or recorded[-1]
        assert speaker.complete(prompts(5, 12, 3, 8), **settings) == plain
        assert max(map(len, plain)) > 30
        with torch.no_grad():
            speaker.model.blocks[0].mlp.up.weight.neg_()
    assert 8 <= len(recorded) <= 24, "each reach once in each cache"


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


def test_end_tokens_begin_with_the_assistants():
    assert end_tokens(Specials())[0] == Specials().special("<|assistant_end|>")


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
    answers = speaker.answers(asked, max_new_tokens=60, max_rows=3)
    for answer, row in zip(answers, want, strict=True):
        assert answer.ids == [token.id for token in row if token.kind != "end"]
        assert answer.chosen == [token.kind == "chosen" for token in row if token.kind != "end"]
        assert answer.end == (row[-1].id if row[-1].kind == "end" else None)


def test_seed_decides_a_row_with_tools_too():
    speaker = tool_engine(seed=1)
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
        for chain in chains:
            ids = [ord(item) if isinstance(item, str) else item for item in chain]
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
