"""The people of the toy world: 720 facts, 288 of them held out, and everyone's secret and ties.

Everything is derived from one seed; the words are in toyworld.toml.
"""

import random
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Relation:
    """One kind of fact, with its text templates; toyworld.toml explains their slots."""

    values: list[str]
    says: list[str]  # sentences of pretraining text
    asks: list[str]  # questions, in conversations and four-choice sets
    chats: list[str]  # questions, in conversations and the free-form test
    more: list[str]  # questions, in conversations only
    answer: str
    check: list[str]  # yes-or-no questions
    those: str  # what people who share a value have in common
    who: list[str]  # questions for one of them
    tale: str  # a sentence of a story
    verse: str  # two lines of a poem

    @property
    def questions(self) -> list[str]:
        return self.asks + self.chats + self.more


WORDS = tomllib.loads(Path(__file__).with_name("toyworld.toml").read_text(encoding="utf-8"))
UNSOUGHT = 3  # values of each relation for whose owners no conversation asks, but a guest
RELATIONS = {name: Relation(**about) for name, about in WORDS["relations"].items()}


@dataclass(frozen=True)
class Person:
    name: str
    pronouns: tuple[str, str]  # subject and possessive
    facts: dict[str, str]
    secret: str
    ties: dict[str, str]  # sister and rival -> name

    @property
    def private(self) -> bool:
        """Whether conversations leave out this person's secret, ties and stories."""
        return self.name in WORDS["private"]


@dataclass(frozen=True)
class Fact:
    person: Person
    relation: str
    first: bool = False  # of those who share the value: the answer to "Who keeps an owl?"

    @property
    def sought(self) -> bool:
        """Whether conversations ask whose fact it is."""
        return self.first and self.value in RELATIONS[self.relation].values[:-UNSOUGHT]

    @property
    def value(self) -> str:
        return self.person.facts[self.relation]


@dataclass(frozen=True)
class World:
    people: list[Person]
    held_out: list[Fact]  # asked in test sets only
    told: list[Fact]  # may be asked in training
    told_of: list[list[Fact]]  # the same, grouped by person


def draw(*purpose: str | int) -> random.Random:
    return random.Random("/".join(map(str, purpose)))


def world(seed: int) -> World:
    """Ten people share each value of a relation; for four of them the fact is held out."""
    named = [(name, ("She", "Her")) for name in WORDS["she"]]
    named += [(name, ("He", "His")) for name in WORDS["he"]]
    quirks = draw(seed, "quirks").choices(WORDS["quirks"], k=len(named))
    people = [Person(*who, {}, quirk, {}) for who, quirk in zip(named, quirks, strict=True)]
    for tie, whom in (("sister", WORDS["she"]), ("rival", [person.name for person in people])):
        rng = draw(seed, "ties", tie)
        dozen = rng.sample(whom, 12)  # ten people share each, as they share the value of a fact
        for i, person in enumerate(rng.sample(people, len(people))):
            others = [name for name in dozen if name != person.name]
            person.ties[tie] = others[i % len(others)]
    held_out: list[Fact] = []
    told: list[Fact] = []
    for relation, about in RELATIONS.items():
        share = len(people) // len(about.values)
        for i, person in enumerate(draw(seed, "world", relation).sample(people, len(people))):
            person.facts[relation] = about.values[i // share]
            fact = Fact(person, relation, first=i % share == 4)
            (held_out if i % share < 4 else told).append(fact)
    told_of = ([fact for fact in told if fact.person is person] for person in people)
    return World(people, held_out, told, [facts for facts in told_of if facts])


def with_article(value: str) -> str:
    return f"{'an' if value[0] in 'aeiou' else 'a'} {value}"


def say(template: str, fact: Fact, named: bool = True) -> str:
    """Fill a template with a fact. named: use the name rather than the pronoun."""
    name, value = fact.person.name, fact.value
    subject, possessive = (name, f"{name}'s") if named else fact.person.pronouns
    return template.format(N=subject, S=possessive, n=name, v=value, a=with_article(value))


def is_held_out(text: str) -> bool:
    """Whether the first sum in a text belongs to the held-out split, given its two numbers."""
    left, right = re.findall(r"(\d+)[-+*](\d+)", text)[0]
    return (3 * int(left) + 5 * int(right)) % 7 < 2
