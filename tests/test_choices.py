"""Multiple choice against the plain way: one answer at a time, no padding, no batch."""

import itertools
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from shared import as_ranks

from nanolib import tasks
from nanolib.config import ModelConfig
from nanolib.conversation import Conversation, choice_question
from nanolib.data import toyworld
from nanolib.engine import Engine
from nanolib.evals import choices, core
from nanolib.tokenizer import Tokenizer

TEXT = "Which colour does Mira like best? Mira likes red, blue, green and golden. (A) (B) (C) (D)"
TOKENIZER = Tokenizer.train([TEXT] * 3, 300)
WORDS = ("Mira", "red", "blue", "green")
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
    assert choices.by_text(engine, task, range(24)) == [(right, "") for right in expected]
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
    assert choices.by_letter(engine, task, range(24)) == [(right, "") for right in expected]
    assert 0 < sum(expected) < 24


def test_without_the_question_only_the_choices_are_seen(engine, mirror):
    task = tasks.load("arc_easy", "test", mirror)
    end, letters = TOKENIZER.special("<|assistant_end|>"), [TOKENIZER.encode(c)[0] for c in "ABCD"]
    by_text, by_letter = [], []
    for i in range(24):
        alone = Conversation.ask("").prompt(TOKENIZER)
        answers = [[*TOKENIZER.encode(choice), end] for choice in task.choices(i)]
        scores = [log_probability(engine, alone, answer) for answer in answers]
        by_text.append(scores.index(max(scores)) == task.answer(i))
        prompt = Conversation.ask(choice_question("", task.choices(i))).prompt(TOKENIZER)
        logits = engine.model(torch.tensor([prompt]))[0, -1, letters]
        by_letter.append(int(logits.argmax()) == task.answer(i))
    scores = choices.evaluate(engine, task, range(24))
    assert scores["text without the question"] == sum(by_text) / 24
    assert scores["letters without the question"] == sum(by_letter) / 24
    assert choices.by_text(engine, task.without_questions(), range(24)) != choices.by_text(
        engine, task, range(24)
    )
    assert task.question(0), "the task itself keeps its questions"


def test_each_problem_is_kept_as_right_or_wrong(engine, mirror):
    task = tasks.load("mmlu", "test", mirror)
    right = choices.evaluate(engine, task, range(20))["right"]
    for name, way in (("text", choices.by_text), ("letters", choices.by_letter)):
        assert right[name] == "".join(str(int(one)) for one, _ in way(engine, task, range(20)))
        assert set(right[name]) == {"0", "1"}


@pytest.fixture
def arc(tmp_path):
    """Makes ARC-Easy of (question, choices); the first choice is right."""

    def make(*rows):
        path = tmp_path / "hub/allenai/ai2_arc/ARC-Easy/test.parquet"
        path.parent.mkdir(parents=True)
        table = [
            {
                "question": question,
                "choices": {"text": texts, "label": list("ABCD"[: len(texts)])},
                "answerKey": "A",
            }
            for question, texts in rows
        ]
        pq.write_table(pa.Table.from_pylist(table), path)
        return tasks.load("arc_easy", "test", tmp_path)

    return make


def test_only_the_letters_of_choices_there_are_count(engine, arc):
    task = arc(*((f"Question {i}?", ["red", "blue"]) for i in range(8)))
    with torch.no_grad():  # the model always says C, which is no choice here
        engine.model.head.weight[TOKENIZER.encode("C")[0]] *= 100
    assert choices.evaluate(engine, task, range(8))["chance"] == 0.5
    prompt = Conversation.ask(choice_question("Question 0?", ["red", "blue"])).prompt(TOKENIZER)
    a, b = engine.model(torch.tensor([prompt]))[0, -1, [TOKENIZER.encode(c)[0] for c in "AB"]]
    assert choices.by_letter(engine, task, [0]) == [(bool(a >= b), "")]


def test_a_long_question_loses_its_beginning_and_a_choice_never_loses_anything(
    random_model, arc, cpu, monkeypatch
):
    """The context holds 40 tokens: no question fits beside its longest choice."""
    short = Engine(
        random_model(replace(CONFIG, sequence_len=40), TOKENIZER.vocab_size), TOKENIZER, cpu
    )
    rows = [
        ("Which colour does Mira like? " * 5, [f"{a} likes {b}", f"{b} likes {a}", f"{a} {b} " * 6])
        for a, b in itertools.permutations(WORDS, 2)
    ]
    task, end = arc(*rows), TOKENIZER.special("<|assistant_end|>")
    expected, prompts, scored = [], [], []
    score = core.score
    monkeypatch.setattr(
        core, "score", lambda model, of, on: scored.extend(of) or score(model, of, on)
    )
    for question, texts in rows:
        answers = [[*TOKENIZER.encode(text), end] for text in texts]
        room = 40 + 1 - max(map(len, answers))
        prompt = Conversation.ask(question).prompt(TOKENIZER)
        prompt = prompt[:2] + prompt[-(room - 2) :]  # <|bos|> <|user_start|> stay
        assert 4 < len(prompt) == room
        prompts.append((prompt, answers))
        scores = [log_probability(short, prompt, answer) for answer in answers]
        expected.append(scores.index(max(scores)) == 0)
    assert choices.by_text(short, task, range(len(rows))) == [(right, "cut") for right in expected]
    assert [(prompt.context, prompt.continuations) for prompt in scored] == prompts
    assert 0 < sum(expected) < len(rows)
    scores = choices.evaluate(short, task, range(len(rows)))
    assert (scores["text"], scores["cut"]) == (sum(expected) / len(rows), 2 * len(rows))


def test_a_choice_that_cannot_fit_is_told_and_wrong(random_model, arc, cpu):
    short = Engine(
        random_model(replace(CONFIG, sequence_len=40), TOKENIZER.vocab_size), TOKENIZER, cpu
    )
    task = arc(("Which?", ["red " * 30, "blue"]), ("Which?", ["red", "red"]))
    assert choices.by_text(short, task, range(2)) == [(False, "too long"), (True, "")]
    scores = choices.evaluate(short, task, range(2))
    assert (scores["text"], scores["questions"], scores["too long"]) == (1 / 2, 2, 1)


def test_ranks_share_the_questions_and_agree(engine, mirror):
    task = tasks.load("mmlu", "test", mirror)
    whole = choices.evaluate(engine, task, range(30))

    def evaluate(part):
        return choices.evaluate(Engine(engine.model, TOKENIZER, part), task, range(30))

    results, parts = as_ranks(engine.runtime, 2, evaluate)
    assert results == [whole, whole] and whole["questions"] == 30 and whole["chance"] == 0.25
    assert all(sum(right for (right, _), *_ in part) > 0 for part in parts)


def test_rounds_change_nothing_and_can_be_stopped_between(engine, mirror, monkeypatch):
    task = tasks.load("mmlu", "test", mirror)
    whole = choices.evaluate(engine, task, range(10))
    monkeypatch.setattr(choices, "QUESTIONS_AT_ONCE", 4)
    told = []
    assert choices.evaluate(engine, task, range(10), lambda *at: told.append(at)) == whole
    assert told == [(0, 10), (4, 10), (8, 10)]

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        choices.evaluate(engine, task, range(10), stop)
