"""The checks of chapter 09's exercises. Spoilers ahead."""

from checks import Exercise

EXERCISES: dict[str, Exercise] = {}
