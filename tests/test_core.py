"""CORE against the plain way: one text at a time, no padding, no cache; and against lm-eval."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared import as_ranks
from torch.testing import assert_close

from nanolib import export
from nanolib.config import ModelConfig
from nanolib.data import toyworld
from nanolib.engine import Engine
from nanolib.evals import core
from nanolib.evals.core import CoreTask, Prompt
from nanolib.tokenizer import Tokenizer

TEXT = (
    "The red hat is Mira's favourite. The blue boat sank. Question: Which colour?\nAnswer: red\n\n"
    "the cat sat, the cat ran; op 17 = 34\n"
)
TOKENIZER = Tokenizer.train([TEXT] * 3, 310)
CONFIG = ModelConfig(depth=2, aspect=16, head_dim=16, kv_heads=1, sequence_len=512)
WORDS = ("red", "blue", "hat", "boat", "cat", "favourite", "Mira", "the")


def make(kind: str, rows: list[dict], shots: int = 0, **about) -> CoreTask:
    settings = {"label": f"made_{kind}", "delimiter": " ", "chance": 0.25} | about
    questions = [core.question(kind, row) for row in rows]
    return CoreTask(kind=kind, questions=questions, shots=shots, **settings)


MADE = [
    make(
        "multiple_choice",
        [
            {
                "query": f"Question: {a} {b}?",
                "choices": [f"{c} {b}", a, "the red hat"],
                "gold": i % 3,
            }
            for i, (a, b, c) in enumerate(zip(WORDS, WORDS[1:], WORDS[2:], strict=False))
        ],
        shots=3,
        delimiter="\nAnswer: ",
    ),
    make(
        "schema",
        [
            {
                "context_options": [f"The {a} and {b}", f"The {b}"],
                "continuation": "sat, the",
                "gold": 1,
            }
            for a, b in itertools.pairwise(WORDS)
        ],
        shots=2,
    ),
    make(
        "language_modeling",
        [{"context": f" The {a} \n", "continuation": "red"} for a in WORDS],
        shots=1,
    ),
]


@pytest.fixture(scope="module")
def toy_tasks(tmp_path_factory) -> list[CoreTask]:
    mirror = toyworld.write(tmp_path_factory.mktemp("toy") / "mirror", 3, shards=1, rows=10)
    return core.load(mirror / "eval_bundle.zip")


@pytest.fixture
def model(random_model):
    model = random_model(CONFIG, TOKENIZER.vocab_size)
    with torch.no_grad():  # after about half of all contexts this model says "red"
        model.head.weight[TOKENIZER.encode(" red")[0]] *= 100
    return model


# ---------------------------------------------------------------------------- the plain way


def plain_texts(task: CoreTask, index: int) -> list[str]:
    """The texts of a question, one by one; the last one of language modelling is bare."""
    shown, between = "", task.delimiter
    for i in core.examples(task, index):
        context, continuation = task.questions[i].options[task.questions[i].gold]
        shown += f"{context}{between}{continuation}\n\n"
    options = task.questions[index].options
    texts = [f"{shown}{context}{between}{continuation}" for context, continuation in options]
    if task.kind == "language_modeling":
        texts.append(f"{shown}{options[0][0]}{between}".strip())
    return texts


def plain_logprobs(model, ids: list[int], start: int) -> list[float]:
    """Of ids[start:], each after all before it."""
    with torch.no_grad():
        logprobs = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    return [float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids))]


def plain_is_right(model, task: CoreTask, index: int) -> bool:
    rows = [[TOKENIZER.bos, *TOKENIZER.encode(text)] for text in plain_texts(task, index)]
    if task.kind == "language_modeling":
        ids, bare = rows
        assert ids[: len(bare)] == bare
        said = list(bare)
        with torch.no_grad():
            while len(said) < len(ids):
                said.append(int(model(torch.tensor([said]))[0, -1].argmax()))
        return said == ids
    if task.kind == "schema":
        same = next(n for n in range(99) if rows[0][-1 - n] != rows[1][-1 - n])
        starts = [len(ids) - same for ids in rows]
    else:
        starts = [next(n for n in range(999) if len({row[n] for row in rows}) > 1)] * len(rows)
    means = []
    for ids, start in zip(rows, starts, strict=True):
        logprobs = plain_logprobs(model, ids, start)
        means.append(sum(logprobs) / len(logprobs))
    return means.index(max(means)) == task.questions[index].gold


@pytest.mark.parametrize("task", MADE, ids=lambda task: task.kind)
def test_scores_like_one_text_at_a_time(task, model, cpu):
    right = [plain_is_right(model, task, item) for item in range(len(task.questions))]
    assert 0 < sum(right) < len(right)
    scores = core.evaluate(Engine(model, TOKENIZER, cpu), task)
    assert scores["accuracy"] == sum(right) / len(right)
    assert scores["right"] == {"accuracy": "".join("01"[one] for one in right)}
    assert scores["questions"] == len(right)
    assert scores["cut"] == 0


def test_without_the_question_its_examples_and_choices_are_left(model, cpu):
    """Only multiple choice has something left to choose by."""
    task = MADE[0]
    right = []
    for i, (options, gold) in enumerate(task.questions):
        questions = list(task.questions)
        questions[i] = core.Question([("", end) for _, end in options], gold)
        right.append(plain_is_right(model, dataclasses.replace(task, questions=questions), i))
    scores = [core.evaluate(Engine(model, TOKENIZER, cpu), made) for made in MADE]
    assert scores[0]["accuracy without the question"] == sum(right) / len(right)
    assert 0 < sum(right) < len(right)
    assert scores[0]["accuracy"] != scores[0]["accuracy without the question"]
    assert not any("without" in name for other in scores[1:] for name in other)


def test_the_toy_bundle_like_one_text_at_a_time(toy_tasks, model, cpu):
    assert {task.kind for task in toy_tasks} == set(ROWS)
    for task in toy_tasks:
        few = dataclasses.replace(task, questions=task.questions[:16])
        right = sum(plain_is_right(model, few, item) for item in range(16))
        assert core.evaluate(Engine(model, TOKENIZER, cpu), few)["accuracy"] == right / 16
        assert 0.2 <= task.chance <= 0.5 or task.kind == "language_modeling"


# ---------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("task", MADE, ids=lambda task: task.kind)
def test_a_prompt_is_its_text_with_bos_in_front(task):
    for item in range(len(task.questions)):
        texts = plain_texts(task, item)[: len(task.questions[item].options)]
        whole = [
            p.context + ids for p in core.prompts(task, item, TOKENIZER) for ids in p.continuations
        ]
        assert [ids[0] for ids in whole] == [TOKENIZER.bos] * len(texts)
        assert [TOKENIZER.decode(ids[1:]) for ids in whole] == texts


def test_what_is_scored_is_what_the_kind_says():
    choices, schema, modelling = (core.prompts(task, 0, TOKENIZER) for task in MADE)
    assert [len(prompt.continuations) for prompt in choices] == [3]
    assert TOKENIZER.decode(choices[0].context).endswith("red blue?\nAnswer:")
    assert [TOKENIZER.decode(ids) for ids in choices[0].continuations] == [
        " hat blue",
        " red",
        " the red hat",
    ]
    said = [TOKENIZER.decode(prompt.continuations[0]) for prompt in schema]
    assert said == [" blue sat, the"] * 2  # both options end alike: scored with the continuation
    assert [TOKENIZER.decode(ids) for ids in modelling[0].continuations] == [" red"]


def test_a_space_of_its_own_belongs_to_the_continuation():
    """Digits do not join the delimiter's space: it is left off the bare context, and scored."""
    row = {"context": "op 17 =", "continuation": "34"}
    prompt = core.prompts(make("language_modeling", [row]), 0, TOKENIZER)[0]
    assert prompt.context == [TOKENIZER.bos, *TOKENIZER.encode("op 17 =")]
    assert prompt.continuations == [TOKENIZER.encode(" 34")]
    assert TOKENIZER.decode(prompt.continuations[0][:1]) == " "


def test_choices_that_overlap_keep_something_to_score(model, cpu):
    rows = [
        {"query": "The", "choices": ["hat", "hat boat"], "gold": 0},  # one begins with the other
        {"query": "The", "choices": ["hat", "hat"], "gold": 0},
        {"query": "The", "choices": ["the hat", "the boat"], "gold": 0},  # they begin alike
    ]
    task = make("multiple_choice", rows)
    hat, boat, the = (TOKENIZER.encode(f" {word}") for word in ("hat", "boat", "the"))
    found = [core.prompts(task, item, TOKENIZER)[0] for item in range(3)]
    assert [prompt.continuations for prompt in found] == [
        [hat[-1:], hat[-1:] + boat],
        [hat[-1:], hat[-1:]],
        [hat, boat],
    ]
    assert found[2].context[-len(the) :] == the
    assert core.evaluate(Engine(model, TOKENIZER, cpu), task)["questions"] == 3
    same = make("schema", [{"context_options": ["A", "A"], "continuation": "hat", "gold": 0}])
    assert [p.context for p in core.prompts(same, 0, TOKENIZER)] == [[TOKENIZER.bos]] * 2


def test_a_continuation_that_joins_the_contexts_last_token():
    """Where the delimiter is empty a token may straddle the seam: it is then scored whole."""
    row = {"context": "The ca", "continuation": "t"}
    prompt = core.prompts(make("language_modeling", [row], delimiter=""), 0, TOKENIZER)[0]
    assert [TOKENIZER.encode(" cat")] == prompt.continuations
    assert prompt.context == [TOKENIZER.bos, *TOKENIZER.encode("The")]


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=2, max_size=4))
def test_common_prefix(rows):
    def naive(rows):
        return max(
            n
            for n in range(7)
            if all(row[:n] == rows[0][:n] for row in rows) and n <= min(map(len, rows))
        )

    assert core.common_prefix(rows) == naive(rows)


# ---------------------------------------------------------------------------- solved examples


def naive_examples(count: int, index: int, shots: int) -> list[int]:
    """nanochat's draw, written down again: a generator for each question, over all the others."""
    rng, others = random.Random(1234 + index), list(range(count))
    others.remove(index)
    return rng.sample(others, shots)


EXAMPLES_OF_TEN = [[8, 2, 1], [7, 8, 4], [8, 5, 4]]  # before questions 0, 1 and 9
ORDER_OF_TEN = [0, 3, 7, 2, 1, 6, 4, 5, 8, 9]


def numbered(count: int, shots: int = 0) -> CoreTask:
    rows = [{"context": f"The {i}", "continuation": "red"} for i in range(count)]
    return make("language_modeling", rows, shots)


@pytest.mark.parametrize(
    ("count", "shots", "shown"), [(20, 3, 3), (4, 10, 3), (1, 10, 0), (5, 0, 0)]
)
def test_examples_are_nanochats(count, shots, shown):
    task = numbered(count, shots)
    for index in range(count):
        assert core.examples(task, index) == naive_examples(count, index, shown)


def test_examples_are_those_that_pythons_generator_gives():
    """Followed by hand, getrandbits by getrandbits: a changed seed or order shows."""
    task = numbered(10, 3)
    assert [core.examples(task, index) for index in (0, 1, 9)] == EXAMPLES_OF_TEN


def test_rows_are_shuffled_then_limited_and_examples_come_from_those_kept(model, cpu, monkeypatch):
    task = numbered(60, 2)
    order = list(range(60))
    random.Random(1337).shuffle(order)
    assert task.shuffled().questions == [task.questions[i] for i in order]
    few = task.shuffled(10)
    assert few.questions == [task.questions[i] for i in order[:10]]
    asked, plain = [], core.examples
    monkeypatch.setattr(core, "examples", lambda *of: asked.append(plain(*of)) or asked[-1])
    assert core.evaluate(Engine(model, TOKENIZER, cpu), few)["questions"] == 10
    assert asked == [naive_examples(10, index, 2) for index in range(10)]
    assert task.shuffled(100).questions == task.shuffled().questions


def test_the_order_is_that_of_pythons_generator():
    contexts = [question.options[0][0] for question in numbered(10).shuffled().questions]
    assert contexts == [f"The {i}" for i in ORDER_OF_TEN]


# ---------------------------------------------------------------------------- scoring


def random_prompts(count: int, seed: int = 0) -> list[Prompt]:
    draw = torch.Generator().manual_seed(seed)

    def ids(fewest: int, most: int) -> list[int]:
        length = int(torch.randint(fewest, most, (1,), generator=draw))
        return torch.randint(0, 256, (length,), generator=draw).tolist()

    return [
        Prompt([TOKENIZER.bos, *ids(0, 30)], [ids(1, 9) for _ in range(1 + i % 4)])
        for i in range(count)
    ]


@pytest.mark.parametrize("tokens_at_once", [1, 200, 100_000])
def test_logprobs_and_greed_like_one_forward_pass_each(model, cpu, tokens_at_once):
    asked = random_prompts(12)
    for prompt in asked[::2]:  # and some that the model would write itself
        written = list(prompt.context)
        for _ in range(4):
            written.append(int(model(torch.tensor([written]))[0, -1].argmax()))
        prompt.continuations.append(written[-4:])
        prompt.continuations.append([*written[-4:-1], 7])
    scores = core.score(model, asked, cpu, tokens_at_once)
    greedy = []
    for prompt, found in zip(asked, scores, strict=True):
        for ids, got in zip(prompt.continuations, found, strict=True):
            logprobs = plain_logprobs(model, prompt.context + ids, len(prompt.context))
            best = [
                int(model(torch.tensor([prompt.context + ids[:n]]))[0, -1].argmax())
                for n in range(len(ids))
            ]
            assert_close(got.logprob, sum(logprobs), rtol=1e-5, atol=1e-4)
            assert got.tokens == len(ids)
            assert got.greedy == (best == ids)
            greedy.append(got.greedy)
    assert 6 <= sum(greedy) < len(greedy)
    assert core.score(model, [], cpu) == []


def test_one_context_is_read_once(model, cpu, monkeypatch):
    read = []
    plain = model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda ids, **how: (read.append(ids.numel()), plain(ids, **how))[1]
    )
    context = [TOKENIZER.bos, *range(100)]
    core.score(model, [Prompt(context, [[1], [2], [3], [4]])], cpu)
    assert sum(read) == 100 + 4


def test_too_long_a_prompt_loses_its_beginning(model, cpu):
    """And never a part of what is scored after it."""
    long = Prompt([TOKENIZER.bos, *range(10, 40)], [[1, 2, 3], [4]])
    assert long.cut_to(33) is long  # 31 + 3 - 1 inputs
    cut = long.cut_to(32)
    assert cut == Prompt([TOKENIZER.bos, *range(11, 40)], [[1, 2, 3], [4]])
    assert long.cut_to(5) == Prompt([TOKENIZER.bos, 38, 39], [[1, 2, 3], [4]])
    turned = Prompt(long.context, long.continuations[::-1])  # the longest is not the first
    assert turned.cut_to(5) == Prompt([TOKENIZER.bos, 38, 39], [[4], [1, 2, 3]])
    framed = dataclasses.replace(long, head=2, tail=3)
    assert framed.cut_to(8).context == [TOKENIZER.bos, 10, 36, 37, 38, 39]
    assert [n for n in range(1, 9) if long.cut_to(n)] == list(range(3, 9))
    assert [n for n in range(1, 12) if framed.cut_to(n)] == list(range(7, 12))
    short_model = type(model)(dataclasses.replace(CONFIG, sequence_len=20), model.vocab_size)
    short_model.load_state_dict(model.state_dict())
    for task in MADE:
        asked = core.prompts(task, 1, TOKENIZER)
        for prompt in (p.cut_to(20) for p in asked):
            for ids in prompt.continuations:
                assert len(prompt.context + ids) <= 21
                assert prompt.context[0] == TOKENIZER.bos
        few = dataclasses.replace(task, shots=7)
        assert core.evaluate(Engine(short_model, TOKENIZER, cpu), few)["cut"] == len(task.questions)
        assert core.evaluate(Engine(model, TOKENIZER, cpu), few)["cut"] == 0


def test_an_option_that_cannot_fit_is_wrong_and_counted(model, cpu):
    rows = [{"query": "The", "choices": ["red", "boat hat " * 12], "gold": gold} for gold in (0, 1)]
    short_model = type(model)(dataclasses.replace(CONFIG, sequence_len=20), model.vocab_size)
    short_model.load_state_dict(model.state_dict())
    task = make("multiple_choice", [*rows, {"query": "The", "choices": ["red"], "gold": 0}])
    scores = core.evaluate(Engine(short_model, TOKENIZER, cpu), task)
    assert (scores["accuracy"], scores["too long"], scores["cut"]) == (1 / 3, 2, 0)
    assert "too long" not in core.evaluate(Engine(model, TOKENIZER, cpu), task)


# ---------------------------------------------------------------------------- the score


def test_centred_and_the_mean():
    assert core.centred(0.25, 0.25) == 0
    assert core.centred(1.0, 0.62) == pytest.approx(1)
    assert core.centred(0.0, 0.5) == -1
    assert core.core({"a": {"centred": 0.5}, "b": {"centred": -0.1}}) == pytest.approx(0.2)


def test_a_result_is_centred_by_its_tasks_chance(model, cpu):
    scores = core.evaluate(Engine(model, TOKENIZER, cpu), dataclasses.replace(MADE[0], chance=0.4))
    assert scores["centred"] == pytest.approx((scores["accuracy"] - 0.4) / 0.6)
    assert (scores["chance"], scores["shots"]) == (0.4, 3)


def test_ranks_share_the_questions(model, cpu):
    for task in MADE:
        whole = core.evaluate(Engine(model, TOKENIZER, cpu), task)
        results, parts = as_ranks(
            cpu, 3, lambda part, task=task: core.evaluate(Engine(model, TOKENIZER, part), task)
        )
        assert results == [whole] * 3
        right = [sum(right for (right, _), *_ in part) for part in parts]
        assert 0 < max(right) < sum(right) == round(len(task.questions) * whole["accuracy"])


def test_more_ranks_than_questions(model, cpu):
    few = MADE[0].shuffled(2)
    results, parts = as_ranks(
        cpu, 4, lambda part: core.evaluate(Engine(model, TOKENIZER, part), few)
    )
    assert results == [core.evaluate(Engine(model, TOKENIZER, cpu), few)] * 4
    assert [len(part) for part in parts] == [1, 1, 0, 0]


def test_rounds_change_nothing_and_can_be_stopped_between(model, cpu, monkeypatch):
    whole = core.evaluate(Engine(model, TOKENIZER, cpu), MADE[0])
    monkeypatch.setattr(core, "QUESTIONS_AT_ONCE", 2)
    told = []
    assert (
        core.evaluate(Engine(model, TOKENIZER, cpu), MADE[0], progress=lambda *at: told.append(at))
        == whole
    )
    assert told == [(0, 6), (2, 6), (4, 6)]

    def stop(done, total):
        if done == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        core.evaluate(Engine(model, TOKENIZER, cpu), MADE[0], progress=stop)


# ---------------------------------------------------------------------------- the bundle

ROWS = {
    "multiple_choice": {"query": "The", "choices": ["hat", "boat"], "gold": 1, "category": "x"},
    "schema": {"context_options": ["The cat", "The hat"], "continuation": "sat", "gold": 0},
    "language_modeling": {"context": "The", "continuation": "hat"},
}
YAML = """icl_tasks:
- label: first
  dataset_uri: folder/first.jsonl
  num_fewshot: [10]
  icl_task_type: multiple_choice
  continuation_delimiter: "\\nAnswer: "
- label: second
  dataset_uri: folder/second.jsonl
  num_fewshot:
  - 0
  icl_task_type: language_modeling
  has_categories: true
"""
TABLE = "Eval Task,Task Category,#shots,Random baseline\nsecond,a,0,0.0\nfirst,b,10,62\nthird,c,,\n"


def write_bundle(path, root="eval_bundle/", **changes):
    files = {
        "core.yaml": YAML,
        "eval_meta_data.csv": TABLE.replace("third,c,,\n", ""),
        "first": json.dumps(ROWS["multiple_choice"]) + "\n\n",
        "second": json.dumps(ROWS["language_modeling"]) * 1,
    } | changes
    with zipfile.ZipFile(path, "w") as bundle:
        for name, text in files.items():
            where = name if "." in name else f"eval_data/folder/{name}.jsonl"
            if text is not None:
                bundle.writestr(root + where, text)
    return path


@pytest.mark.parametrize("root", ["", "eval_bundle/", "a/b/"])
def test_a_bundle_is_read_as_it_says(tmp_path, root):
    first, second = core.load(write_bundle(tmp_path / "b.zip", root))
    assert (first.label, first.kind, first.shots, first.chance) == (
        "first",
        "multiple_choice",
        10,
        0.62,
    )
    assert (first.delimiter, second.delimiter) == ("\nAnswer: ", " ")
    assert (second.kind, second.shots, second.chance) == ("language_modeling", 0, 0)
    assert first.questions == [([("The", "hat"), ("The", "boat")], 1)]
    assert second.questions == [([("The", "hat")], 0)]


def test_a_row_offers_what_its_kind_says():
    row = ROWS["schema"]
    assert core.question("schema", row) == ([("The cat", "sat"), ("The hat", "sat")], 0)
    row = {"context": " The \n", "continuation": " hat"}
    assert core.question("language_modeling", row) == ([("The", " hat")], 0)


def change(kind: str, **values) -> str:
    row = {k: v for k, v in (ROWS[kind] | values).items() if v is not None}
    return json.dumps(ROWS[kind]) + "\n" + json.dumps(row)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"core.yaml": None}, "no item named '.*core.yaml'"),
        ({"core.yaml": "icl_tasks: ["}, "ParserError: while parsing"),
        ({"core.yaml": "tasks: []"}, "KeyError: 'icl_tasks'"),
        ({"core.yaml": YAML.replace("num_fewshot: [10]", "")}, "KeyError: 'num_fewshot'"),
        (
            {"core.yaml": YAML.replace("language_modeling", "poetry")},
            "second.jsonl, row 1: a row of a poetry",
        ),
        ({"eval_meta_data.csv": None}, "no item named '.*eval_meta_data.csv'"),
        ({"eval_meta_data.csv": TABLE}, "could not convert string to float: ''"),
        ({"eval_meta_data.csv": "Task,Chance\nfirst,3\n"}, "KeyError: 'Eval Task'"),
        ({"eval_meta_data.csv": "Eval Task,Random baseline\nsecond,0\n"}, "give first .* got None"),
        ({"eval_meta_data.csv": TABLE.replace("62", "100").replace("third,c,,\n", "")}, "got 1.0"),
        ({"first": None}, "no item named '.*eval_data/folder/first.jsonl'"),
        ({"first": "\n"}, "first.jsonl has no rows"),
        ({"first": '{"query": "The'}, "first.jsonl, row 1: Unterminated string"),
        ({"first": "[]"}, "row 1: a row of a multiple_choice task .*got \\[\\]"),
        ({"first": change("multiple_choice", query=None)}, "row 2: a row of .*got {'choices'"),
        ({"first": change("multiple_choice", choices=3)}, "row 2: a row of .*'choices': 3"),
        (
            {"first": change("multiple_choice", choices=["hat", 3])},
            "row 2: a row of .*'hat', 3",
        ),
        ({"first": change("multiple_choice", gold="1")}, "row 2: .* a gold among .*'gold': '1'"),
        ({"first": change("multiple_choice", gold=2)}, "row 2: .*'gold': 2"),
        ({"first": change("multiple_choice", gold=-1)}, "row 2: .*'gold': -1"),
        (
            {"second": change("language_modeling", continuation=" ")},
            "row 2: .* something to score .*'continuation': ' '",
        ),
        ({"second": b"\xff\xfe"}, "can't decode byte"),
    ],
)
def test_a_malformed_bundle_is_named(tmp_path, changes, message):
    path = write_bundle(tmp_path / "b.zip", **changes)
    with pytest.raises(ValueError, match=rf"b.zip is no evaluation bundle of CORE \(.*{message}"):
        core.load(path)


def test_a_file_that_is_no_bundle_or_cut_short(tmp_path):
    whole = write_bundle(tmp_path / "b.zip").read_bytes()
    for name, content in (("empty", b""), ("text", b"hello"), ("half", whole[: len(whole) // 2])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is no evaluation bundle .*copy it again"):
            core.load(tmp_path / name)
    with pytest.raises(ValueError, match=r"missing.zip is no .*No such file.*core_problems = 0"):
        core.load(tmp_path / "missing.zip")


# ---------------------------------------------------------------------------- the referee


def test_loglikelihoods_equal_lm_evals(toy_tasks, model, cpu, tmp_path):
    """lm-eval's HFLM splits, truncates, batches and scores the exported model in its own way."""
    pytest.importorskip("lm_eval", reason="the referee lm-eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export.write(model, TOKENIZER, tmp_path / "model")
    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(tmp_path / "model"),
        batch_size=8,
    )
    greedy, as_text = [], 0
    for task in [*MADE, *toy_tasks]:
        few = dataclasses.replace(task, questions=task.questions[:8])
        asked = [
            p for item in range(len(few.questions)) for p in core.prompts(few, item, TOKENIZER)
        ]
        ours = [score for found in core.score(model, asked, cpu) for score in found]
        pairs = [(p.context, ids) for p in asked for ids in p.continuations]
        found = theirs._loglikelihood_tokens([(("", ""), *p) for p in pairs], disable_tqdm=True)
        assert_close([s.logprob for s in ours], [f[0] for f in found], rtol=1e-5, atol=1e-4)
        assert [s.greedy for s in ours] == [bool(f[1]) for f in found]
        # As text too, but where all choices share a space of its own: lm-eval would score it.
        texts = [(TOKENIZER.decode(context), TOKENIZER.decode(ids)) for context, ids in pairs]
        same = [n for n, (context, _) in enumerate(texts) if not context.endswith(" ")]
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=texts[n], idx=n) for n in same
        ]
        found = theirs.loglikelihood(requests, disable_tqdm=True)
        assert_close([ours[n].logprob for n in same], [f[0] for f in found], rtol=1e-5, atol=1e-4)
        as_text += len(same)
        greedy += [s.greedy for s in ours]
    assert 0 < sum(greedy) < len(greedy)
    assert as_text > len(greedy) / 3
