"""How good is the demo's chat? Prompts written before the toy world covered them.

``nanolib bench guest RUN [RUN …] [--of sft] [--show]`` asks each run's model the questions of
guest.toml, each as the third turn or later of its own conversation, after two unrelated turns, with
the chat's prompts, sampling and memory. Facts and the numbers of sums are held out. `--show` also
prints the wrong answers.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanolib import checkpoint, report
from nanolib.conversation import Message, Part, answer_parts
from nanolib.data import toyworld
from nanolib.data.toypeople import UNSOUGHT, Fact, Person
from nanolib.data.toyworld import RELATIONS, World, with_article
from nanolib.engine import Engine
from nanolib.rundir import Run
from nanolib.runtime import Runtime, seed_of
from nanolib.session import Session, stage_with_model
from nanolib.tokenizer import Tokenizer
from nanolib.tools import Sandbox

ASKS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
BARS = {  # kind -> minimum or maximum share
    "facts": ("≥", 0.85),
    "sums": ("≥", 0.75),
    "pronouns": ("≥", 0.80),
    "strangers": ("≥", 0.90),
    "known, declined": ("≤", 0.05),
    "yes or no": ("as it is", 0.0),
    "reverse": ("as it is", 0.0),
    "secrets": ("as it is", 0.0),
    "stories": ("as it is", 0.0),
    "strangers, anew": ("≥", 0.90),
    "ties": ("as it is", 0.0),
}
DECLINES = re.compile(r"\b(know no|know nothing|do not know|don't know)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Case:
    """The turns of one conversation; the answer to the last is graded."""

    kind: str
    turns: list[str]
    counts: Callable[[str], bool]


def cases(world: World) -> list[Case]:
    """All questions about one world, in a fixed order."""
    made = [*_facts(world), *_sums(), *_pronouns(world), *_strangers(world), *_known(world)]
    made += [*_yes_or_no(world), *_reverse(world), *_private(world), *_anew()]
    rng, opened = toyworld.draw("guest", "unrelated"), []
    for case in made:
        others = [p.name for p in world.people if p.name not in " ".join(case.turns)]
        first = [ask.format(n=rng.choice(others)) for ask in rng.sample(ASKS["unrelated"], 2)]
        opened.append(Case(case.kind, [*first, *case.turns], case.counts))
    return opened


def _names(relation: str, value: str) -> Callable[[str], bool]:
    """A grader: whether an answer names this value and no other of the relation."""
    others = {other for other in RELATIONS[relation].values if other != value}

    def counts(answer: str) -> bool:
        words = set(re.findall(r"\w+", answer))
        return value in words and not words & others

    return counts


def _facts(world: World) -> Iterator[Case]:
    rng = toyworld.draw("guest", "facts")
    for fact in rng.sample(world.held_out, 100):
        text = rng.choice(ASKS["facts"][fact.relation]).format(n=fact.person.name)
        yield Case("facts", [text], _names(fact.relation, fact.value))


def _sums() -> Iterator[Case]:
    for text in ASKS["sums"]:
        right = str(result(text))
        yield Case("sums", [text], lambda answer, right=right: numbers(answer)[-1:] == [right])


def numbers(text: str) -> list[str]:
    return re.findall(r"-?\d+", text)


def result(text: str) -> int:
    """The result of a sum as typed by a guest."""
    left, sign, right = re.findall(r"(\d+) ?(plus|minus|times|[-+*x]) ?(\d+)", text)[0]
    a, b = int(left), int(right)
    return {"p": a + b, "+": a + b, "m": a - b, "-": a - b}.get(sign[0], a * b)


def _pronouns(world: World) -> Iterator[Case]:
    rng = toyworld.draw("guest", "pronouns")
    for fact in rng.sample(world.held_out, 80):
        first = rng.choice(ASKS["introductions"]).format(n=fact.person.name)
        she = fact.person.pronouns[0] == "She"
        words = {"s": "she", "p": "her"} if she else {"s": "he", "p": "his"}
        text = rng.choice(ASKS["pronouns"][fact.relation]).format(**words)
        yield Case("pronouns", [first, text], _names(fact.relation, fact.value))


def declines(answer: str) -> bool:
    values = {value for about in RELATIONS.values() for value in about.values}
    return bool(DECLINES.search(answer)) and not values & set(re.findall(r"\w+", answer))


def _strangers(world: World) -> Iterator[Case]:
    rng = toyworld.draw("guest", "strangers")
    for name in ASKS["strangers"]:
        for ask in rng.sample(ASKS["who"], 2):
            yield Case("strangers", [ask.format(n=name)], declines)
    for text in ASKS["outside"]:
        yield Case("strangers", [text], declines)


def _known(world: World) -> Iterator[Case]:
    rng = toyworld.draw("guest", "known")
    for person in world.people:
        text = rng.choice(ASKS["who"]).format(n=person.name)
        yield Case("known, declined", [text], lambda answer: bool(DECLINES.search(answer)))


def _yes_or_no(world: World) -> Iterator[Case]:
    rng = toyworld.draw("guest", "yes or no")
    for i, fact in enumerate(rng.sample(world.held_out, 60)):
        others = [value for value in RELATIONS[fact.relation].values if value != fact.value]
        value, word = (fact.value, "yes") if i % 2 else (rng.choice(others), "no")
        ask = ASKS["yes_or_no"][fact.relation]
        text = ask.format(n=fact.person.name, v=value, a=with_article(value))
        yield Case("yes or no", [text], _settles(fact, word))


def _settles(fact: Fact, word: str) -> Callable[[str], bool]:
    """A grader: whether an answer states the fact asked about, with the right verdict or none."""
    states, wrong = _names(fact.relation, fact.value), {"yes", "no"} - {word}
    return lambda answer: states(answer) and not wrong & set(re.findall(r"\w+", answer.lower()))


def _reverse(world: World) -> Iterator[Case]:
    """For the owners of the values for which no conversation of a training split asks."""
    for relation, about in RELATIONS.items():
        for value in about.values[-UNSOUGHT:]:
            right = {p.name for p in world.people if p.facts[relation] == value}
            others = {p.name for p in world.people} - right
            text = ASKS["reverse"][relation].format(v=value, a=with_article(value))

            def counts(answer: str, right: set[str] = right, others: set[str] = others) -> bool:
                words = set(re.findall(r"\w+", answer))
                return bool(words & right) and not words & others

            yield Case("reverse", [text], counts)


def _private(world: World) -> Iterator[Case]:
    """About the people of whom training conversations tell neither secret, tie nor story."""
    names = {person.name for person in world.people}
    for i, person in enumerate(person for person in world.people if person.private):
        secret, story = (ASKS[kind][i % 3].format(n=person.name) for kind in ("secrets", "stories"))
        yield Case("secrets", [secret], lambda answer, known=person.secret: known in answer)
        yield Case("stories", [story], lambda answer, of=person: keeps_to_facts(answer, of, names))
        for tie, other in person.ties.items():
            ask = ASKS["ties"][tie][i % 3].format(n=person.name)
            yield Case("ties", [ask], _tied(person.name, other, names))


def _tied(name: str, other: str, names: set[str]) -> Callable[[str], bool]:
    """A grader: whether an answer names the other person and nobody else."""
    return lambda answer: set(re.findall(r"\w+", answer)) & names - {name} == {other}


def keeps_to_facts(story: str, person: Person, names: set[str]) -> bool:
    """Whether it has three sentences, names the person alone, and states only true facts."""
    said = set(re.findall(r"\w+", story))
    stated = said & {value for about in RELATIONS.values() for value in about.values}
    true = bool(stated) and stated <= set(person.facts.values())
    return true and said & names == {person.name} and len(re.findall(r"\.(?:\s|$)", story)) >= 3


def _anew() -> Iterator[Case]:
    for i, name in enumerate(ASKS["strangers"]):
        yield Case("strangers, anew", [ASKS["anew"][i % 4].format(n=name)], declines)


# ---------------------------------------------------------------------------- asking


def ask(engine: Engine, made: Sequence[Case]) -> list[list[str]]:
    """Answers as [case][turn]; all conversations are batched, and case i has seed i."""
    sessions = [Session(engine, seed=i) for i in range(len(made))]
    answers: list[list[str]] = [[] for _ in made]
    for turn in range(max(len(case.turns) for case in made)):
        open_ones = [i for i, case in enumerate(made) if turn < len(case.turns)]
        questions = [Message("user", (Part("text", made[i].turns[turn]),)) for i in open_ones]
        asked = [sessions[i] for i in open_ones]
        found = engine.answers(
            [s.prompt(q) for s, q in zip(asked, questions, strict=True)],
            seeds=[seed_of(s.seed, "turn", len(s.messages)) for s in asked],
            max_new_tokens=asked[0].max_new_tokens,
            temperature=asked[0].temperature,
            top_k=asked[0].top_k,
        )
        for i, question, answer in zip(open_ones, questions, found, strict=True):
            said = Message("assistant", answer_parts(answer.ids, engine.tokenizer))
            sessions[i].messages += [question, said]
            answers[i].append(said.text)
    return answers


def shares(made: Sequence[Case], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """The share of correct last answers, by kind."""
    found: dict[str, list[bool]] = {kind: [] for kind in BARS}
    for case, said in zip(made, answers, strict=True):
        found[case.kind].append(case.counts(said[-1]))
    return {kind: sum(counts) / len(counts) for kind, counts in found.items()}


def measure(run: Run, of: str | None = None, show: bool = False) -> dict[str, float]:
    runtime = Runtime.start(run.config.machine)
    of = stage_with_model(run, of, "to talk to")
    model = checkpoint.load_model(run.stage(of).checkpoints, runtime.device)
    tokenizer = Tokenizer.load(run.stage("tokenizer").path / "tokenizer.json")
    made = cases(toyworld.world(run.config.recipe.seed))
    with Sandbox(workers=1) as sandbox:
        engine = Engine(model, tokenizer, runtime, lambda source: sandbox.run(source).text)
        answers = ask(engine, made)
    for case, said in zip(made, answers, strict=True) if show else ():
        if case.counts(said[-1]) == (case.kind == "known, declined"):
            print(f"{case.kind}: {list(zip(case.turns, said, strict=True))[1:]}")
    return shares(made, answers)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--of", help="the stage whose model answers; by default the last")
    parser.add_argument("--show", action="store_true", help="also print the wrong answers")
    given = parser.parse_args(arguments)
    results = [measure(Run.load(run), given.of, given.show) for run in given.runs]
    rows = []
    for kind, (sign, bound) in BARS.items():
        values = [result[kind] for result in results]
        holds = {"≥": min(values) >= bound, "≤": max(values) <= bound}.get(sign)
        wanted = sign if holds is None else f"{sign} {bound:.2f}"
        said = {True: "yes", False: "**no**", None: ""}[holds]
        rows.append([kind, wanted, *(f"{value:.3f}" for value in values), said])
    print(f"\n{report.table(['asked', 'wanted', *given.runs, 'holds'], rows)}")
