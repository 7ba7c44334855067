"""Conversations in the toy world between a guest and Pip, the assistant.

Pip tells facts that are not held out, in sentences that begin with the name, so that a later
pronoun has its referent nearby. Follow-ups mostly ask for facts not told yet, since others could be
copied. Pip knows neither strangers nor the outside world. Sums are annotated as in GSM8K. Secrets,
ties and stories are told of everyone but the private people, about whom a guest's test asks.
"""

import random
import re
from collections.abc import Callable

from nanolib.data import toypeople
from nanolib.data.toypeople import RELATIONS, WORDS, Fact, World, say

LENGTHS = [1, 1, 2, 3, 4]  # exchanges per conversation
FOLLOW_UPS = 0.5  # share of follow-ups after an exchange about a person
REPEATS = 0.2  # share of facts already told that may be asked again
KNOWN = [*WORDS["she"], *WORDS["he"]]
SIGNS = {"+": ["plus", "+"], "-": ["minus", "-"], "*": ["times", "*", "x"]}

# Question ({n} is the person's name), answer, and facts told; None if it is about nobody.
Exchange = tuple[str, str, list[Fact] | None]
Kind = Callable[[random.Random, list[Fact]], Exchange]


def turns(world: World, rng: random.Random) -> list[str]:
    """One conversation: questions and answers alternate."""
    said: list[str] = []
    left: list[Fact] = []  # facts that a follow-up may ask about
    for _ in range(rng.choice(LENGTHS)):
        follows = bool(left) and rng.random() < FOLLOW_UPS
        facts = left if follows else rng.choice(world.told_of)
        kinds = ABOUT_PEOPLE if follows else KINDS if said else OPENINGS
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        kind = sentence if kind in PERSONAL and facts[0].person.private else kind
        question, answer, told = kind(rng, facts)
        question = pronominal(question, facts[0].person) if follows else question
        said += [question.replace("{n}", facts[0].person.name), answer]
        spoken_of = facts if told is not None else []
        left = [fact for fact in spoken_of if fact not in (told or ()) or rng.random() < REPEATS]
    return said


def pronominal(question: str, person: toypeople.Person) -> str:
    """Replace {n} by pronouns; before the final punctuation it is an object (her, him)."""
    subject, possessive = (word.lower() for word in person.pronouns)
    question = question.replace("{n}'s", possessive)
    question = re.sub(r"\{n\}(?=[.?])", "her" if subject == "she" else "him", question)
    return question.replace("{n}", subject)


# ---------------------------------------------------------------------------- about a person


def bare(rng: random.Random, facts: list[Fact]) -> Exchange:
    fact = rng.choice(facts)
    return rng.choice(RELATIONS[fact.relation].asks), fact.value, [fact]


def sentence(rng: random.Random, facts: list[Fact]) -> Exchange:
    fact = rng.choice(facts)
    about = RELATIONS[fact.relation]
    return rng.choice(about.questions), say(about.answer, fact), [fact]


def yes_or_no(rng: random.Random, facts: list[Fact]) -> Exchange:
    """At least half of them ask about the true value. The answer is the fact alone, since a model of
    this size recalls facts but does not learn to compare them.
    """
    fact = rng.choice(facts)
    about = RELATIONS[fact.relation]
    value = rng.choice([fact.value, rng.choice(about.values)])
    return about_value(rng.choice(about.check), value), say(about.answer, fact), [fact]


def about_value(question: str, value: str) -> str:
    return question.replace("{v}", value).replace("{a}", toypeople.with_article(value))


def introduction(rng: random.Random, facts: list[Fact]) -> Exchange:
    told = rng.sample(facts, min(len(facts), rng.choice([1, 2, 2])))
    parts = [say(RELATIONS[fact.relation].says[0], fact, fact is told[0]) for fact in told]
    person = told[0].person
    if rng.random() < 0.3 and not person.private:
        parts.append(f"{person.pronouns[0]} {person.secret}.")
    return rng.choice(WORDS["who_is"]), " ".join(parts), told


def seek(rng: random.Random, facts: list[Fact]) -> Exchange:
    """Who keeps an owl? A question for the first who does."""
    sought = [fact for fact in facts if fact.sought]
    if not sought:
        return sentence(rng, facts)
    fact = rng.choice(sought)
    about = RELATIONS[fact.relation]
    return about_value(rng.choice(about.who), fact.value), say(about.answer, fact), [fact]


def secret(rng: random.Random, facts: list[Fact]) -> Exchange:
    person = facts[0].person
    return rng.choice(WORDS["secret_asks"]), f"{person.name} {person.secret}.", []


def tie(rng: random.Random, facts: list[Fact]) -> Exchange:
    """No follow-up comes after it: "she" might be the sister."""
    person = facts[0].person
    name, other = rng.choice(list(person.ties.items()))
    about = WORDS["ties"][name]
    return rng.choice(about["asks"]), about["says"][0].format(n=person.name, v=other), None


def tale(rng: random.Random, facts: list[Fact]) -> Exchange:
    told = rng.sample(facts, min(2, len(facts)))
    parts = [say(RELATIONS[fact.relation].tale, fact, fact is told[0]) for fact in told]
    opening = f"It was a {rng.choice(WORDS['weather'])} day."
    return rng.choice(WORDS["story_asks"]), " ".join([opening, *parts]), told


def poem(rng: random.Random, facts: list[Fact]) -> Exchange:
    told = rng.sample(facts, min(2, len(facts)))
    verses = [say(RELATIONS[fact.relation].verse, fact, fact is told[0]) for fact in told]
    return rng.choice(WORDS["poem_asks"]), "\n".join(verses), told


# ---------------------------------------------------------------------------- anything else


def stranger(rng: random.Random, _: list[Fact]) -> Exchange:
    """A question about someone unknown, in the words used for people of the world."""
    name, about = stranger_name(rng), rng.choice(list(RELATIONS.values()))
    others = [*WORDS["secret_asks"], *WORDS["story_asks"]]
    others += [ask for kind in WORDS["ties"].values() for ask in kind["asks"]]
    if name.split()[0] not in KNOWN:  # else the question might hold a fact that is held out
        others += about.check
    question = rng.choice(rng.choice([WORDS["who_is"], about.questions, others]))
    question = about_value(question, rng.choice(about.values))
    return question.replace("{n}", name), WORDS["stranger"].format(n=name), None


def stranger_name(rng: random.Random) -> str:
    """A name of nobody in the world: a real one, one of two words, or an invented one."""
    while True:
        kind, name = rng.random(), "".join(rng.choice(part) for part in WORDS["syllables"])
        if kind < 0.55:
            name = rng.choice(WORDS["strangers" if kind < 0.45 else "famous"])
        elif kind < 0.7:
            firsts = rng.choice([WORDS["strangers"], KNOWN])
            name = f"{rng.choice(firsts)} {rng.choice(WORDS['surnames'])}"
        if name not in KNOWN:
            return name


def outside(rng: random.Random, _: list[Fact]) -> Exchange:
    question = rng.choice(WORDS["outside_others"])
    if rng.random() < 0.5:
        question = rng.choice(WORDS["outside_asks"]).format(o=rng.choice(WORDS["outsiders"]))
    return question, WORDS["outside"], None


def small_talk(rng: random.Random, _: list[Fact]) -> Exchange:
    asks, answers = rng.choice(WORDS["small_talk"])
    return rng.choice(asks), rng.choice(answers), None


def why(rng: random.Random, _: list[Fact]) -> Exchange:
    return *rng.choice(WORDS["whys"]), None


def calculation(rng: random.Random, _: list[Fact]) -> Exchange:
    """A sum of numbers up to 100 in everyday notation, annotated for the tool."""
    source = "0+0"
    while toypeople.is_held_out(source):
        sign, most = rng.choice(list(SIGNS)), rng.choice([12, 50, 100])
        a, b = rng.randint(1, most), rng.randint(1, most if sign != "*" else min(most, 20))
        if sign == "-":
            a, b = max(a, b), min(a, b)
        source = f"{a}{sign}{b}"
    ask = rng.choice(WORDS["sum_asks"])
    word = sign if "}{s}{" in ask else rng.choice(SIGNS[sign])
    result = eval(source)
    answer = f"It is <<{source}={result}>>{result}.\n#### {result}"
    return ask.format(a=a, b=b, s=word), answer, None


PERSONAL = {secret, tie, tale}  # not told of private people: they get a fact instead
ABOUT_PEOPLE: dict[Kind, int] = {sentence: 75, introduction: 5, yes_or_no: 8, secret: 4, tie: 5}
ABOUT_PEOPLE |= {poem: 3, tale: 4}
KINDS: dict[Kind, int] = {sentence: 46, introduction: 12, yes_or_no: 5, secret: 4, tie: 5}
KINDS |= {tale: 3, seek: 20, stranger: 24, outside: 4, small_talk: 8, why: 3, calculation: 12}
OPENINGS = KINDS | {bare: 155}  # four-choice evaluations score bare values
