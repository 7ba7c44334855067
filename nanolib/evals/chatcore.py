"""ChatCORE: CORE's counterpart for a talking model, as nanochat defined it in October 2025.

The mean centred accuracy over ARC-Easy, ARC-Challenge and MMLU by letter, GSM8K and HumanEval.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanolib.evals.core import centred

# Task -> which of its scores counts, and what a guesser gets.
PARTS = {
    "arc_easy": ("letters", 0.25),
    "arc_challenge": ("letters", 0.25),
    "mmlu": ("letters", 0.25),
    "gsm8k": ("accuracy", 0.0),
    "humaneval": ("accuracy", 0.0),
}


def chatcore(scores: Mapping[str, Mapping[str, Any]]) -> float | None:
    """ChatCORE of an evaluation's results (task -> its scores); None unless all five are there."""
    if not all(measure in scores.get(task, {}) for task, (measure, _) in PARTS.items()):
        return None
    parts = [centred(scores[task][measure], chance) for task, (measure, chance) in PARTS.items()]
    return sum(parts) / len(parts)
