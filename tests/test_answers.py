"""Questions answered in words: what is asked, how answers are graded, and pass@k by brute force."""

import itertools

import pytest
from shared import as_ranks
from test_choices import CONFIG, TOKENIZER

from nanolib import tasks
from nanolib.conversation import Conversation
from nanolib.data import toyworld
from nanolib.engine import Answer, Engine
from nanolib.evals import answers
from nanolib.evals.answers import Questions, evaluate, evaluate_sampled, pass_at_k


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    return toyworld.write(tmp_path_factory.mktemp("toy") / "mirror", 3, shards=1, rows=10)


@pytest.fixture
def ask(random_model, cpu, mirror):
    """Makes the questions of a toy task for a random model."""

    def make(name: str, max_new_tokens: int = 5) -> Questions:
        engine = Engine(random_model(CONFIG, TOKENIZER.vocab_size), TOKENIZER, cpu)
        return Questions(engine, tasks.load_graded(name, "test", mirror), max_new_tokens)

    return make


def saying(monkeypatch, questions, *texts):
    """Let the engine give these answers, whatever is asked; returns the list of prompts asked."""
    asked = []

    def say(prompts, **settings):
        asked.extend(prompts)
        assert settings["max_new_tokens"] == questions.max_new_tokens
        ids = [TOKENIZER.encode(text) if isinstance(text, str) else text for text in texts]
        return [Answer(one, [True] * len(one)) for one in ids[: len(prompts)]]

    monkeypatch.setattr(questions.engine, "answers", say)
    return asked


# ---------------------------------------------------------------------------- greedy


def test_answers_are_graded_as_the_engine_gives_them(ask, monkeypatch):
    questions = ask("facts")
    task = questions.task
    texts = [f"The {task.row(i)['answer' if i % 3 else 'others']}" for i in range(9)]
    asked = saying(monkeypatch, questions, *texts)
    scores = evaluate(questions, range(9))
    assert asked == [Conversation.ask(task.row(i)["question"]).prompt(TOKENIZER) for i in range(9)]
    assert (scores["accuracy"], scores["questions"]) == (6 / 9, 9)
    assert scores["samples"][1] == [task.row(1)["question"], texts[1], True]
    assert scores["right"] == {"accuracy": "011011011"}
    assert len(scores["samples"]) == answers.SHOWN == 8


def test_a_question_that_fills_the_context_is_wrong_and_the_others_count(ask, monkeypatch):
    questions = ask("facts")
    rows = [questions.task.row(i) for i in range(4)]
    rows[1]["question"] = "red " * 200
    monkeypatch.setattr(questions.task, "row", lambda i: rows[i])
    asked = saying(monkeypatch, questions, *(rows[i]["answer"] for i in (0, 2, 3)))
    scores = evaluate(questions, range(4))
    assert len(asked) == 3
    assert (scores["accuracy"], scores["questions"], scores["too long"]) == (3 / 4, 4, 1)
    assert scores["samples"][1] == [rows[1]["question"], "", False]


def test_word_problems_are_graded_by_what_is_said_not_by_the_tool(ask, monkeypatch):
    questions, special = ask("gsm8k"), TOKENIZER.special
    right = questions.task.row(0)["answer"].split("#### ")[1]
    tool = [special("<|output_start|>"), *TOKENIZER.encode("#### 1"), special("<|output_end|>")]
    saying(monkeypatch, questions, [*TOKENIZER.encode(f"so #### {right}"), *tool], tool)
    scores = evaluate(questions, range(2))
    assert [right for *_, right in scores["samples"]] == [True, False]
    assert "<|output_start|>#### 1<|output_end|>" in scores["samples"][1][1]
    assert "too long" not in scores


def test_functions_are_run_and_what_the_sandbox_lacks_is_counted_apart(ask, monkeypatch):
    questions = ask("humaneval")
    rows = [questions.task.row(i) for i in range(4)]
    fenced = f"```python\n{rows[0]['prompt']}{rows[0]['canonical_solution']}```"
    texts = fenced, rows[1]["canonical_solution"], "    return None", "    import numpy"
    asked = saying(monkeypatch, questions, *texts)
    scores = evaluate(questions, range(4))
    assert asked[1] == Conversation.ask(rows[1]["prompt"]).prompt(TOKENIZER)
    assert (scores["accuracy"], scores["questions"], scores["unsupported"]) == (2 / 4, 4, 1)
    assert [right for *_, right in scores["samples"]] == [True, True, False, False]
    assert questions.rewards(0, texts[2:]) == [0, 0]  # what cannot be told earns nothing


def test_rounds_change_nothing_and_can_be_stopped_between(ask, monkeypatch):
    questions, told = ask("gsm8k"), []
    whole = evaluate(questions, range(10))
    monkeypatch.setattr(answers, "QUESTIONS_AT_ONCE", 4)
    assert evaluate(questions, range(10), lambda *at: told.append(at)) == whole
    assert told == [(0, 10), (4, 10), (8, 10)]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(questions, range(10), stop)


def test_a_task_without_a_grader_is_refused(mirror):
    with pytest.raises(ValueError, match="answers are graded, got 'smoltalk'"):
        tasks.load_graded("smoltalk", "test", mirror)


# ---------------------------------------------------------------------------- pass@k


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    for right, k in itertools.product(range(6), range(1, 6)):
        draws = list(itertools.combinations([1] * right + [0] * (5 - right), k))
        assert pass_at_k(5, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def even(i: int, answer: str) -> bool:
    return len(answer) % 2 == 0


def test_sampled_scores_are_the_mean_of_every_pass_at_k(ask, monkeypatch):
    questions = ask("facts")
    monkeypatch.setattr(questions.task, "grade", even)
    found = evaluate_sampled(questions, range(5), samples=4, seed=3, top_k=20)
    assert list(found) == ["pass@1", "pass@2", "pass@3", "pass@4"]
    assert found == evaluate_sampled(questions, range(5), samples=4, seed=3, top_k=20)
    assert found != evaluate_sampled(questions, range(5), samples=4, seed=4, top_k=20)
    seeds = [answers.seed_of(3, "passes", i) for i in range(5)]
    given = questions.answers(range(5), 4, seeds=seeds, temperature=1.0, top_k=20)
    right = [sum(even(0, questions.text(answer)) for answer in row) for row in given]
    for k in range(1, 5):
        assert found[f"pass@{k}"] == pytest.approx(sum(pass_at_k(4, r, k) for r in right) / 5)
    assert 0 < found["pass@1"] < found["pass@4"] <= 1
    assert found != evaluate_sampled(questions, range(5), samples=4, seed=3)


def test_ranks_share_the_questions_and_agree(ask, monkeypatch):
    questions = ask("facts")
    monkeypatch.setattr(questions.task, "grade", even)

    def scores(runtime):
        engine = Engine(questions.engine.model, TOKENIZER, runtime)
        mine = Questions(engine, questions.task, questions.max_new_tokens)
        return (
            evaluate_sampled(mine, range(7), samples=3, seed=3),
            evaluate(mine, range(7)),
        )

    results, parts = as_ranks(questions.engine.runtime, 2, scores)
    assert results == [scores(questions.engine.runtime)] * 2
    assert [len(part) for part in parts] == [4, 3]
