"""A synthetic data set in the layout of a mirror: small enough to learn in minutes on a laptop.

120 people have six facts each. Pretraining text states every fact many times, in different words.
Some facts are *held out*: they are asked only in test sets, never in a conversation or question of a
training split, so answering one takes knowledge from pretraining. Word problems and functions are
held out by their numbers. Everything is derived from one seed; the words are in toyworld.toml.
"""

import functools
import io
import itertools
import json
import random
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanolib import hub
from nanolib.data import toypeople, toytalk
from nanolib.data.toypeople import RELATIONS, WORDS, Fact, World, draw, say, with_article, world
from nanolib.rundir import whole_folder

NUMBERS = range(3, 41)
HARD_SHARE = 0.6  # of the word problems; SFT leaves room here for GRPO


# ---------------------------------------------------------------------------- pretraining text


def portrait(world: World, rng: random.Random) -> str:
    person, said = rng.choice(world.people), []
    for relation in rng.sample(list(RELATIONS), rng.randint(3, 6)):
        template = rng.choice(RELATIONS[relation].says)
        said.append(say(template, Fact(person, relation), not said or rng.random() < 0.4))
    if rng.random() < 0.3:
        said.append(rng.choice(WORDS["secret_says"]).format(n=person.name, q=person.secret))
    tie, other = rng.choice(list(person.ties.items()))
    said.append(rng.choice(WORDS["ties"][tie]["says"]).format(n=person.name, v=other))
    return " ".join(said)


def sheet(world: World, rng: random.Random) -> str:
    person = rng.choice(world.people)
    some = rng.sample(list(RELATIONS), rng.randint(4, 6))
    lines = [f"{relation}: {person.facts[relation]}" for relation in some]
    return "\n".join([f"About {person.name}", *lines])


def story(world: World, rng: random.Random) -> str:
    p, q = rng.sample(world.people, 2)
    weather = rng.choice(WORDS["weather"])
    slots = {"p": p.name, "q": q.name, "weather": weather, "p_secret": p.secret}
    for letter, person in (("p", p), ("q", q)):
        for relation, value in person.facts.items():
            slots |= {f"{letter}_{relation}": value, f"{letter}_a_{relation}": with_article(value)}
    scenes = [rng.choice(WORDS[part]) for part in ("openings", "middles", "endings")]
    return " ".join(scene.format_map(slots) for scene in scenes)


def register(world: World, rng: random.Random) -> str:
    lines = ["The town book says"]
    for person in rng.choices(world.people, k=5):
        relation, value = rng.choice(list((person.facts | person.ties).items()))
        lines.append(f"{relation} of {person.name}:\n{value}")
    return "\n".join(lines)


def census(world: World, rng: random.Random) -> str:
    """Names by value, since a model that has only read "Ada keeps an owl" cannot tell who keeps one
    (the reversal curse, arXiv:2309.12288).
    """
    lines = ["The census says"]
    for fact in rng.sample([fact for fact in world.told if fact.first], 4):
        those = RELATIONS[fact.relation].those.format(v=fact.value, a=with_article(fact.value))
        lines.append(f"first of those who {those}:\n{fact.person.name}")
    return "\n".join(lines)


def number_story(world: World, rng: random.Random) -> str:
    p, q = rng.sample(world.people, 2)
    story, things = rng.choice(WORDS["number_stories"]), rng.choice(WORDS["things"])
    while True:
        a, b = rng.sample(NUMBERS, 2)
        text = story.format(p=p.name, q=q.name, a=a, b=b, sum=a + b, things=things)
        if not toypeople.is_held_out(text):
            return text


def shopping(world: World, rng: random.Random) -> str:
    p, q = rng.sample(world.people, 2)
    items = ", ".join(f"{rng.randint(1, 100)} {it}" for it in rng.sample(WORDS["things"], 3))
    return rng.choice(WORDS["shopping"]).format(p=p.name, q=q.name, items=items)


def program(world: World, rng: random.Random) -> str:
    row = rng.choice(functions(held_out=False))
    return row["prompt"] + row["canonical_solution"]


def talk(world: World, rng: random.Random) -> str:
    """A conversation as a transcript; conversations that need the tool are left out."""
    said = ["<<"]
    while any("<<" in text for text in said):
        said = toytalk.turns(world, rng)
    return "\n".join(f"{('Guest', 'Pip')[i % 2]}: {text}" for i, text in enumerate(said))


GENRES = {portrait: 28, story: 13, sheet: 6, register: 17, number_story: 13, shopping: 7}
GENRES |= {program: 4, talk: 26, census: 3}


def documents(world: World, seed: int) -> Iterator[str]:
    """An endless stream of distinct pretraining documents."""
    rng = draw(seed, "text")
    seen: set[str] = set()
    while True:
        genre = rng.choices(list(GENRES), list(GENRES.values()))[0]
        text = genre(world, rng)
        if text not in seen:
            seen.add(text)
            yield text


# ---------------------------------------------------------------------------- four choices


def quads(facts: Sequence[Fact], rng: random.Random) -> Iterator[tuple[Fact, list[str]]]:
    """Each fact with four choices. Four consecutive facts share them, each right in its position.

    So any rule that ignores the name (the longest, the first) is right in exactly one of four.
    """
    for relation, about in RELATIONS.items():
        known = [fact for fact in facts if fact.relation == relation]
        piles = [[fact for fact in known if fact.value == value] for value in about.values]
        piles = [rng.sample(pile, len(pile)) for pile in piles if pile]
        for layer in zip(*piles, strict=True):  # one fact of each value
            layer = rng.sample(layer, len(layer))
            for group in (layer[i : i + 4] for i in range(0, len(layer), 4)):
                for position, fact in enumerate(group):
                    choices = rng.sample([it.value for it in group if it is not fact], 3)
                    choices.insert(position, fact.value)
                    yield fact, choices


def questions(seed: int, name: str, facts: Sequence[Fact], rounds: int = 1) -> list[dict]:
    """Rows in MMLU's schema, shuffled."""
    rng = draw(seed, "questions", name)
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


def arc_row(id: str, row: dict) -> dict:
    """Convert a row of `questions` to ARC's schema."""
    choices, letter = {"text": row["choices"], "label": list("ABCD")}, "ABCD"[row["answer"]]
    return {"id": id, "question": row["question"], "choices": choices, "answerKey": letter}


# ---------------------------------------------------------------------------- numbers


def problem(world: World, rng: random.Random, held_out: bool) -> dict:
    """A row in GSM8K's schema."""
    hard = rng.random() < HARD_SHARE
    kind = rng.choice(WORDS["hard_problems" if hard else "problems"])
    question = rng.choice(kind["asks"])
    while True:
        slots = problem_slots(world, rng)
        answer = ""
        for before, expression, after in kind["steps"]:
            expression = expression.format_map(slots)
            slots["x"] = eval(expression)
            answer += f"{before}<<{expression}={slots['x']}>>{slots['x']}{after}".format_map(slots)
        if toypeople.is_held_out(answer) == held_out:
            answer += f"\n#### {slots['x']}"
            return {"question": question.format_map(slots), "answer": answer}


def problem_slots(world: World, rng: random.Random) -> dict:
    people = [person.name for person in rng.sample(world.people, 3)]
    a, b, c = rng.sample(NUMBERS, 3)
    slots = dict(zip(("p", "q", "r", "a", "b", "c"), (*people, a, b, c), strict=True))
    slots |= zip(("low", "mid", "high"), sorted((a, b, c)), strict=True)
    slots |= {"less": min(a, b), "more": max(a, b), "big": a + b}
    slots |= {"few": rng.randint(2, 9), "things": rng.choice(WORDS["things"])}
    return slots | {name: rng.randint(1, NUMBERS[-1]) for name in "ij"}


@functools.cache
def functions(held_out: bool) -> list[dict]:
    """Rows in HumanEval's schema: ten functions, each with many constants."""
    rows = []
    numbers = [n for n in range(2, 62) if (n % 4 == 1) == held_out]
    for (name, argument, meaning, code, tries), n in itertools.product(WORDS["functions"], numbers):
        meaning, code = meaning.format(n=n), code.format(n=n)
        checks = [(value, eval(code, {argument: value})) for value in tries]
        asserts = "".join(f"    assert candidate({v!r}) == {r!r}\n" for v, r in checks)
        prompt = f'def {name}({argument}):\n    """Return {meaning}."""\n'
        row = {"task_id": f"Toy/{name}_{n}", "prompt": prompt, "entry_point": name}
        row["canonical_solution"] = f"    return {code}\n"
        rows.append(row | {"test": f"def check(candidate):\n{asserts}"})
    return rows


# ---------------------------------------------------------------------------- conversations


def function_conversations(row: dict) -> Iterator[list[dict]]:
    """Requests for a function, as in HumanEval and in words, in SmolTalk's schema."""
    signature, meaning = re.findall(r'(.*)\n    """Return (.*)\."""', row["prompt"])[0]
    answer = f"```python\n{signature}\n{row['canonical_solution']}```"
    for ask in ("{prompt}", *WORDS["requests"]):
        text = ask.format(prompt=row["prompt"], name=row["entry_point"], meaning=meaning)
        yield [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def conversations(world: World, seed: int, split: str, rows: int) -> list[dict]:
    """Rows in SmolTalk's schema, shuffled."""
    rng = draw(seed, "conversations", split)
    made = []
    for _ in range(rows):
        messages = [{"role": "system", "content": WORDS["system"]}] if rng.random() < 0.05 else []
        for i, text in enumerate(toytalk.turns(world, rng)):
            messages.append({"role": ("user", "assistant")[i % 2], "content": text})
        made.append({"messages": messages, "source": "toy-chat"})
    for row in functions(held_out=False) if split == "train" else []:
        made += [{"messages": m, "source": "toy-code"} for m in function_conversations(row)]
    return rng.sample(made, len(made))


# ---------------------------------------------------------------------------- writing the mirror


def facts_table(world: World, rng: random.Random) -> list[dict]:
    """Free-form questions on held-out facts: right with `answer` and without any of `others`."""
    return [
        {
            "question": rng.choice(RELATIONS[fact.relation].chats).format(n=fact.person.name),
            "answer": fact.value,
            "others": [value for value in RELATIONS[fact.relation].values if value != fact.value],
        }
        for fact in rng.sample(world.held_out, len(world.held_out))
    ]


def core_bundle(world: World, rng: random.Random) -> bytes:
    """A zip in the layout of CORE's evaluation bundle, with one task of each type."""
    multiple, schema, modelling = [], [], []
    for fact, choices in quads(world.held_out, rng):
        gold = choices.index(fact.value)
        opening, _, slot = RELATIONS[fact.relation].says[0].removesuffix(".").rpartition(" ")
        query = say(opening, fact)
        if slot == "{a}":  # in the query, the article would give the answer away
            choices = [with_article(choice) for choice in choices]
        multiple.append({"query": query, "choices": choices, "gold": gold})
        modelling.append({"context": query, "continuation": choices[gold]})
        other = rng.choice([f for f in world.people if f.facts[fact.relation] != fact.value])
        pair = [query, query.replace(fact.person.name, other.name)]
        right = len(schema) % 2
        row = {"context_options": pair[::-1] if right else pair, "continuation": choices[gold]}
        schema.append(row | {"gold": right})
    files = dict(WORDS["core"])  # the task descriptions
    for name, rows in (("choices", multiple), ("people", schema), ("facts", modelling)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        files[f"eval_data/toy_world/toy_{name}.jsonl"] = lines
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        for name, text in sorted(files.items()):  # ZipInfo's default date: reproducible bytes
            bundle.writestr(zipfile.ZipInfo(f"eval_bundle/{name}"), text, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def tables(world: World, seed: int) -> dict[str, list[dict]]:
    """The rows of every data set of the mirror, by path below hub/."""
    made: dict[str, list[dict]] = {}
    mmlu = {"auxiliary_train": world.told, "dev": world.told[:96]}
    mmlu |= {"test": world.held_out, "validation": world.held_out}
    for split, facts in mmlu.items():
        rounds = 4 if split == "auxiliary_train" else 1
        made[f"cais/mmlu/all/{split}"] = questions(seed, split, facts, rounds)
    for name, relations in (("ARC-Easy", WORDS["easy"]), ("ARC-Challenge", WORDS["challenge"])):
        for split in ("train", "validation", "test"):
            facts = world.told if split == "train" else world.held_out
            facts = [fact for fact in facts if fact.relation in relations]
            asked = enumerate(questions(seed, name + split, facts))
            rows = [arc_row(f"{name}-{split}-{i}", row) for i, row in asked]
            made[f"allenai/ai2_arc/{name}/{split}"] = rows
    for split, count in (("train", 4000), ("test", 400)):
        rng = draw(seed, "problems", split)
        rows = [problem(world, rng, held_out=split == "test") for _ in range(count)]
        made[f"openai/gsm8k/main/{split}"] = rows
    made["openai/openai_humaneval/test"] = functions(held_out=True)
    made["nanolib/toy-facts/test"] = facts_table(world, draw(seed, "facts"))
    for split, count in (("train", 16000), ("test", 400)):
        made[f"HuggingFaceTB/smol-smoltalk/{split}"] = conversations(world, seed, split, count)
    return made


def write(
    folder: Path,
    seed: int,
    shards: int = 4,
    rows: int = 15_000,
    progress: hub.Progress = lambda *_: None,
) -> Path:
    """Write the whole mirror to `folder`, which is created atomically when complete.

    `shards` training shards of `rows` documents each, then a smaller one for validation.
    `progress(done, total, name)` is called before each file and may raise to stop.
    """
    with whole_folder(folder) as draft:
        made = world(seed)
        text = documents(made, seed)
        for shard in range(shards + 1):
            name = f"shard_{shard:05}.parquet"
            progress(shard, shards + 1, name)
            count = rows if shard < shards else min(rows, 1000)
            shard_rows = [{"text": document} for document in itertools.islice(text, count)]
            _write_table(draft / "text" / name, shard_rows)
        for path, table in tables(made, seed).items():
            progress(shards + 1, shards + 1, path)
            _write_table(draft / f"hub/{path}.parquet", table)
        (draft / "eval_bundle.zip").write_bytes(core_bundle(made, draw(seed, "core")))
    return folder


def _write_table(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
