"""Checks of the exercises: each says whether an answer is right, and if not, what is wrong with it.

    checks.verify("2.3", norm)

looks up exercise 3 of chapter 2 in this package's ``model.py``, which is worth reading only when
you have solved it. A check prints one line. It never raises and never shows the expected number.
"""

from __future__ import annotations

import copy
import dis
import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import EllipsisType, FunctionType
from typing import Any

CHAPTERS = (  # chapter N's exercises are in the module CHAPTERS[N]
    "tour",
    "tokenizer",
    "model",
    "muon",
    "pretraining",
    "inference",
    "midtraining",
    "sft",
    "grpo",
    "chat",
)
SEED = 20_251_013
TOLERANCE = 1e-4  # of the largest expected number
BLANK = "not answered yet: write your answer in place of the ..."

Verdict = tuple[bool | None, str]  # right, wrong or blank (None), and what to say


def verify(number: str, answer: Any) -> None:
    """Check an answer to exercise `number` ("2.3") and print what came out."""
    right, words = judge(number, answer)
    print(f"{'○' if right is None else '✓' if right else '✗'} {words}")


def judge(number: str, answer: Any) -> Verdict:
    """Whether an answer to exercise `number` is right (None: still blank), and what to say."""
    exercise = exercises(number).get(number)
    if exercise is None:
        raise ValueError(f"there is no exercise {number!r} in notebooks/checks; see its EXERCISES")
    if _is_blank(answer):
        return None, BLANK
    complaint = exercise.complaint(number, answer)
    if complaint is None:
        return True, f"right ({number})"
    return (None if complaint == BLANK else False), complaint


def exercises(number: str) -> Mapping[str, Exercise]:
    """All exercises of the chapter that exercise `number` belongs to, by number."""
    chapter = number.partition(".")[0]
    if not chapter.isdigit() or int(chapter) >= len(CHAPTERS):
        raise ValueError(f"an exercise is named chapter.number, such as 2.3; got {number!r}")
    return importlib.import_module(f"{__name__}.{CHAPTERS[int(chapter)]}").EXERCISES


# ---------------------------------------------------------------------------- kinds of exercises


@dataclass(frozen=True)
class Build:
    """The answer is a function, run on random inputs beside a reference.

    inputs: takes a seeded torch.Generator and returns a list of argument tuples, of odd shapes too.
    wrong: typical wrong functions, by what to tell someone who wrote one.
    explain: takes (got, expected, *arguments) and returns words, or None where it has none.
    same: whether (got, expected) are equal, where comparing numbers is not enough.
    """

    reference: Callable[..., Any]
    inputs: Callable[[Any], Sequence[tuple[Any, ...]]]
    wrong: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    explain: Callable[..., str | None] | None = None
    same: Callable[[Any, Any], bool] | None = None

    def complaint(self, number: str, answer: Any) -> str | None:
        """What is wrong with an answer; None where nothing is."""
        import torch

        if not callable(answer):
            return f"hand over the function itself, not {_kind(answer)} that it returned"
        cases = self.inputs(torch.Generator().manual_seed(SEED))
        got = self._outcomes(answer, cases)
        if any(_is_blank(outcome) for outcome in got):
            return BLANK
        expected = self._outcomes(self.reference, cases)
        if self._equal(got, expected):
            return None
        for message, function in self.wrong.items():
            if self._equal(got, self._outcomes(function, cases)):
                return message
        for g, e, arguments in zip(got, expected, cases, strict=True):
            if not self._equal([g], [e]):
                name = getattr(answer, "__name__", "your function")
                return self._say(g, e, arguments, f"{name}({', '.join(map(_brief, arguments))})")
        return None

    @staticmethod
    def _outcomes(function: Callable[..., Any], cases: Sequence[tuple[Any, ...]]) -> list[Any]:
        """What a function returns or raises in each case; it may change what it is given."""
        import torch

        outcomes = []
        for arguments in cases:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(SEED)  # a function that draws at random draws the same each time
                try:
                    outcomes.append(function(*copy.deepcopy(arguments)))
                except Exception as error:
                    outcomes.append(... if "ellipsis" in str(error) else error)
        return outcomes

    def _equal(self, got: Sequence[Any], expected: Sequence[Any]) -> bool:
        return all(self._equal_one(g, e) for g, e in zip(got, expected, strict=True))

    def _equal_one(self, got: Any, expected: Any) -> bool:
        if isinstance(got, Exception) or isinstance(expected, Exception):
            return type(got) is type(expected)
        try:
            return bool((self.same or same)(got, expected))
        except Exception:  # something was returned that cannot even be compared
            return False

    def _say(self, got: Any, expected: Any, arguments: tuple[Any, ...], call: str) -> str:
        if isinstance(got, Exception):
            return f"{call} raises {type(got).__name__}: {got}"
        words = None
        if self.explain is not None:
            try:
                words = self.explain(got, expected, *copy.deepcopy(arguments))
            except Exception:  # it was written for answers of the right kind and shape
                words = None
        return words or f"{call}: {difference(got, expected)}"


@dataclass(frozen=True)
class Value:
    """The answer is a number, a text or a list of these: right within three digits.

    digest: of the right value, made with ``python -m checks digest 2.1 209715200``.
    wrong: typical wrong values, and what to tell someone who gave one.
    """

    digest: str
    wrong: Mapping[Any, str] = field(default_factory=dict)

    def complaint(self, number: str, answer: Any) -> str | None:
        if callable(answer):
            return "this exercise asks for a value, not for a function"
        if self.digest in {digest(number, value) for value in _nearby(answer)}:
            return None
        for value, message in self.wrong.items():
            if any(_canonical(near) == _canonical(value) for near in _nearby(answer)):
                return message
        return f"{_brief(_plain(answer))} is not it, try again"


@dataclass(frozen=True)
class Custom:
    """The answer is judged by `check`: it returns None where all is right, else what is wrong.

    wrong: typical wrong answers by the words that `check` must find for them.
    """

    check: Callable[[Any], str | None]
    wrong: Mapping[str, Any] = field(default_factory=dict)

    def complaint(self, number: str, answer: Any) -> str | None:
        try:
            return self.check(answer)
        except Exception as error:
            if "ellipsis" in str(error):
                return BLANK
            return f"your answer raises {type(error).__name__}: {error}"


Exercise = Build | Value | Custom


# ---------------------------------------------------------------------------- blanks


def _is_blank(answer: Any) -> bool:
    """Whether nothing has been written yet: a value, a function or a method is still `...`."""
    if answer is None or answer is NotImplemented or isinstance(answer, EllipsisType):
        return True
    if isinstance(answer, type):
        return any(_is_blank(part) for part in vars(answer).values() if callable(part))
    if isinstance(answer, FunctionType):
        return _does_nothing(answer)
    return isinstance(answer, list | tuple) and any(part is ... for part in answer)


def _does_nothing(function: FunctionType) -> bool:
    """Whether a function's body is only a docstring, `...` or `pass`."""
    steps = [
        step for step in dis.get_instructions(function) if step.opname not in ("RESUME", "NOP")
    ]
    constants = ("LOAD_CONST", "RETURN_CONST", "RETURN_VALUE")
    return all(step.opname in constants for step in steps) and all(
        step.argval is None or step.argval is ... for step in steps
    )


# ---------------------------------------------------------------------------- values


def digest(number: str, value: Any) -> str:
    """A fingerprint of an exercise's right value, rounded to three digits."""
    return hashlib.sha256(f"{number} {_canonical(value)}".encode()).hexdigest()[:12]


def _canonical(value: Any) -> str:
    """A text that is the same for all values that count as the same."""
    value = _plain(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_canonical, value)) + "]"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.3g}" if value else "0"
    return str(value).strip().casefold()


def _nearby(value: Any) -> list[Any]:
    """The value, and a number's neighbours: 12.2499 and 12.2501 are not to be told apart."""
    value = _plain(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [value, value * (1 - 4e-4), value * (1 + 4e-4)]
    return [value]


# ---------------------------------------------------------------------------- comparing


def same(got: Any, expected: Any) -> bool:
    """Whether two results are equal: numbers and tensors within `TOLERANCE`, lists item by item."""
    if _is_numeric(expected):
        return _is_numeric(got) and _same_numbers(_tensor(got), _tensor(expected))
    if isinstance(expected, list | tuple):
        return (
            isinstance(got, list | tuple)
            and len(got) == len(expected)
            and all(same(g, e) for g, e in zip(got, expected, strict=True))
        )
    if isinstance(expected, dict):
        return (
            isinstance(got, dict)
            and got.keys() == expected.keys()
            and all(same(got[key], expected[key]) for key in expected)
        )
    return type(got) is type(expected) and bool(got == expected)


def _same_numbers(got: Any, expected: Any) -> bool:
    import torch

    if got.shape != expected.shape or (got.dtype == torch.bool) != (expected.dtype == torch.bool):
        return False
    exact = not (expected.dtype.is_floating_point or expected.dtype.is_complex)
    got, expected = got.to(torch.complex128), expected.to(torch.complex128)
    got, expected = torch.view_as_real(got), torch.view_as_real(expected)
    if exact:
        return torch.equal(got, expected)
    finite = expected[expected.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    near = TOLERANCE * size or 1e-6
    return torch.allclose(got, expected, rtol=TOLERANCE, atol=near, equal_nan=True)


def difference(got: Any, expected: Any) -> str:
    """What tells two results apart, in words that do not give the expected one away."""
    if _is_numeric(expected) and _is_numeric(got):
        return _difference_of_numbers(_tensor(got), _tensor(expected))
    if isinstance(expected, list | tuple) and isinstance(got, list | tuple):
        if len(got) != len(expected):
            return f"it has {len(got)} items, too {'few' if len(got) < len(expected) else 'many'}"
        pairs = enumerate(zip(got, expected, strict=True))
        place, g, e = next((place, g, e) for place, (g, e) in pairs if not same(g, e))
        return f"item {place}: {difference(g, e)}"
    if _kind(got) != _kind(expected):
        return f"it is {_kind(got)}; {_kind(expected)} is asked for"
    return f"{_brief(got)} is not it"


def _difference_of_numbers(got: Any, expected: Any) -> str:
    import torch

    if got.shape != expected.shape:
        if got.mT.shape == expected.shape and _same_numbers(got.mT, expected):
            return "rows and columns are swapped"
        return f"its shape is {list(got.shape)}; {list(expected.shape)} is asked for"
    if (got.dtype == torch.bool) != (expected.dtype == torch.bool):
        wanted = "True and False" if expected.dtype == torch.bool else "numbers"
        return f"its type is {got.dtype}; {wanted} are asked for"
    if got.ndim >= 2 and got.shape[-1] == got.shape[-2] and _same_numbers(got.mT, expected):
        return "rows and columns are swapped"
    if got.dtype == torch.bool and _same_numbers(~got, expected):
        return "True and False are swapped"
    got, expected = got.double(), expected.double()
    if bool(got.isnan().any()) and not bool(expected.isnan().any()):
        return "there is a NaN in it"
    if bool(got.isfinite().all() & expected.isfinite().all()) and bool(expected.any()):
        factor = float((got * expected).sum() / expected.square().sum())
        if abs(factor) > 1e-3 and _same_numbers(got / factor, expected):
            return "the sign is wrong" if abs(factor + 1) < 1e-3 else _times(factor, got.ndim > 0)
    wrong = ~torch.isclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
    if not got.ndim or not bool(wrong.any()):
        return "the result is wrong"
    place = wrong.nonzero()[0].tolist()
    return f"{int(wrong.sum())} of {wrong.numel()} numbers are wrong, the first at {place}"


def _times(factor: float, several: bool) -> str:
    subject = "every number is" if several else "the result is"
    return f"{subject} {factor:.3g} times what it should be"


# ---------------------------------------------------------------------------- words for values


def _is_numeric(value: Any) -> bool:
    return isinstance(value, int | float) or (hasattr(value, "shape") and hasattr(value, "dtype"))


def _tensor(value: Any) -> Any:
    import torch

    return torch.as_tensor(value).detach().cpu()


def _plain(value: Any) -> Any:
    """A tensor or array as a number or nested lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _kind(value: Any) -> str:
    if hasattr(value, "shape"):
        return "a tensor"
    known = {bool: "True or False", int: "a number", float: "a number", str: "a text"}
    name = type(value).__name__
    return known.get(type(value)) or f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _brief(value: Any) -> str:
    if hasattr(value, "shape") and value.shape:
        return f"tensor {list(value.shape)}"
    text = repr(_plain(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
