"""The checks of chapter 08's exercises. Spoilers ahead."""

from checks import Exercise

EXERCISES: dict[str, Exercise] = {}
