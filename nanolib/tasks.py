"""Tasks: hub data sets as conversations, and grading of answers."""

from __future__ import annotations

import copy
import random
import re
import textwrap
import weakref
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from nanolib import hub
from nanolib.config import SumsConfig
from nanolib.conversation import LETTERS, Conversation, Message, Part, choice_question
from nanolib.runtime import seed_of
from nanolib.tools import Sandbox, without_commas

PROGRAM_SECONDS = 6  # time limit of a HumanEval function with its tests
SUM = r"<<[\d\s.()+*/-]+=-?[\d.]+>>"  # a calculator annotation in an answer


class Task:
    name: str
    repository: str
    config: str | None = None
    train_split = "train"  # the repository's name for the training split
    columns: tuple[str, ...]

    def __init__(self, split: str, mirror: Path):
        *_, self.split = source = self.source(split)
        self.table: pa.Table = hub.table(source, mirror)
        there = self.table.column_names
        if missing := [column for column in self.columns if column not in there]:
            has = f"has no column {', '.join(missing)}; it has {', '.join(there)}"
            raise self.unusable(f"{has}; take the data set's own parquet files")

    @classmethod
    def source(cls, split: str) -> hub.Split:
        """(repository, configuration, split name) on the hub."""
        return cls.repository, cls.config, cls.train_split if split == "train" else split

    def unusable(self, why: str) -> ValueError:
        return ValueError(f"{self.repository} ({self.split}) {why}")

    def __len__(self) -> int:
        return self.table.num_rows

    def row(self, i: int) -> dict[str, Any]:
        return self.table.slice(i, 1).to_pylist()[0]

    def conversation(self, i: int) -> Conversation:
        """Row i with its reference answer."""
        raise NotImplementedError

    def unanswered(self, i: int) -> Conversation:
        """Row i without its answer: what the model is asked."""
        return Conversation(self.conversation(i).messages[:-1])


class GradedTask(Task):
    def grade(self, i: int, answer: str) -> bool | None:
        """Whether an answer to row i is right; None if it cannot be graded here."""
        raise NotImplementedError

    def formatted(self, answer: str) -> bool:
        """Whether an answer, right or wrong, has the form that grading expects."""
        return True


class ChoiceTask(Task):
    """Multiple choice with one right answer; the reference answer is its letter."""

    def question(self, i: int) -> str:
        return self.row(i)["question"]

    def without_questions(self) -> ChoiceTask:
        """The same problems with the question removed, as a baseline."""
        blind = copy.copy(self)
        blind.question = lambda i: ""
        return blind

    def choices(self, i: int) -> list[str]:
        return self.row(i)["choices"]

    def answer(self, i: int) -> int:
        """The index of the right choice."""
        return self.row(i)["answer"]

    def conversation(self, i: int) -> Conversation:
        text = choice_question(self.question(i), self.choices(i))
        return Conversation.ask(text, LETTERS[self.answer(i)])


class MMLU(ChoiceTask):
    """Massive multitask language understanding (arXiv:2009.03300)."""

    name, repository, config = "mmlu", "cais/mmlu", "all"
    train_split = "auxiliary_train"
    columns = ("question", "choices", "answer")


class ARC(ChoiceTask):
    """The AI2 reasoning challenge (arXiv:1803.05457), in two halves."""

    repository = "allenai/ai2_arc"
    columns = ("question", "choices", "answerKey")

    def choices(self, i: int) -> list[str]:
        return self.row(i)["choices"]["text"]

    def answer(self, i: int) -> int:
        row = self.row(i)
        return row["choices"]["label"].index(row["answerKey"])


class ARCEasy(ARC):
    name, config = "arc_easy", "ARC-Easy"


class ARCChallenge(ARC):
    name, config = "arc_challenge", "ARC-Challenge"


class SmolTalk(Task):
    """Conversations (arXiv:2502.02737); ``<<a+b=c>>`` becomes a tool call, as in GSM8K."""

    name, repository = "smoltalk", "HuggingFaceTB/smol-smoltalk"
    columns = ("messages",)

    def conversation(self, i: int) -> Conversation:
        messages = self.row(i)["messages"]
        for message in messages:
            if message["role"] == "assistant" and re.search(SUM, message["content"]):
                parts = calculator_parts(message["content"], run=True)
                message["content"] = [{"type": part.kind, "text": part.text} for part in parts]
        try:
            return Conversation.from_messages(messages)
        except ValueError as error:
            raise self.unusable(f"row {i}: {error}; mend or remove that row") from None


class GSM8K(GradedTask):
    """Grade-school word problems (arXiv:2110.14168); ``<<48/2=24>>`` becomes a tool call."""

    name, repository, config = "gsm8k", "openai/gsm8k", "main"
    columns = ("question", "answer")

    def __init__(self, split: str, mirror: Path):
        super().__init__(split, mirror)
        for i, answer in enumerate(self.table["answer"].to_pylist()):
            if final_number(answer) is None:
                wrong = f"no '#### number' at the end of its answer ({answer[-40:]!r})"
                raise self.unusable(f"row {i} has {wrong}; add it or remove that row")

    def conversation(self, i: int) -> Conversation:
        row = self.row(i)
        answer = Message("assistant", calculator_parts(row["answer"], run=True))
        return Conversation((*Conversation.ask(row["question"]).messages, answer))

    def grade(self, i: int, answer: str) -> bool:
        return final_number(answer) == final_number(self.row(i)["answer"])

    def formatted(self, answer: str) -> bool:
        return final_number(answer) is not None


def calculator_parts(answer: str, run: bool = False) -> tuple[Part, ...]:
    """Split GSM8K's annotated answer into parts: text, python expression, output, text, …

    run: evaluate the expressions (48/2 gives 24.0), instead of using the annotated results.
    """
    parts: list[Part] = []
    for number, piece in enumerate(re.split(r"<<([^<>]*)>>", answer)):
        if number % 2:
            expression, _, result = piece.rpartition("=")
            printed = evaluated(expression) if run else None
            parts += [Part("python", expression), Part("output", printed or result)]
        elif piece:
            parts.append(Part("text", piece))
    return tuple(parts)


def evaluated(expression: str) -> str | None:
    """What the tool prints for an arithmetic expression; None for any other source."""
    expression = without_commas(expression.strip())
    if not re.fullmatch(r"[0-9\s.()+*/%-]+", expression) or "**" in expression:
        return None
    try:
        return repr(eval(expression, {"__builtins__": {}}))
    except (ArithmeticError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
        return None


def final_number(text: str) -> str | None:
    """The number after the last ####, without thousands separators; None if there is none."""
    found = re.findall(r"####\s*(-?[\d.,]*\d)", text)
    return found[-1].replace(",", "") if found else None


class HumanEval(GradedTask):
    """Functions to complete (arXiv:2107.03374), graded by running their tests in a sandbox."""

    name, repository = "humaneval", "openai/openai_humaneval"
    columns = ("task_id", "prompt", "entry_point", "canonical_solution", "test")

    def conversation(self, i: int) -> Conversation:
        row = self.row(i)
        return Conversation.ask(row["prompt"], row["prompt"] + row["canonical_solution"])

    def grade(self, i: int, answer: str) -> bool | None:
        return self._sandbox.check(program(self.row(i), answer)).passed

    @cached_property
    def _sandbox(self) -> Sandbox:
        sandbox = Sandbox(seconds=PROGRAM_SECONDS)
        weakref.finalize(self, sandbox.close)
        return sandbox.__enter__()


def program(row: Mapping[str, str], answer: str) -> str:
    """A test program: the answer's function (or prompt + answer, if it is only a body) and tests.

    Uses fenced code if there is any, else everything from the first line of code on.
    """
    prompt, name = row["prompt"], row["entry_point"]
    code = _code(answer, name)
    if _definition(code, name):
        before = _definition(prompt, name)
        code = prompt[: before.start() if before else 0] + code  # imports and helpers
    else:
        indented = code.lstrip("\n")[:1] in (" ", "\t")
        code = prompt + (code if indented else textwrap.indent(code, "    "))
    return f"{code}\n\n{row['test']}\n\ncheck({name})\n"


def _code(answer: str, name: str) -> str:
    blocks = re.findall(r"```[\w+-]*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", answer, re.DOTALL)
    if blocks:
        return next((block for block in blocks if _definition(block, name)), blocks[0])
    first = re.search(r"^(?:def|class|import|from|@)", answer, re.MULTILINE)
    return answer[first.start() :] if first and _definition(answer, name) else answer


def _definition(code: str, name: str) -> re.Match[str] | None:
    return re.search(rf"^def {re.escape(name)}\b", code, re.MULTILINE)


class Facts(GradedTask):
    name, repository = "facts", "nanolib/toy-facts"
    columns = ("question", "answer", "others")

    def conversation(self, i: int) -> Conversation:
        row = self.row(i)
        return Conversation.ask(row["question"], row["answer"])

    def grade(self, i: int, answer: str) -> bool:
        """Whether the answer names the right value and none of the wrong ones."""
        row, words = self.row(i), set(re.findall(r"\w+", answer))
        return row["answer"] in words and not words & set(row["others"])


class Sums(GradedTask):
    """Generated sums such as 3 + 8 - 4, solved step by step; `dial` sets the difficulty.

    No total is negative. A hash of the problem keeps "train", "test" and "final SEED" disjoint.
    """

    name, repository = "sums", ""

    def __init__(self, split: str, dial: SumsConfig | None = None):
        self.split, self.dial, self.part = split, dial or SumsConfig(), split.split()[0]

    def __len__(self) -> int:
        return 20_000 if self.part == "train" else 2000

    def problem(self, i: int) -> tuple[str, list[str], int]:
        """(the sum as text, its steps, its result)."""
        rng, dial = random.Random(seed_of(0, "sums", self.split, i)), self.dial
        while True:
            text = str(total := rng.randint(1, dial.largest))
            steps = []
            for _ in range(rng.randint(dial.fewest, dial.most) - 1):
                term = rng.randint(1, dial.largest)
                sign = rng.choice("+-" if term <= total else "+")
                result = total + term if sign == "+" else total - term
                steps.append(f"{total} {sign} {term} = {result}")
                text, total = f"{text} {sign} {term}", result
            if self.part == {0: "test", 1: "final"}.get(seed_of(0, text) % 10, "train"):
                return text, steps, total

    def conversation(self, i: int) -> Conversation:
        text, steps, total = self.problem(i)
        worked = "\n".join([*steps, f"#### {total}"])
        return Conversation.ask(f"Work out {text} in steps.", worked)

    def grade(self, i: int, answer: str) -> bool:
        return final_number(answer) == str(self.problem(i)[-1])

    def formatted(self, answer: str) -> bool:
        return final_number(answer) is not None


CLASSES = ARCEasy, ARCChallenge, MMLU, SmolTalk, GSM8K, HumanEval, Facts, Sums
TASKS: dict[str, type[Task]] = {task.name: task for task in CLASSES}


def find(name: str) -> type[Task]:
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]


def load(name: str, split: str, mirror: Path, dial: SumsConfig | None = None) -> Task:
    """Load a split of a task; `dial`: difficulty of sums."""
    return Sums(split, dial) if name == Sums.name else find(name)(split, mirror)


def load_graded(name: str, split: str, mirror: Path, dial: SumsConfig | None = None) -> GradedTask:
    if isinstance(task := load(name, split, mirror, dial), GradedTask):
        return task
    raise ValueError(f"grpo.task must be one whose answers are graded, got {name!r}; try gsm8k")
