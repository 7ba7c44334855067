"""Tasks: data sets as conversations, with what grading them needs.

Each class is one data set of the hub. `conversation(i)` is a row with its reference answer, as
training shows it. Four-choice tasks also give `question`, `choices` and `answer`; tasks answered
in words grade what was generated.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa

from nanolib import hub
from nanolib.conversation import LETTERS, Conversation, Message, Part, choice_question
from nanolib.tools import without_commas


class Task:
    """One split of one data set. Raises ValueError that names a missing column."""

    name: str
    repository: str
    config: str | None = None
    train_split = "train"  # the repository's name for what we train on
    columns: tuple[str, ...]

    def __init__(self, split: str, mirror: Path):
        _, _, self.split = self.source(split)
        table = hub.table(self.repository, self.split, self.config, mirror)
        missing = [column for column in self.columns if column not in table.column_names]
        if missing:
            raise ValueError(
                f"{self.repository} ({self.split}) has no column {', '.join(missing)}; it has "
                f"{', '.join(table.column_names)}; take the data set's own parquet files"
            )
        self.table: pa.Table = table

    @classmethod
    def source(cls, split: str) -> hub.Split:
        """Where a split is on the hub: repository, configuration and the split's name there."""
        return cls.repository, cls.config, cls.train_split if split == "train" else split

    def __len__(self) -> int:
        return self.table.num_rows

    def row(self, i: int) -> dict[str, Any]:
        return self.table.slice(i, 1).to_pylist()[0]

    def conversation(self, i: int) -> Conversation:
        """Row i with its reference answer."""
        raise NotImplementedError


class GradedTask(Task):
    """Questions answered in words."""

    def grade(self, i: int, answer: str) -> bool:
        """Whether a generated answer to row i is right."""
        raise NotImplementedError


class ChoiceTask(Task):
    """Questions with a few choices, one of them right; training answers with its letter."""

    def question(self, i: int) -> str:
        return self.row(i)["question"]

    def choices(self, i: int) -> list[str]:
        return list(self.row(i)["choices"])

    def answer(self, i: int) -> int:
        """The right choice's place."""
        return int(self.row(i)["answer"])

    def conversation(self, i: int) -> Conversation:
        text = choice_question(self.question(i), self.choices(i))
        return Conversation.ask(text, LETTERS[self.answer(i)])


class MMLU(ChoiceTask):
    """Massive multitask language understanding (arXiv:2009.03300)."""

    name, repository, config = "mmlu", "cais/mmlu", "all"
    train_split = "auxiliary_train"
    columns = ("question", "choices", "answer")


class ARC(ChoiceTask):
    """The AI2 reasoning challenge (arXiv:1803.05457); a subclass names its half."""

    repository = "allenai/ai2_arc"
    columns = ("question", "choices", "answerKey")

    def choices(self, i: int) -> list[str]:
        return list(self.row(i)["choices"]["text"])

    def answer(self, i: int) -> int:
        row = self.row(i)
        return list(row["choices"]["label"]).index(row["answerKey"])


class ARCEasy(ARC):
    name, config = "arc_easy", "ARC-Easy"


class ARCChallenge(ARC):
    name, config = "arc_challenge", "ARC-Challenge"


class SmolTalk(Task):
    """Conversations (arXiv:2502.02737)."""

    name, repository = "smoltalk", "HuggingFaceTB/smol-smoltalk"
    columns = ("messages",)

    def conversation(self, i: int) -> Conversation:
        try:
            return Conversation.from_messages(self.row(i)["messages"])
        except ValueError as error:
            raise ValueError(
                f"{self.repository} ({self.split}) row {i}: {error}; mend or remove that row"
            ) from None


class GSM8K(GradedTask):
    """Grade-school word problems (arXiv:2110.14168); ``<<a+b=c>>`` becomes a tool call.

    Its output is what Python says. One written result in four differs in form: 24 for 48/2.
    """

    name, repository, config = "gsm8k", "openai/gsm8k", "main"
    columns = ("question", "answer")

    def __init__(self, split: str, mirror: Path):
        super().__init__(split, mirror)
        for i, answer in enumerate(self.table["answer"].to_pylist()):
            if final_number(answer) is None:
                raise ValueError(
                    f"{self.repository} ({self.split}) row {i} has no '#### number' at the end of "
                    f"its answer ({answer[-40:]!r}); add it or remove that row"
                )

    def conversation(self, i: int) -> Conversation:
        row = self.row(i)
        parts = list(calculator_parts(row["answer"]))
        for place, (call, result) in enumerate(pairwise(parts), 1):
            if call.kind == "python":
                parts[place] = Part("output", python_says(call.text) or result.text)
        asked = Message("user", (Part("text", row["question"]),))
        return Conversation((asked, Message("assistant", tuple(parts))))

    def grade(self, i: int, answer: str) -> bool:
        """Whether the number after the last #### is the reference's."""
        return final_number(answer) == final_number(self.row(i)["answer"])


def calculator_parts(answer: str) -> tuple[Part, ...]:
    """GSM8K's marks as parts: text, a python expression, its output, text, …"""
    parts: list[Part] = []
    for number, piece in enumerate(re.split(r"<<([^<>]*)>>", answer)):
        if number % 2 == 0:
            parts += [Part("text", piece)] if piece else []
            continue
        expression, _, result = piece.rpartition("=")
        parts += [Part("python", expression), Part("output", result)]
    return tuple(parts)


_OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def python_says(expression: str) -> str | None:
    """What Python prints for a sum of numbers, as the tool does; None for anything else."""

    def value(node: ast.expr) -> float:
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.BinOp(left, op, right):
                return _OPERATORS[type(op)](value(left), value(right))
            case ast.UnaryOp(op, operand):
                return _OPERATORS[type(op)](value(operand))
        raise ValueError(f"{expression!r} is more than a sum of numbers")

    try:
        return repr(value(ast.parse(without_commas(expression.strip()), mode="eval").body))
    except (ArithmeticError, KeyError, RecursionError, SyntaxError, ValueError):
        return None


def final_number(text: str) -> str | None:
    """The number after the last ####, without thousands' commas; None where there is none."""
    found = re.findall(r"####\s*(-?[\d.,]*\d)", text)
    return found[-1].replace(",", "") if found else None


class HumanEval(Task):
    """Functions to complete (arXiv:2107.03374)."""

    name, repository = "humaneval", "openai/openai_humaneval"
    columns = ("task_id", "prompt", "entry_point", "canonical_solution", "test")

    def conversation(self, i: int) -> Conversation:
        row = self.row(i)
        return Conversation.ask(row["prompt"], row["prompt"] + row["canonical_solution"])


class Facts(GradedTask):
    """The toy world's held-out facts, asked in words and answered in words."""

    name, repository = "facts", "nanolib/toy-facts"
    columns = ("question", "answer", "others")

    def conversation(self, i: int) -> Conversation:
        row = self.row(i)
        return Conversation.ask(row["question"], row["answer"])

    def grade(self, i: int, answer: str) -> bool:
        """Whether the answer names the right value and no other of its kind."""
        row, said = self.row(i), set(re.findall(r"\w+", answer))
        return row["answer"] in said and not said & set(row["others"])


TASKS = {
    task.name: task for task in (ARCEasy, ARCChallenge, MMLU, SmolTalk, GSM8K, HumanEval, Facts)
}


def find(name: str) -> type[Task]:
    """A task's class by name. Raises ValueError for an unknown one."""
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]


def load(name: str, split: str, mirror: Path) -> Task:
    """One split of a task. Raises ValueError for an unknown task."""
    return find(name)(split, mirror)


def load_graded(name: str, split: str, mirror: Path) -> GradedTask:
    """A task whose answers are graded. Raises ValueError for one that has nothing to grade by."""
    task = load(name, split, mirror)
    if not isinstance(task, GradedTask):
        raise ValueError(f"grpo.task must be one whose answers are graded, got {name!r}; try gsm8k")
    return task
