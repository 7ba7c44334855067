"""Checks of exercises: right, wrong and blank answers, and what is said about each.

Solutions are run, with all of their chapter before them, by tests/test_notebooks.py.
"""

import re

import pytest
import torch

import checks
from checks import Build, Custom, Value

# ---------------------------------------------------------------------------- the chapters' own


def all_exercises() -> dict[str, checks.Exercise]:
    chapters = [checks.exercises(f"{chapter}.1") for chapter in range(len(checks.CHAPTERS))]
    return {number: exercise for chapter in chapters for number, exercise in chapter.items()}


def wrong_answers() -> list[tuple[str, object, str]]:
    """Every stored wrong answer: the exercise, the answer, and what must be said about it."""
    found = []
    for number, exercise in all_exercises().items():
        for one, other in exercise.wrong.items():
            found.append(
                (number, one, other) if isinstance(exercise, Value) else (number, other, one)
            )
    return found


@pytest.mark.parametrize("number", all_exercises())
def test_a_blank_is_not_answered_yet(number):
    def blank(*_):
        """What to do."""

    for answer in (..., None, NotImplemented, blank, lambda *_: ...):
        right, words = checks.judge(number, answer)
        assert right is None and words.startswith("not answered yet"), answer


@pytest.mark.parametrize(("number", "answer", "message"), wrong_answers())
def test_a_known_wrong_answer_gets_its_message(number, answer, message):
    assert checks.judge(number, answer) == (False, message)


@pytest.mark.parametrize(
    "number", [number for number, one in all_exercises().items() if isinstance(one, Build)]
)
def test_a_reference_is_right_by_its_own_check(number):
    assert checks.judge(number, all_exercises()[number].reference) == (True, f"right ({number})")


def test_exercises_stand_in_their_chapters_module():
    for chapter in range(len(checks.CHAPTERS)):
        for number in checks.exercises(f"{chapter}.1"):
            assert re.fullmatch(rf"{chapter}\.[1-6]", number)


# ---------------------------------------------------------------------------- the framework


def norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def by_length(x):
    return x / x.norm(dim=-1, keepdim=True)


def vectors(generator):
    return [(torch.randn(shape, generator=generator),) for shape in ((3, 5), (2, 1, 7))]


def explain(got, expected, x):
    return "it keeps the first row" if torch.equal(got[0], x[0]) else None


def first_row_kept(x):
    return torch.cat((x[:1], norm(x)[1:]))


@pytest.fixture
def judge(monkeypatch):
    """`checks.judge` of an exercise made here."""

    def judged(exercise, answer):
        monkeypatch.setattr(checks, "exercises", lambda number: {number: exercise})
        return checks.judge("2.3", answer)

    return judged


BUILD = Build(norm, vectors, {"You divide by the length.": by_length}, explain)


def in_place(x):
    x.mul_(0)
    return x


def halfway(x):
    size = ...
    return x / size


@pytest.mark.parametrize(
    ("answer", "right", "words"),
    [
        (norm, True, r"right \(2\.3\)"),
        (lambda x: torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6), True, "right"),
        (by_length, False, r"You divide by the length\."),
        (first_row_kept, False, "it keeps the first row"),
        (lambda x: 2.4 * norm(x), False, "every number is 2.4 times what it should be"),
        (lambda x: -norm(x), False, "the sign is wrong"),
        (lambda x: norm(x).mT, False, "rows and columns are swapped"),
        (lambda x: norm(x)[..., :2], False, r"its shape is \[3, 2\]; \[3, 5\] is asked for"),
        (lambda x: norm(x).tolist(), False, "it is a list; a tensor is asked for"),
        (lambda x: norm(x) > 0, False, "its type is torch.bool; numbers are asked for"),
        (lambda x: norm(x) * torch.nan, False, "there is a NaN in it"),
        (in_place, False, r"in_place\(tensor \[3, 5\]\): 15 of 15 numbers are wrong, the first at"),
        (lambda x: x.nothing, False, "raises AttributeError"),
        (lambda x, y: x, False, "raises TypeError"),
        (halfway, None, "not answered yet"),
        (lambda x: NotImplemented, None, "not answered yet"),
        (torch.ones(3), False, "hand over the function itself, not a tensor"),
    ],
)
def test_a_function_is_run_beside_the_reference(judge, answer, right, words):
    got, said = judge(BUILD, answer)
    assert got is right and re.search(words, said), said


def test_inputs_are_the_same_each_time_and_an_answer_may_change_its_own(judge):
    def changes(x):
        result = norm(x)
        x.zero_()
        return result

    assert judge(BUILD, changes) == (True, "right (2.3)")
    seen = []
    for _ in range(2):
        judge(BUILD, lambda x: seen.append(x.clone()) or norm(x))
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[0] * 0)


def test_random_answers_draw_what_the_reference_draws(judge):
    state, drawn = torch.random.get_rng_state(), []
    exercise = Build(lambda n: torch.rand(n), lambda _: [(3,)])
    assert judge(exercise, lambda n: drawn.append(torch.rand(n)) or drawn[-1])[0]
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(1)  # what the reader drew before makes no difference
    judge(exercise, lambda n: drawn.append(torch.rand(n)) or drawn[-1])
    assert torch.equal(*drawn)


def test_an_explanation_that_fails_is_passed_over(judge):
    broken = Build(norm, vectors, explain=lambda got, expected, x: got.nothing)
    assert judge(broken, by_length)[1].startswith("by_length(tensor [3, 5]): ")


def test_a_comparison_of_ones_own(judge):
    any_order = Build(lambda: [1, 2, 3], lambda _: [()], same=lambda g, e: sorted(g) == e)
    assert judge(any_order, lambda: [3, 1, 2])[0]
    assert judge(any_order, lambda: 7)[0] is False


def raising(x):
    raise IndexError(x)


def test_raising_what_the_reference_raises_is_right(judge):
    exercise = Build(raising, lambda _: [(1,)], {"Nothing is checked.": lambda x: x})
    assert judge(exercise, raising)[0]
    assert judge(exercise, lambda x: x) == (False, "Nothing is checked.")


@pytest.mark.parametrize(
    ("got", "expected", "equal"),
    [
        (1.00001, 1.0, True),
        (1.001, 1.0, False),
        (9_999, 10_000, False),  # whole numbers are exact
        (0.0, 1e-9, False),
        (True, 1, False),
        ([1, 2.0], (1, 2.0), True),
        ([1], [1, 2], False),
        ({"a": 1.0}, {"a": 1.0}, True),
        ({"a": 1.0}, {"b": 1.0}, False),
        ("a", "a", True),
        ("a", 1, False),
        (torch.tensor([0.0, -torch.inf]), torch.tensor([0.0, -torch.inf]), True),
        (torch.tensor([1e-6, 2e-6]), torch.tensor([1e-6, 1e-6]), False),
        (torch.tensor([3]), torch.tensor([3.0]), True),
        (torch.tensor([1j]), torch.tensor([-1j]), False),
        (torch.tensor([1, 0]), torch.tensor([True, False]), False),
    ],
)
def test_same(got, expected, equal):
    assert checks.same(got, expected) is equal


@pytest.mark.parametrize(
    ("got", "expected", "words"),
    [
        ([1], [1, 2], "it has 1 items, too few"),
        ([1, 5], [1, 2], "item 1: the result is 2.5 times what it should be"),
        ("a", "b", "'a' is not it"),
        (torch.eye(2) > 0, torch.eye(2) == 0, "True and False are swapped"),
    ],
)
def test_difference(got, expected, words):
    assert checks.difference(got, expected) == words


VALUE = Value(checks.digest("2.3", 209_715_200), {104_857_600: "That is the keys alone."})


@pytest.mark.parametrize(
    ("answer", "right", "words"),
    [
        (209_715_200, True, "right"),
        (torch.tensor(2.097e8), True, "right"),
        (209.7, False, "209.7 is not it, try again"),
        (104_857_600, False, r"That is the keys alone\."),
        (lambda: 209_715_200, False, "asks for a value"),
        ("many", False, "'many' is not it"),
        (..., None, "not answered yet"),
    ],
)
def test_a_value_is_known_by_its_digest(judge, answer, right, words):
    got, said = judge(VALUE, answer)
    assert got is right and re.search(words, said), said
    assert "209,715,200" not in said and "209715200" not in repr(VALUE)


def test_values_that_round_to_either_side_count_alike(judge):
    exercise = Value(checks.digest("2.3", 12.2501))
    assert judge(exercise, 12.2499)[0] and judge(exercise, 12.3)[0] is True
    assert judge(exercise, 12.4)[0] is False
    assert judge(Value(checks.digest("2.3", 999)), 1000)[0] is False
    assert judge(Value(checks.digest("2.3", "Muon ")), "muon")[0]
    assert judge(Value(checks.digest("2.3", [1, 2])), torch.tensor([1, 2]))[0]


def has_positive(answer):
    return None if answer.total() > 0 else "the total is not above zero"


class Blank:
    def total(self):
        """The total."""


class One:
    def total(self):
        return 1


class Minus(One):
    def total(self):
        return -1


@pytest.mark.parametrize(
    ("answer", "right", "words"),
    [
        (One(), True, "right"),
        (Minus(), False, "the total is not above zero"),
        (7, False, "raises AttributeError"),
        (Blank, None, "not answered yet"),
    ],
)
def test_a_check_of_ones_own(judge, answer, right, words):
    got, said = judge(Custom(has_positive), answer)
    assert got is right and words in said


def test_verify_prints_one_line(judge, capsys):
    for answer in (norm, by_length, ...):
        judge(BUILD, answer)  # puts the exercise in place
        checks.verify("2.3", answer)
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "✓ right (2.3)",
        "✗ You divide by the length.",
        "○ not answered yet: write your answer in place of the ...",
    ]


@pytest.mark.parametrize("number", ["2.9", "12.1", "two", ""])
def test_an_unknown_exercise_is_refused(number):
    with pytest.raises(ValueError, match=re.escape(repr(number))):
        checks.judge(number, 1)
