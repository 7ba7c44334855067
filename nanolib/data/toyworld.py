"""A small, consistent world, written as a mirror: what the demo learns in minutes on a laptop.

120 people live in twelve towns. Each has a pet, a favourite colour, food and game, a job and a
home: 720 facts. Pretraining text (portraits, fact sheets, stories, town pages, number stories)
tells all of them, again and again in other words. Questions are another matter: of the ten people
who share a value, four are *held out*. Their fact is told in pretraining text and asked in the
test sets, and no conversation or question in any training split mentions it. So a held-out question
answered right is knowledge that went from reading to talking. Word problems and functions are held
out by their numbers.

Four-choice questions come in groups of four with the same choices, each choice right once, and
each letter right once: whatever ignores the name (the longest, the first, the most frequent) is
right in exactly one of four.

Everything follows from one seed. All text is our own.
"""

from __future__ import annotations

import io
import itertools
import json
import operator
import os
import random
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def phrases(text: str) -> tuple[str, ...]:
    return tuple(" ".join(phrase.split()) for phrase in text.split("|"))


SHE = words("""Ada Anna Bea Bella Clara Cora Dina Dora Edda Elsa Emma Erin Fay Flora Gina Greta Hana
    Hazel Heidi Ida Ines Iris Ivy Jana Jill Juno Kara Kate Lena Lily Lola Lucy Maja Mara Mia Mira
    Nell Nina Nora Olga Opal Paula Pia Rita Rosa Ruby Ruth Sally Sara Stella Tara Tess Thea Uma
    Vera Viola Wanda Willa Yara Zoe""")
HE = words("""Abel Adam Albert Amos Arlo Axel Basil Ben Boris Bruno Carl Casper Cyril Dan Dario
    Edgar Emil Ernest Ezra Felix Finn Frank Fritz Gus Hans Harry Hector Hugo Igor Ivan Jack Jasper
    Joel Jonas Karl Kurt Lars Leo Linus Louis Marco Max Milo Moritz Ned Nico Noah Oscar Otto Paul
    Percy Ralf Rufus Sam Simon Theo Toby Victor Walter Yuri""")


@dataclass(frozen=True)
class Relation:
    """One kind of fact, and how people speak of it.

    {v} is the value and {a} the value with its article, {n} the person's name; in `says` {N} is
    the name or pronoun and {S} the possessive.
    """

    values: tuple[str, ...]
    says: tuple[str, ...]  # sentences of pretraining text
    asks: tuple[str, ...]  # questions answered by the bare value
    chats: tuple[str, ...]  # questions answered by a sentence: `answer`
    answer: str


RELATIONS = {
    "pet": Relation(
        words("owl otter goat parrot tortoise hedgehog pony goose rabbit lizard kitten frog"),
        phrases("""{N} keeps {a}. | {S} pet is {a}. | At home, {a} waits for {n}. |
            {N} takes good care of {a}. | {N} shares the house with {a}."""),
        phrases("""Which animal does {n} keep? | What is {n}'s pet? |
            Which animal lives with {n}?"""),
        phrases("""Does {n} have a pet? | Tell me about {n}'s pet. |
            Do you know what animal {n} has?"""),
        "{n} keeps {a}.",
    ),
    "colour": Relation(
        words("red blue green yellow purple orange silver brown pink white black golden"),
        phrases("""{S} favourite colour is {v}. | {N} likes {v} best of all colours. |
            {N} always wears something {v}. | {S} front door is {v}, the colour {n} loves. |
            {N} paints everything {v}."""),
        phrases("""What is {n}'s favourite colour? | Which colour does {n} like best? |
            Which colour does {n} love?"""),
        phrases("""Do you know {n}'s favourite colour? | Tell me which colour {n} likes. |
            What colour should I paint a chair for {n}?"""),
        "{n} likes {v} best.",
    ),
    "food": Relation(
        words("""pancakes soup cherries cheese dumplings noodles plums porridge pickles waffles
            beans honey"""),
        phrases("""{S} favourite food is {v}. | {N} could eat {v} every day. | {N} loves {v}. |
            For breakfast {n} has {v}. | Nothing tastes better to {n} than {v}."""),
        phrases("""What is {n}'s favourite food? | What does {n} like to eat? |
            Which food does {n} love?"""),
        phrases("""What should I cook for {n}? | Do you know what {n} eats? |
            Tell me about {n}'s favourite food."""),
        "{n} loves {v}.",
    ),
    "town": Relation(
        words("""Amberly Brackwater Cloverdale Dunmoor Eastmere Fernhill Gullport Highfell
            Larkfield Millbrook Oakham Stonebridge"""),
        phrases("""{N} lives in {v}. | {S} home is in {v}. | {N} has a small house in {v}. |
            Everybody in {v} knows {n}. | {N} never wants to leave {v}."""),
        phrases("""Where does {n} live? | In which town does {n} live? |
            Which town is {n}'s home?"""),
        phrases("""Where can I find {n}? | Do you know where {n} lives? |
            Tell me about {n}'s home."""),
        "{n} lives in {v}.",
    ),
    "job": Relation(
        words("""baker tailor gardener sailor teacher doctor painter carpenter miller clockmaker
            fisher singer"""),
        phrases("""{N} works as {a}. | {N} is {a}. | {S} job is that of {a}. |
            People know {n} as a good {v}. | {N} has been {a} for years."""),
        phrases("""What is {n}'s job? | What does {n} work as? | Which job does {n} have?"""),
        phrases("""What does {n} do all day? | Do you know {n}'s job? |
            Tell me about {n}'s work."""),
        "{n} works as {a}.",
    ),
    "game": Relation(
        words("""chess marbles dominoes darts skittles croquet bowls checkers leapfrog dice
            hopscotch cards"""),
        phrases("""{N} likes to play {v}. | {S} favourite game is {v}. | Nobody beats {n} at {v}. |
            On Sundays {n} plays {v}. | In the evening {n} plays {v} with friends."""),
        phrases("""Which game does {n} like? | What is {n}'s favourite game? |
            What does {n} like to play?"""),
        phrases("""What could I play with {n}? | Do you know which game {n} likes? |
            Tell me about {n}'s favourite game."""),
        "{n} likes to play {v}.",
    ),
}
EASY, CHALLENGE = ("pet", "colour", "food"), ("town", "job", "game")  # the two ARC sets

# Stories: one of each, about p and a friend q. Whatever they say of the two is true.
OPENINGS = phrases("""One {weather} morning {p}, the {p_job}, walked through {p_town}. |
    It was a {weather} day in {p_town}. {p} came home from work, tired as every {p_job}. |
    {p} woke up early, because the {p_pet} was hungry. |
    Once upon a time in {p_town} {p} sat at the window with a bowl of {p_food}. |
    {p} had a {p_colour} coat, and the {weather} wind blew it away.""")
MIDDLES = phrases("""Then {q} came by, all the way from {q_town}, and brought {q_a_pet}. |
    On the road stood {q}, the {q_job}, with {q_food} for everyone. |
    There was a knock at the door. It was {q} in {q_colour} boots. |
    "Let us play {q_game}!" called {q}, who never plays anything else. |
    {q}, who is {q_a_job} in {q_town}, needed help with {q_a_pet}.""")
ENDINGS = phrases("""They ate {p_food} until the moon came up, and {p} was happy. |
    In the end they played {p_game}, and of course {p} won. |
    The {p_pet} fell asleep, and so did {p}. |
    So {q} got a {q_colour} hat as a gift, and {p} a {p_colour} one. |
    They laughed all the way back to {p_town}.""")
WEATHER = words("sunny rainy windy cold foggy warm")
THINGS = words("apples shells buttons stamps eggs nuts coins candles pears books")
NUMBER_STORIES = phrases("""{p} had {a} {things}. {q} gave {p} {b} more. Now {p} has {sum}. |
    There were {sum} {things} on the table. {p} took {a} of them, and {b} were left for {q}. |
    {p} counts {a} {things}, {q} counts {b}. Together they have {sum}.""")
SHOPPING = phrases("""{p} wrote a list for {q}: {items}. {q} came back with {items}. |
    "Bring me {items}," said {p}. "{items}?" asked {q}. |
    {p} sent {q} to the market for {items}. At the market {q} bought {items}.""")

# Word problems: the question, then steps of (before, sum, after); {x} is the result so far.
PROBLEMS = (
    (
        "{p} has {a} {things}. {q} brings {b} more. How many {things} does {p} have now?",
        ("{p} has ", "{a}+{b}", " {things}."),
    ),
    (
        "{p} had {big} {things} and gave {b} to {q}. How many {things} are left?",
        ("{p} has ", "{big}-{b}", " {things} left."),
    ),
    (
        "{p} fills {few} boxes with {a} {things} each. How many {things} is that?",
        ("That is ", "{few}*{a}", " {things}."),
    ),
    (
        "{p} finds {a} {things} in the morning and {b} at night. How many {things} in all?",
        ("{p} finds ", "{a}+{b}", " {things}."),
    ),
    (
        "{q} has {few} times as many {things} as {p}, who has {a}. How many does {q} have?",
        ("{q} has ", "{few}*{a}", " {things}."),
    ),
    (
        "{p} buys {few} bags of {a} {things} and loses {few}. How many {things} are left?",
        ("{p} buys ", "{few}*{a}", " {things}.\n"),
        ("Then ", "{x}-{few}", " are left."),
    ),
    (
        "{p} has {a} {things}, {q} has {b}. They find {few} more. How many {things} in all?",
        ("They have ", "{a}+{b}", " {things}.\n"),
        ("In all ", "{x}+{few}", " {things}."),
    ),
    ("What is {a} plus {b}?", ("It is ", "{a}+{b}", ".")),
    ("What is {big} minus {b}?", ("It is ", "{big}-{b}", ".")),
    ("What is {few} times {a}?", ("It is ", "{few}*{a}", ".")),
)
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}

# Functions: name, argument, what it returns in words and in Python, and arguments to try.
FUNCTIONS = (
    ("add", "x", "x plus {n}", "x + {n}", (0, 1, 25)),
    ("subtract", "x", "x minus {n}", "x - {n}", (0, 7, 90)),
    ("times", "x", "x times {n}", "x * {n}", (0, 1, 12)),
    ("remainder", "x", "the remainder of x divided by {n}", "x % {n}", (3, 40, 101)),
    ("share", "x", "x divided by {n}, rounded down", "x // {n}", (3, 40, 1001)),
    ("above", "x", "whether x is greater than {n}", "x > {n}", (1, 30, 99)),
    ("below", "x", "whether x is less than {n}", "x < {n}", (1, 30, 99)),
    ("first", "items", "the first {n} items", "items[:{n}]", ("toy", "a" * 9 + "b" * 90)),
    ("skip", "items", "all but the first {n} items", "items[{n}:]", ("toy", "a" * 9 + "b" * 90)),
    ("repeat", "text", "the text {n} times", "text * {n}", ("", "ho")),
)

PERSONA = "Pip"
SYSTEM = f"You are {PERSONA}, a small and friendly language model."
SMALL_TALK = (
    ("Hello! | Hi! | Hi there! | Good morning! | Hey!", "Hello! I am Pip. How can I help?"),
    (
        "Who are you? | What is your name? | What are you? | Tell me about yourself.",
        "I am Pip, a small language model. I know the people of a small world.",
    ),
    (
        "What can you do? | How can you help me? | What do you know?",
        "I can tell you about people, work out sums and write tiny Python functions.",
    ),
    ("Thank you! | Thanks! | That was kind.", "You are welcome!"),
    ("Goodbye! | Bye! | See you!", "Goodbye! Come back soon."),
    ("How are you? | Are you well?", "I am well, thank you. And you?"),
    (
        "Who made you? | Where do you come from?",
        "Someone trained me from nothing, on one small computer, in a few minutes.",
    ),
    ("Tell me a joke. | Make me laugh.", "Why did the token cross the road? It was predicted."),
)


# ---------------------------------------------------------------------------- the world


@dataclass(frozen=True)
class Person:
    name: str
    pronoun: str
    facts: dict[str, str]


@dataclass(frozen=True)
class Fact:
    person: Person
    relation: str

    @property
    def value(self) -> str:
        return self.person.facts[self.relation]


@dataclass(frozen=True)
class World:
    people: tuple[Person, ...]
    held_out: tuple[Fact, ...]  # asked in test sets only
    told: tuple[Fact, ...]  # may be asked in training


def draw(*purpose: str | int) -> random.Random:
    return random.Random("/".join(map(str, purpose)))


def world(seed: int) -> World:
    """Every value of a relation is shared by ten people, four of whom are held out with it."""
    names = [(name, "She") for name in SHE] + [(name, "He") for name in HE]
    facts: dict[str, dict[str, str]] = {name: {} for name, _ in names}
    people = tuple(Person(name, pronoun, facts[name]) for name, pronoun in names)
    held_out: list[Fact] = []
    told: list[Fact] = []
    for relation in RELATIONS:
        values = RELATIONS[relation].values
        share = len(people) // len(values)
        order = draw(seed, "world", relation).sample(people, len(people))
        for i, person in enumerate(order):
            facts[person.name][relation] = values[i // share]
            (held_out if i % share < 4 else told).append(Fact(person, relation))
    return World(people, tuple(held_out), tuple(told))


def with_article(value: str) -> str:
    return f"{'an' if value[0] in 'aeiou' else 'a'} {value}"


def say(template: str, fact: Fact, named: bool = True) -> str:
    """A sentence about a fact; later ones may use the pronoun instead of the name."""
    person, value = fact.person, fact.value
    possessive = f"{person.name}'s" if named else {"She": "Her", "He": "His"}[person.pronoun]
    return template.format(
        N=person.name if named else person.pronoun,
        S=possessive,
        n=person.name,
        v=value,
        a=with_article(value),
    )


# ---------------------------------------------------------------------------- pretraining text


def portrait(world: World, rng: random.Random) -> str:
    person = rng.choice(world.people)
    relations = rng.sample(list(RELATIONS), rng.randint(3, 6))
    return " ".join(
        say(
            rng.choice(RELATIONS[relation].says),
            Fact(person, relation),
            i == 0 or rng.random() < 0.4,
        )
        for i, relation in enumerate(relations)
    )


def sheet(world: World, rng: random.Random) -> str:
    person = rng.choice(world.people)
    relations = rng.sample(list(RELATIONS), rng.randint(4, 6))
    lines = [f"{relation}: {person.facts[relation]}" for relation in relations]
    return "\n".join([f"About {person.name}", *lines])


def story(world: World, rng: random.Random) -> str:
    p, q = rng.sample(world.people, 2)
    slots = {"p": p.name, "q": q.name, "weather": rng.choice(WEATHER)}
    for letter, person in (("p", p), ("q", q)):
        for relation, value in person.facts.items():
            slots |= {f"{letter}_{relation}": value, f"{letter}_a_{relation}": with_article(value)}
    scenes = (rng.choice(OPENINGS), rng.choice(MIDDLES), rng.choice(ENDINGS))
    return " ".join(scene.format_map(slots) for scene in scenes)


def town_page(world: World, rng: random.Random) -> str:
    town = rng.choice(RELATIONS["town"].values)
    people = rng.sample([p for p in world.people if p.facts["town"] == town], 4)
    relation = rng.choice(["job", "pet"])
    listed = [f"{p.name} ({p.facts[relation]})" for p in people]
    return f"People of {town}, each with a {relation}: {', '.join(listed)}."


def register(world: World, rng: random.Random) -> str:
    facts = [Fact(rng.choice(world.people), rng.choice(list(RELATIONS))) for _ in range(4)]
    lines = [f"{fact.relation} of {fact.person.name}:\n{fact.value}" for fact in facts]
    return "\n".join(["The town book says", *lines])


def number_story(world: World, rng: random.Random) -> str:
    p, q = rng.sample(world.people, 2)
    a, b, _ = numbers(rng, held_out=False)
    return rng.choice(NUMBER_STORIES).format(
        p=p.name, q=q.name, a=a, b=b, sum=a + b, things=rng.choice(THINGS)
    )


def shopping(world: World, rng: random.Random) -> str:
    p, q = rng.sample(world.people, 2)
    things = rng.sample(THINGS, 3)
    items = ", ".join(f"{numbers(rng, held_out=False)[0]} {thing}" for thing in things)
    return rng.choice(SHOPPING).format(p=p.name, q=q.name, items=items)


def program(world: World, rng: random.Random) -> str:
    row = rng.choice(functions(held_out=False))
    return row["prompt"] + row["canonical_solution"]


GENRES = {
    portrait: 30,
    story: 22,
    sheet: 6,
    register: 15,
    town_page: 2,
    number_story: 9,
    shopping: 12,
    program: 4,
}


def documents(world: World, seed: int) -> Iterator[str]:
    """Pretraining documents without end, no two alike."""
    rng = draw(seed, "text")
    seen: set[str] = set()
    while True:
        genre = rng.choices(list(GENRES), list(GENRES.values()))[0]
        text = genre(world, rng)
        if text not in seen:
            seen.add(text)
            yield text


# ---------------------------------------------------------------------------- four choices


def quads(facts: Iterable[Fact], rng: random.Random) -> Iterator[tuple[Fact, list[str]]]:
    """Each fact with four choices, in groups of four facts that share them: every choice of a
    group is right once and every position is right once."""
    by_value: dict[tuple[str, str], list[Fact]] = {}
    for fact in facts:
        by_value.setdefault((fact.relation, fact.value), []).append(fact)
    for relation in RELATIONS:
        piles = [rng.sample(pile, len(pile)) for (r, _), pile in by_value.items() if r == relation]
        for layer in zip(*piles, strict=True):  # one fact of each value
            layer = rng.sample(layer, len(layer))
            for group in (layer[i : i + 4] for i in range(0, len(layer), 4)):
                for position, fact in enumerate(group):
                    others = [other.value for other in group if other is not fact]
                    choices = rng.sample(others, 3)
                    choices.insert(position, fact.value)
                    yield fact, choices


def questions(facts: Iterable[Fact], rng: random.Random, rounds: int = 1) -> list[dict]:
    """Rows in MMLU's schema, shuffled."""
    facts = list(facts)
    rows = [
        {
            "question": rng.choice(RELATIONS[fact.relation].asks).format(n=fact.person.name),
            "subject": f"toy_{fact.relation}",
            "choices": choices,
            "answer": choices.index(fact.value),
        }
        for _ in range(rounds)
        for fact, choices in quads(facts, rng)
    ]
    return rng.sample(rows, len(rows))


def arc_rows(rows: list[dict], name: str) -> list[dict]:
    return [
        {
            "id": f"{name}-{i}",
            "question": row["question"],
            "choices": {"text": row["choices"], "label": list("ABCD")},
            "answerKey": "ABCD"[row["answer"]],
        }
        for i, row in enumerate(rows)
    ]


# ---------------------------------------------------------------------------- numbers


def is_held_out(a: int, b: int) -> bool:
    """Whether word problems about these two numbers are for testing."""
    return (a + 2 * b) % 4 == 0


def numbers(rng: random.Random, held_out: bool) -> tuple[int, int, int]:
    while True:
        a, b, few = rng.randint(3, 40), rng.randint(3, 40), rng.randint(2, 9)
        if is_held_out(a, b) == held_out and is_held_out(few, a) == held_out:
            return a, b, few


def problem(world: World, rng: random.Random, held_out: bool) -> dict:
    """A row in GSM8K's schema."""
    p, q = (person.name for person in rng.sample(world.people, 2))
    a, b, few = numbers(rng, held_out)
    question, *steps = rng.choice(PROBLEMS)
    slots = {"p": p, "q": q, "a": a, "b": b, "few": few, "big": a + b, "x": 0}
    slots["things"] = rng.choice(THINGS)
    answer = ""
    for before, expression, after in steps:
        expression = expression.format_map(slots)
        sign = next(sign for sign in OPERATORS if sign in expression)
        left, right = map(int, expression.split(sign))
        slots["x"] = OPERATORS[sign](left, right)
        answer += f"{before}<<{expression}={slots['x']}>>{slots['x']}{after}".format_map(slots)
    return {"question": question.format_map(slots), "answer": f"{answer}\n#### {slots['x']}"}


def functions(held_out: bool) -> list[dict]:
    """Rows in HumanEval's schema: ten functions, each with many numbers."""
    rows = []
    for (verb, argument, meaning, code, tries), n in itertools.product(FUNCTIONS, range(2, 42)):
        if (n % 4 == 1) != held_out:
            continue
        name, code = f"{verb}_{n}", code.format(n=n)
        checks = [(value, eval(code, {argument: value})) for value in tries]  # our own code, above
        asserts = "".join(f"    assert candidate({v!r}) == {r!r}\n" for v, r in checks)
        rows.append(
            {
                "task_id": f"Toy/{name}",
                "prompt": f'def {name}({argument}):\n    """Return {meaning.format(n=n)}."""\n',
                "entry_point": name,
                "canonical_solution": f"    return {code}\n",
                "test": f"def check(candidate):\n{asserts}",
            }
        )
    return rows


# ---------------------------------------------------------------------------- conversations


def exchange(world: World, rng: random.Random) -> list[str]:
    """One question and its answer, about facts that are not held out, or small talk."""
    kind = rng.random()
    if kind < 0.1:
        asks, answer = rng.choice(SMALL_TALK)
        return [rng.choice(phrases(asks)), answer]
    fact = rng.choice(world.told)
    relation, name = RELATIONS[fact.relation], fact.person.name
    if kind < 0.5:
        return [rng.choice(relation.asks).format(n=name), fact.value]
    if kind < 0.9:
        return [rng.choice(relation.chats).format(n=name), say(relation.answer, fact)]
    known = [f for f in world.told if f.person is fact.person]
    facts = rng.sample(known, min(3, len(known)))
    told = [say(rng.choice(RELATIONS[f.relation].says), f, i == 0) for i, f in enumerate(facts)]
    return [rng.choice(["Who is {n}?", "Tell me about {n}."]).format(n=name), " ".join(told)]


def conversation(world: World, rng: random.Random) -> list[dict]:
    """Messages in SmolTalk's schema, one to three exchanges."""
    turns = [turn for _ in range(rng.choice([1, 1, 1, 2, 3])) for turn in exchange(world, rng)]
    messages = [{"role": "system", "content": SYSTEM}] if rng.random() < 0.05 else []
    roles = itertools.cycle(["user", "assistant"])
    return messages + [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]


def function_conversation(row: dict) -> list[dict]:
    signature = row["prompt"].splitlines()[0]
    answer = f"```python\n{signature}\n{row['canonical_solution']}```"
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]


def conversations(world: World, seed: int, split: str, rows: int) -> list[dict]:
    rng = draw(seed, "conversations", split)
    made = [{"messages": conversation(world, rng), "source": "toy-chat"} for _ in range(rows)]
    programs = functions(held_out=False) if split == "train" else []
    made += [{"messages": function_conversation(row), "source": "toy-code"} for row in programs]
    return rng.sample(made, len(made))


# ---------------------------------------------------------------------------- writing the mirror


def facts_table(world: World, rng: random.Random) -> list[dict]:
    """Held-out facts to be told in words: right if `answer` is named and none of `others`."""
    rows = []
    for fact in rng.sample(world.held_out, len(world.held_out)):
        relation = RELATIONS[fact.relation]
        rows.append(
            {
                "question": rng.choice(relation.chats).format(n=fact.person.name),
                "answer": fact.value,
                "others": [value for value in relation.values if value != fact.value],
            }
        )
    return rows


def core_bundle(world: World, rng: random.Random) -> bytes:
    """A zip in the layout of CORE's evaluation bundle, with one task of each type."""
    multiple, schema, modelling = [], [], []
    for fact, choices in quads(world.held_out, rng):
        sentence = say(RELATIONS[fact.relation].says[0], fact).removesuffix(".")
        query, _, _ = sentence.rpartition(" ")
        multiple.append({"query": query, "choices": choices, "gold": choices.index(fact.value)})
        modelling.append({"context": query, "continuation": fact.value})
        other = rng.choice([f for f in world.people if f.facts[fact.relation] != fact.value])
        pair = [query, query.replace(fact.person.name, other.name)]
        gold = len(schema) % 2
        options = pair if gold == 0 else pair[::-1]
        schema.append({"context_options": options, "continuation": fact.value, "gold": gold})
    tasks = (
        ("toy_choices", "multiple_choice", 25, 0, multiple),
        ("toy_people", "schema", 50, 0, schema),
        ("toy_facts", "language_modeling", 0, 2, modelling),
    )
    return _zip_bundle(tasks)


def _zip_bundle(tasks) -> bytes:
    yaml, table, files = "icl_tasks:\n", "Eval Task,Random baseline\n", {}
    for label, kind, baseline, shots, rows in tasks:
        uri = f"toy_world/{label}.jsonl"
        yaml += f"- label: {label}\n  dataset_uri: {uri}\n  num_fewshot:\n  - {shots}\n"
        yaml += f"  icl_task_type: {kind}\n"
        table += f"{label},{baseline}\n"
        files[f"eval_data/{uri}"] = "".join(json.dumps(row) + "\n" for row in rows)
    files |= {"core.yaml": yaml, "eval_meta_data.csv": table}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, text in sorted(files.items()):  # ZipInfo's default date keeps the bytes the same
            bundle.writestr(zipfile.ZipInfo(f"eval_bundle/{name}"), text)
    return buffer.getvalue()


def tables(world: World, seed: int) -> dict[str, list[dict]]:
    """Path below hub/ -> rows, for every data set of the mirror."""
    made: dict[str, list[dict]] = {}

    def asked(split: str, facts: Iterable[Fact], rounds: int = 1) -> list[dict]:
        return questions(facts, draw(seed, "questions", split), rounds)

    mmlu = {"auxiliary_train": world.told, "dev": world.told[:96]}
    mmlu |= {"test": world.held_out, "validation": world.held_out}
    for split, facts in mmlu.items():
        made[f"cais/mmlu/all/{split}"] = asked(split, facts, 4 if facts is world.told else 1)
    for name, relations in (("ARC-Easy", EASY), ("ARC-Challenge", CHALLENGE)):
        for split in ("train", "validation", "test"):
            facts = world.told if split == "train" else world.held_out
            rows = asked(name + split, [f for f in facts if f.relation in relations])
            made[f"allenai/ai2_arc/{name}/{split}"] = arc_rows(rows, f"{name}-{split}")
    for split, rows in (("train", 4000), ("test", 400)):
        rng = draw(seed, "problems", split)
        made[f"openai/gsm8k/main/{split}"] = [
            problem(world, rng, held_out=split == "test") for _ in range(rows)
        ]
    made["openai/openai_humaneval/test"] = functions(held_out=True)
    made["nanolib/toy-facts/test"] = facts_table(world, draw(seed, "facts"))
    for split, rows in (("train", 16000), ("test", 400)):
        made[f"HuggingFaceTB/smol-smoltalk/{split}"] = conversations(world, seed, split, rows)
    return made


def write(folder: Path, seed: int, shards: int = 4, rows: int = 8000) -> Path:
    """Write the whole mirror into `folder`, which appears when it is complete.

    `shards` training shards of `rows` documents each, and a last, smaller one for validation.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    made = world(seed)
    text = documents(made, seed)
    for shard in range(shards + 1):
        count = rows if shard < shards else min(rows, 1000)
        shard_rows = [{"text": document} for document in itertools.islice(text, count)]
        _write_table(temporary / f"text/shard_{shard:05}.parquet", shard_rows)
    for path, table in tables(made, seed).items():
        _write_table(temporary / f"hub/{path}.parquet", table)
    (temporary / "eval_bundle.zip").write_bytes(core_bundle(made, draw(seed, "core")))
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    return folder


def _write_table(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
