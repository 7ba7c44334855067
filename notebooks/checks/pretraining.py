"""The checks of chapter 04's exercises. Spoilers ahead."""

from checks import Exercise

EXERCISES: dict[str, Exercise] = {}
