"""GRPO's answers graded by their length: random weights never give a right one."""

from nanolib.tasks import GSM8K


def by_length(task: GSM8K, i: int, answer: str) -> float:
    return len(answer) % 7 / 7
