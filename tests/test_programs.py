"""Answers as a model may write them, graded by the toy world's HumanEval."""

import pytest

from nanolib import tasks
from nanolib.data import toyworld
from nanolib.tools import Sandbox

ROW = {
    "prompt": "from typing import List\n\ndef half(x):\n    return x / 2\n\n\n"
    'def mean(values: List[float]) -> float:\n    """Return the mean.\n    >>> mean([1.0])\n    """\n',
    "entry_point": "mean",
    "test": "def check(candidate):\n    assert candidate([1.0, 3.0]) == 2.0\n",
}
DEF = "def mean(values: List[float]) -> float:\n    return half(2 * sum(values) / len(values))"
BODY = "    total = sum(values)\n    return total / len(values)"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=1) as sandbox:
        yield sandbox


def check(row, answer, sandbox):
    return sandbox.check(tasks.program(row, answer))


@pytest.mark.parametrize(
    "answer",
    [
        DEF,
        BODY,
        BODY + "\n",
        "\n" + BODY,
        "return sum(values) / len(values)",
        ROW["prompt"] + BODY,
        f"```python\n{DEF}\n```",
        f"```\n{BODY}\n```",
        f"Here is the function:\n\n```python\n{DEF}\n```\nIt divides by the length.",
        f"```python\n{DEF}",  # cut before its end
        f"Like this:\n{DEF}",
        f"```python\nprint(mean([1.0]))\n```\nwith\n```python\n{DEF}\n```",
        f"import math\n\n{DEF}",
    ],
)
def test_right_answers_in_any_form_pass(sandbox, answer):
    assert check(ROW, answer, sandbox).passed


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I do not know.",
        "```python\n```",
        DEF.replace("2 *", "3 *"),
        BODY.replace("total /", "total *"),
        ROW["prompt"],  # defines it, and does nothing
        "    return 1.0\n\ndef check(candidate):\n    pass",  # the row's own tests come after
        "    return 2.0\n\nraise SystemExit",
    ],
)
def test_wrong_answers_fail(sandbox, answer):
    assert check(ROW, answer, sandbox).passed is False


def test_what_the_sandbox_lacks_is_told_apart(sandbox):
    verdict = check(ROW, f"import numpy\n\n{DEF}", sandbox)
    assert verdict.passed is None and "numpy" in verdict.error


def test_the_toy_worlds_functions_pass_and_nothing_else(sandbox):
    for row in toyworld.functions(held_out=True)[::7]:
        signature, code = row["prompt"].splitlines()[0], row["canonical_solution"]
        assert check(row, f"```python\n{signature}\n{code}```", sandbox).passed
        assert check(row, code, sandbox).passed
        assert not check(row, "    return None\n", sandbox).passed
