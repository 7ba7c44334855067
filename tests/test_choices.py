"""Scores against the plain way: one question at a time, no padding, no batch."""

import dataclasses

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanolib import tasks
from nanolib.config import ModelConfig
from nanolib.conversation import Conversation, choice_question
from nanolib.data import toyworld
from nanolib.engine import Engine
from nanolib.evals import choices
from nanolib.tokenizer import Tokenizer

TEXT = "Which colour does Mira like best? Mira likes red, blue, green and golden. (A) (B) (C) (D)"
TOKENIZER = Tokenizer.train([TEXT] * 3, 300)
CONFIG = ModelConfig(depth=2, aspect=16, head_dim=16, sequence_len=256)


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    return toyworld.write(tmp_path_factory.mktemp("toy") / "mirror", 3, shards=1, rows=10)


@pytest.fixture
def engine(random_model, cpu):
    return Engine(random_model(CONFIG, TOKENIZER.vocab_size), TOKENIZER, cpu)


def log_probability(engine, prompt, answer):
    """Of one answer after one prompt, token by token."""
    with torch.no_grad():
        logits = engine.model(torch.tensor([prompt + answer]))[0].log_softmax(-1)
    return sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(answer))


def test_by_text_is_the_likeliest_whole_answer(engine, mirror):
    task = tasks.load("arc_easy", "test", mirror)
    end = TOKENIZER.special("<|assistant_end|>")
    expected = []
    for i in range(24):
        prompt = Conversation.ask(task.question(i)).prompt(TOKENIZER)
        scores = [
            log_probability(engine, prompt, [*TOKENIZER.encode(choice), end])
            for choice in task.choices(i)
        ]
        expected.append(scores.index(max(scores)) == task.answer(i))
    assert choices.by_text(engine, task, range(24)) == expected
    assert 0 < sum(expected) < 24


def test_by_letter_compares_the_letters_after_the_prompt(engine, mirror):
    task = tasks.load("mmlu", "test", mirror)
    letters = [TOKENIZER.encode(letter)[0] for letter in "ABCD"]
    expected = []
    for i in range(24):
        text = choice_question(task.question(i), task.choices(i))
        prompt = Conversation.ask(text).prompt(TOKENIZER)
        logits = engine.model(torch.tensor([prompt]))[0, -1, letters]
        expected.append(int(logits.argmax()) == task.answer(i))
    assert choices.by_letter(engine, task, range(24)) == expected
    assert 0 < sum(expected) < 24


def test_small_groups_score_like_large_ones(engine, mirror, monkeypatch):
    task = tasks.load("mmlu", "test", mirror)
    whole = choices.evaluate(engine, task, engine.runtime, limit=20)
    monkeypatch.setattr(choices, "TOKENS_AT_ONCE", 1)
    assert choices.evaluate(engine, task, engine.runtime, limit=20) == whole
    assert whole["questions"] == 20
    assert whole["chance"] == 0.25


def test_only_the_letters_of_choices_there_are_count(engine, tmp_path):
    path = tmp_path / "hub/allenai/ai2_arc/ARC-Easy/test.parquet"
    path.parent.mkdir(parents=True)
    rows = [
        {
            "question": f"Question {i}?",
            "choices": {"text": ["red", "blue"], "label": ["A", "B"]},
            "answerKey": "A",
        }
        for i in range(8)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    task = tasks.load("arc_easy", "test", tmp_path)
    with torch.no_grad():  # the model always says C, which is no choice here
        engine.model.head.weight[TOKENIZER.encode("C")[0]] *= 100
    scores = choices.evaluate(engine, task, engine.runtime)
    assert scores["chance"] == 0.5
    prompt = Conversation.ask(choice_question("Question 0?", ["red", "blue"])).prompt(TOKENIZER)
    a, b = engine.model(torch.tensor([prompt]))[0, -1, [TOKENIZER.encode(c)[0] for c in "AB"]]
    assert choices.by_letter(engine, task, [0]) == [bool(a >= b)]


def test_words_are_graded_as_the_engine_says_them(engine, mirror, monkeypatch):
    task = tasks.load("facts", "test", mirror)
    answers = [f"The {task.row(i)['answer' if i % 3 else 'others']}" for i in range(9)]
    said = {}

    def complete(prompts, max_new_tokens):
        for i, prompt in enumerate(prompts):
            assert prompt == Conversation.ask(task.row(i)["question"]).prompt(TOKENIZER)
        said["limit"] = max_new_tokens
        return [TOKENIZER.encode(answer) for answer in answers]

    monkeypatch.setattr(engine, "complete", complete)
    scores = choices.evaluate(engine, task, engine.runtime, limit=9, max_new_tokens=5)
    assert scores["accuracy"] == 6 / 9
    assert scores["samples"][1] == [task.row(1)["question"], answers[1], True]
    assert said["limit"] == 5


def saying(monkeypatch, engine, *answers):
    """Let the engine give these answers, whatever is asked; returns the list of prompts asked."""
    asked = []

    def complete(prompts, max_new_tokens):
        asked.extend(prompts)
        return [
            TOKENIZER.encode(answer) if isinstance(answer, str) else answer
            for answer in answers[: len(prompts)]
        ]

    monkeypatch.setattr(engine, "complete", complete)
    return asked


def test_a_question_that_fills_the_context_is_wrong_and_the_others_count(
    engine, mirror, monkeypatch
):
    task = tasks.load("facts", "test", mirror)
    rows = [task.row(i) for i in range(4)]
    rows[1]["question"] = "red " * 200
    monkeypatch.setattr(task, "row", lambda i: rows[i])
    asked = saying(monkeypatch, engine, *(rows[i]["answer"] for i in (0, 2, 3)))
    scores = choices.evaluate(engine, task, engine.runtime, limit=4)
    assert len(asked) == 3
    assert (scores["accuracy"], scores["questions"], scores["too long"]) == (3 / 4, 4, 1)
    assert scores["samples"][1] == [rows[1]["question"], "", False]


def test_word_problems_are_graded_by_what_is_said_not_by_the_tool(engine, mirror, monkeypatch):
    task = tasks.load("gsm8k", "test", mirror)
    special = TOKENIZER.special
    right = task.row(0)["answer"].split("#### ")[1]
    tool = [special("<|output_start|>"), *TOKENIZER.encode("#### 1"), special("<|output_end|>")]
    said = [[*TOKENIZER.encode(f"so #### {right}"), *tool], tool]
    saying(monkeypatch, engine, *said)
    scores = choices.evaluate(engine, task, engine.runtime, limit=2)
    assert [right for *_, right in scores["samples"]] == [True, False]
    assert "<|output_start|>#### 1<|output_end|>" in scores["samples"][1][1]
    assert "too long" not in scores


def test_functions_are_run_and_what_the_sandbox_lacks_is_counted_apart(engine, mirror, monkeypatch):
    task = tasks.load("humaneval", "test", mirror)
    rows = [task.row(i) for i in range(4)]
    fenced = f"```python\n{rows[0]['prompt']}{rows[0]['canonical_solution']}```"
    answers = fenced, rows[1]["canonical_solution"], "    return None", "    import numpy"
    asked = saying(monkeypatch, engine, *answers)
    scores = choices.evaluate(engine, task, engine.runtime, limit=4)
    assert asked[1] == Conversation.ask(rows[1]["prompt"]).prompt(TOKENIZER)
    assert (scores["accuracy"], scores["questions"], scores["unsupported"]) == (2 / 4, 4, 1)
    assert [right for *_, right in scores["samples"]] == [True, True, False, False]


def test_ranks_share_the_questions_and_agree(engine, mirror):
    """Two runtimes that stand for two ranks: their parts make the whole."""
    task = tasks.load("mmlu", "test", mirror)
    whole = choices.by_text(engine, task, range(30))
    parts = [choices.by_text(engine, task, range(rank, 30, 2)) for rank in (0, 1)]
    assert [parts[i % 2][i // 2] for i in range(30)] == whole
    rank = dataclasses.replace(engine.runtime, rank=1, world_size=2)
    object.__setattr__(rank, "sum", lambda values: values)  # what this rank alone would add
    scores = choices.evaluate(engine, task, rank, limit=30)
    assert scores["text"] == pytest.approx(sum(parts[1]) / 30)


def test_progress_is_told_between_rounds_and_can_stop(engine, mirror, monkeypatch):
    whole = {name: _evaluate(engine, mirror, name) for name in ("mmlu", "gsm8k")}
    monkeypatch.setattr(choices, "QUESTIONS_AT_ONCE", 4)
    told: list[tuple[int, int]] = []
    for name in whole:
        scores = _evaluate(engine, mirror, name, progress=lambda *step: told.append(step))
        assert scores == whole[name]
    assert told == 2 * [(0, 10), (4, 10), (8, 10)]

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _evaluate(engine, mirror, "gsm8k", progress=stop)


def _evaluate(engine, mirror, name, **options):
    task = tasks.load(name, "test", mirror)
    return choices.evaluate(engine, task, engine.runtime, 10, max_new_tokens=5, **options)


def test_a_task_without_a_grader_is_refused(engine, mirror):
    task = tasks.load("smoltalk", "test", mirror)
    with pytest.raises(ValueError, match="'smoltalk' has nothing to grade"):
        choices.evaluate(engine, task, engine.runtime)
