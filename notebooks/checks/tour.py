"""The checks of chapter 00's exercises. Spoilers ahead."""

from checks import Exercise

EXERCISES: dict[str, Exercise] = {}
