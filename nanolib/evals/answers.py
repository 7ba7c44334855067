"""Generate and grade free-form answers, for evaluations and for GRPO."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from nanolib.conversation import Message, answer_parts
from nanolib.engine import Answer, Engine
from nanolib.evals import QUESTIONS_AT_ONCE, Grade, Progress, accuracy, notes, rights, score_all
from nanolib.runtime import seed_of
from nanolib.tasks import GradedTask

SHOWN = 8  # answers kept in the results


class Questions:
    def __init__(self, engine: Engine, task: GradedTask, max_new_tokens: int):
        self.engine, self.task, self.max_new_tokens = engine, task, max_new_tokens

    def prompt(self, question: int) -> list[int]:
        return self.task.unanswered(question).prompt(self.engine.tokenizer)

    def fitting(self, questions: Sequence[int], room: int) -> list[int]:
        """The questions whose prompts leave `room` tokens of context for an answer."""
        longest = self.engine.context - room
        return [question for question in questions if len(self.prompt(question)) <= longest]

    def usable(self) -> list[int]:
        """The questions that leave room for `max_new_tokens`; ValueError if there are none."""
        if found := self.fitting(range(len(self.task)), self.max_new_tokens):
            return found
        room = f"{self.max_new_tokens} tokens of answer in a context of {self.engine.context}"
        remedy = "lower max_new_tokens or raise model.sequence_len"
        raise ValueError(f"no question of {self.task.name} leaves room for {room}; {remedy}")

    def answers(
        self, questions: Sequence[int], samples: int = 1, **sampling: Any
    ) -> list[list[Answer]]:
        """Answers as [question][sample]; sampling: seeds, temperature, top_k (default: greedy)."""
        prompts = [self.prompt(question) for question in questions]
        sampling |= {"samples": samples, "max_new_tokens": self.max_new_tokens}
        answers = self.engine.answers(prompts, **sampling)
        return [answers[i : i + samples] for i in range(0, len(answers), samples)]

    def text(self, answer: Answer) -> str:
        """The text to grade, without tool calls and their outputs."""
        return Message("assistant", answer_parts(answer.ids, self.engine.tokenizer)).text

    def rewards(self, question: int, texts: Iterable[str]) -> list[float]:
        return [float(self.task.grade(question, text) or 0) for text in texts]


def evaluate(
    questions: Questions, indices: Sequence[int], progress: Progress | None = None
) -> dict[str, Any]:
    """Accuracy of greedy answers, some samples, and the counts of notes (see `Grade`)."""
    task, engine = questions.task, questions.engine

    def graded(some: Sequence[int]) -> list[tuple[str, Grade]]:
        found: dict[int, tuple[str, Grade]] = dict.fromkeys(some, ("", (False, "too long")))
        fitting = questions.fitting(some, room=1)
        for i, (answer,) in zip(fitting, questions.answers(fitting), strict=True):
            right = task.grade(i, questions.text(answer))
            grade = bool(right), "unsupported" * (right is None)
            found[i] = engine.tokenizer.decode(answer.ids), grade
        return list(found.values())

    found = score_all(graded, indices, QUESTIONS_AT_ONCE, engine.runtime, progress)
    grades = [grade for _, grade in found]
    shown = [
        [task.unanswered(i).turns[-1].text, text, right]
        for i, (text, (right, _)) in zip(indices[:SHOWN], found, strict=False)
    ]
    scores = {"accuracy": accuracy(grades), "questions": len(indices), "samples": shown}
    return scores | notes(grades) | {"right": {"accuracy": rights(grades)}}


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Unbiased estimate of pass@k, given `right` of `samples` answers (arXiv:2107.03374)."""
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def evaluate_sampled(
    questions: Questions,
    indices: Sequence[int],
    samples: int,
    seed: int,
    top_k: int | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """pass@1 to pass@`samples` of answers sampled at temperature 1."""

    def right(some: Sequence[int]) -> list[int]:
        seeds = [seed_of(seed, "passes", i) for i in some]
        sampled = questions.answers(some, samples, seeds=seeds, temperature=1.0, top_k=top_k)
        texts = [map(questions.text, answers) for answers in sampled]
        return [int(sum(questions.rewards(*pair))) for pair in zip(some, texts, strict=True)]

    counts = score_all(right, indices, QUESTIONS_AT_ONCE, questions.engine.runtime, progress)
    return {
        f"pass@{k}": sum(pass_at_k(samples, count, k) for count in counts) / len(counts)
        for k in range(1, samples + 1)
    }
