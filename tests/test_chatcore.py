"""ChatCORE against the figures that the original reported."""

import pytest

from nanolib.evals.choices import CHATCORE_PARTS as PARTS
from nanolib.evals.choices import chatcore

MID = {
    "arc_easy": 0.3561,
    "arc_challenge": 0.2875,
    "mmlu": 0.3111,
    "gsm8k": 0.0250,
    "humaneval": 0.0671,
}
SFT = {
    "arc_easy": 0.3876,
    "arc_challenge": 0.2807,
    "mmlu": 0.3151,
    "gsm8k": 0.0455,
    "humaneval": 0.0854,
}


def results(scores: dict[str, float]) -> dict[str, dict]:
    """As an evaluation records them, with scores that do not count beside those that do."""
    return {
        task: {"letters": score, "text": 0.9, "chance": 0.2502, "questions": 7}
        if score > 0.25
        else {"accuracy": score, "questions": 7, "samples": []}
        for task, score in scores.items()
    } | {"facts": {"accuracy": 0.99}}


@pytest.mark.parametrize(("scores", "reported"), [(MID, 0.0730), (SFT, 0.0884)])
def test_the_originals_figures_come_out(scores, reported):
    assert round(chatcore(results(scores)), 4) == reported


def test_guessing_is_zero_and_knowing_everything_one():
    for value, expected in ((0, 0.0), (1, 1.0)):
        scores = {t: {m: value if value else chance} for t, (m, chance) in PARTS.items()}
        assert chatcore(scores) == pytest.approx(expected)


def test_without_one_of_the_five_there_is_none():
    for task in PARTS:
        found = results(SFT)
        del found[task]
        assert chatcore(found) is None
    assert chatcore({}) is None
    assert chatcore(results(SFT) | {"mmlu": {"text": 0.3}}) is None
