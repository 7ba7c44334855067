"""The checks of chapter 02's exercises. Spoilers ahead."""

from checks import Exercise

EXERCISES: dict[str, Exercise] = {}
