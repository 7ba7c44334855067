"""HumanEval: from an answer in a conversation to a program that grades itself in the sandbox."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping

from nanolib.tools import Sandbox, Verdict

FENCE = re.compile(r"```[\w+-]*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
FIRST_LINE = re.compile(r"^(?:def|class|import|from|@)", re.MULTILINE)


def check(row: Mapping[str, str], answer: str, sandbox: Sandbox) -> Verdict:
    """Whether the function in an answer passes the row's tests; where it runs is the sandbox."""
    return sandbox.check(program(row, answer))


def program(row: Mapping[str, str], answer: str) -> str:
    """The answer's function with what the prompt has before it, the tests and their call.

    Code in a fence counts alone, else everything from the first line that looks like code. An
    answer may be the whole function or only its body, which goes on from the prompt.
    """
    prompt, name = row["prompt"], row["entry_point"]
    code = function_in(answer, name)
    if _definition(code, name):
        before = _definition(prompt, name)
        code = prompt[: before.start() if before else 0] + code  # imports and helpers
    else:
        indented = code.lstrip("\n")[:1] in (" ", "\t")
        code = prompt + (code if indented else textwrap.indent(code, "    "))
    return f"{code}\n\n{row['test']}\n\ncheck({name})\n"


def function_in(answer: str, name: str) -> str:
    """The part of an answer that is code: the fenced block that defines `name`, or the first."""
    blocks = FENCE.findall(answer)
    if blocks:
        return next((block for block in blocks if _definition(block, name)), blocks[0])
    begins = FIRST_LINE.search(answer)
    return answer[begins.start() :] if begins and _definition(answer, name) else answer


def _definition(code: str, name: str) -> re.Match[str] | None:
    return re.search(rf"^def {re.escape(name)}\b", code, re.MULTILINE)
