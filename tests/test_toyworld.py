"""The held-out split, proved on the files themselves: read as plain text, not as we made them."""

import collections
import hashlib
import io
import itertools
import json
import re
import zipfile

import pyarrow.parquet as pq
import pytest

from nanolib import hub, tasks
from nanolib.config import from_flat
from nanolib.data import toyworld
from nanolib.data.toypeople import Fact
from nanolib.data.toyworld import RELATIONS
from runs.bench import guest

SEED = 7
TRAINING = {
    "smoltalk": "HuggingFaceTB/smol-smoltalk/train",
    "mmlu": "cais/mmlu/all/auxiliary_train",
    "mmlu few-shot": "cais/mmlu/all/dev",
    "arc_easy": "allenai/ai2_arc/ARC-Easy/train",
    "arc_challenge": "allenai/ai2_arc/ARC-Challenge/train",
    "gsm8k": "openai/gsm8k/main/train",
}
CHOICE_SETS = [
    (name, split) for name in ("mmlu", "arc_easy", "arc_challenge") for split in ("train", "test")
]


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    return toyworld.write(tmp_path_factory.mktemp("toy") / "mirror", SEED, shards=2, rows=3000)


@pytest.fixture(scope="module")
def world():
    return toyworld.world(SEED)


def read(mirror, path):
    return pq.read_table(mirror / "hub" / f"{path}.parquet").to_pylist()


def training_texts(mirror):
    """Every question with its answer, or choices, as one text."""
    for path in TRAINING.values():
        for row in read(mirror, path):
            messages = [m["content"] for m in row.get("messages", []) if m["role"] != "system"]
            if messages:
                yield from map(" ".join, zip(messages[::2], messages[1::2], strict=True))
            else:
                yield json.dumps(row)


def asks_of(fact):
    about = RELATIONS[fact.relation]
    return about.asks + about.chats + about.more


def documents(mirror):
    return [text for file in sorted((mirror / "text").glob("*")) for text in hub.documents(file)]


def words(text):
    return set(re.findall(r"\w+", text))


def test_a_world_of_120_people_shares_its_values_evenly(world):
    assert len({person.name for person in world.people}) == len(world.people) == 120
    for relation, kind in RELATIONS.items():
        values = [person.facts[relation] for person in world.people]
        assert {value: values.count(value) for value in kind.values} == dict.fromkeys(
            kind.values, 10
        )
        assert all(
            len(kind.asks) == len(kind.chats) == len(kind.more) == 3 for kind in RELATIONS.values()
        )
    every = [value for kind in RELATIONS.values() for value in kind.values]
    assert len(set(every)) == len(every), "one word must not be two facts"


def test_held_out_facts_are_read_about_and_never_asked_about_in_training(mirror, world):
    held = {(fact.person.name, fact.value) for fact in world.held_out}
    told = {(fact.person.name, fact.value) for fact in world.told}
    assert len(held) == 288
    assert not held & told
    asked, read_of = set(), set()
    for found, texts in ((asked, training_texts(mirror)), (read_of, documents(mirror))):
        for text in texts:
            seen = words(text)
            found.update(fact for fact in held | told if seen.issuperset(fact))
    assert not asked & held
    assert asked >= told
    assert read_of >= held | told


def test_no_training_question_has_the_person_and_the_relation_of_a_held_out_fact(mirror, world):
    banned = {
        question.format(n=fact.person.name) for fact in world.held_out for question in asks_of(fact)
    }
    training = "\n".join(training_texts(mirror))
    assert not [question for question in banned if question in training]
    assert not [q for text in documents(mirror) for q in banned if q in text]
    for path in ("cais/mmlu/all/test", "nanolib/toy-facts/test"):
        assert {row["question"] for row in read(mirror, path)} <= banned


def test_word_problems_are_held_out_by_their_numbers(mirror):
    def first_sums(rows):
        return {re.search(r"<<(\d+[-+*]\d+)=", row["answer"])[1] for row in rows}

    test, train = read(mirror, "openai/gsm8k/main/test"), read(mirror, TRAINING["gsm8k"])
    assert len(test) == 400
    assert not first_sums(test) & first_sums(train)
    assert {s for text in documents(mirror) for s in re.findall(r"\d+[-+*]\d+", text)}.isdisjoint(
        first_sums(test)
    )


def test_the_sums_of_word_problems_are_right(mirror):
    for row in read(mirror, "openai/gsm8k/main/test") + read(mirror, TRAINING["gsm8k"]):
        steps = re.findall(r"<<(\d+)([-+*])(\d+)=(\d+)>>(\d+)", row["answer"])
        for left, sign, right, result, shown in steps:
            left, right = int(left), int(right)
            value = {"+": left + right, "-": left - right, "*": left * right}[sign]
            assert value == int(result) == int(shown) >= 0
        assert row["answer"].endswith(f"\n#### {steps[-1][3]}")


def test_functions_are_held_out_by_their_numbers_and_pass_their_tests(mirror):
    training = "\n".join([*training_texts(mirror), *documents(mirror)])
    rows = read(mirror, "openai/openai_humaneval/test")
    assert len(rows) >= 100
    for row in rows:
        assert row["prompt"] not in training
        assert row["canonical_solution"] not in training
        space = {}
        exec(row["prompt"] + row["canonical_solution"] + row["test"], space)
        space["check"](space[row["entry_point"]])
        exec(row["prompt"] + "    return None\n" + row["test"], space)
        with pytest.raises(AssertionError):
            space["check"](space[row["entry_point"]])


@pytest.mark.parametrize(("name", "split"), CHOICE_SETS)
def test_whatever_ignores_the_name_is_right_once_in_four(mirror, name, split):
    task = tasks.load(name, split, mirror)
    rows = [(task.choices(i), task.answer(i)) for i in range(len(task))]
    assert len(rows) % 4 == 0
    assert all(len(set(choices)) == 4 for choices, _ in rows)
    blind = {
        "first": lambda choices: 0,
        "last": lambda choices: 3,
        "longest": lambda choices: max(range(4), key=lambda c: len(choices[c])),
        "shortest": lambda choices: min(range(4), key=lambda c: len(choices[c])),
        "alphabet": lambda choices: choices.index(min(choices)),
    }
    for rule, choose in blind.items():
        right = sum(choose(choices) == answer for choices, answer in rows) / len(rows)
        if rule in ("first", "last", "alphabet"):
            assert right == 0.25, rule
        assert right <= 0.35, rule


def test_the_answers_of_choice_questions_are_true(mirror, world):
    facts = {person.name: person.facts for person in world.people}
    for name, split in CHOICE_SETS:
        task = tasks.load(name, split, mirror)
        for i in range(len(task)):
            (person,) = words(task.question(i)) & facts.keys()
            (right,) = set(task.choices(i)) & set(facts[person].values())
            assert task.choices(i)[task.answer(i)] == right


def test_sheets_and_registers_are_true(mirror, world):
    facts = {person.name: person.facts | person.ties for person in world.people}
    checked = 0
    for text in documents(mirror):
        first, *lines = text.split("\n")
        if first.startswith("About "):
            pairs = [(first[6:], *line.split(": ")) for line in lines]
        elif first == "The town book says":
            pairs = [
                (*reversed(head.removesuffix(":").split(" of ")), value)
                for head, value in zip(lines[::2], lines[1::2], strict=True)
            ]
        else:
            continue
        for person, relation, value in pairs:
            assert facts[person][relation] == value
            checked += 1
    assert checked > 1000


def test_the_census_names_one_owner_of_every_value(mirror, world):
    relations = {value: name for name, kind in RELATIONS.items() for value in kind.values}
    facts, named = {person.name: person.facts for person in world.people}, set()
    for text in documents(mirror):
        first, *lines = text.split("\n")
        if first == "The census says":
            for those, name in zip(lines[::2], lines[1::2], strict=True):
                (value,) = words(those) & relations.keys()
                assert facts[name][relations[value]] == value, those
                named.add((value, name))
    assert len(named) == len(relations) and {value for value, _ in named} == relations.keys()


def test_validation_text_is_not_in_the_training_text(mirror):
    files = hub.text_files(from_flat("test", {}), mirror)
    training = {text for file in files.train for text in hub.documents(file)}
    assert len(training) == 6000
    assert training.isdisjoint(hub.documents(files.validation))


def test_every_task_loads_and_converses(mirror):
    for name, split in [*itertools.product(tasks.TASKS, ["test"]), *CHOICE_SETS]:
        task = tasks.load(name, split, mirror)
        assert [task.conversation(i).turns[-1].role for i in range(3)] == ["assistant"] * 3


def test_the_bundle_has_cores_layout_and_a_balanced_task_of_each_type(mirror):
    bundle = zipfile.ZipFile(mirror / "eval_bundle.zip")
    core = bundle.read("eval_bundle/core.yaml").decode()
    kinds = dict(re.findall(r"- label: (\w+)\n(?:.*\n)*?  icl_task_type: (\w+)\n", core))
    assert sorted(kinds.values()) == ["language_modeling", "multiple_choice", "schema"]
    meta = bundle.read("eval_bundle/eval_meta_data.csv").decode().splitlines()
    assert meta[0] == "Eval Task,Random baseline"
    assert [line.split(",")[0] for line in meta[1:]] == list(kinds)
    for label, uri in re.findall(r"- label: (\w+)\n  dataset_uri: (\S+)\n", core):
        rows = [
            json.loads(line)
            for line in io.TextIOWrapper(bundle.open(f"eval_bundle/eval_data/{uri}"))
        ]
        fields = {
            "language_modeling": {"context", "continuation"},
            "multiple_choice": {"query", "choices", "gold"},
            "schema": {"context_options", "continuation", "gold"},
        }[kinds[label]]
        assert all(row.keys() == fields for row in rows)
        for row in rows:  # an article would give the answer away
            for context in [row.get("query"), row.get("context"), *row.get("context_options", [])]:
                assert not re.search(r" an?$", context or "")
        if "gold" in fields:
            golds = [row["gold"] for row in rows]
            assert len({golds.count(gold) for gold in set(golds)}) == 1


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    small = {"shards": 1, "rows": 50}
    one, two, other = (
        files_of(toyworld.write(tmp_path / name, seed, **small))
        for name, seed in (("one", 1), ("two", 1), ("other", 2))
    )
    assert one == two
    assert one.keys() == other.keys()
    different = [name for name in one if one[name] != other[name]]
    assert len(different) == len(one) - 1  # the functions are the same in every world


def conversations(mirror):
    for row in read(mirror, TRAINING["smoltalk"]):
        if row["source"] == "toy-chat":
            yield [m["content"] for m in row["messages"] if m["role"] != "system"]


def talks(mirror):
    return [text for text in documents(mirror) if text.startswith("Guest: ")]


def exchanges(turns):
    return zip(turns[::2], turns[1::2], strict=True)


def all_exchanges(mirror):
    """Of conversations and of those in the text."""
    heard = (re.split(r"\n?(?:Guest|Pip): ", text)[1:] for text in talks(mirror))
    return [pair for turns in (*conversations(mirror), *heard) for pair in exchanges(turns)]


def test_no_question_of_the_guest_is_in_training(mirror):
    training = "\n".join([*training_texts(mirror), *documents(mirror)])
    for name in guest.ASKS["strangers"]:
        assert not re.search(rf"\b{name}\b", training), name
    assert not [question for question in guest.ASKS["outside"] if question in training]
    sums = re.findall(r"(\d+) ?(?:[-+*x]|plus|minus|times) ?(\d+)", "\n".join(guest.ASKS["sums"]))
    asked = [turn for turns in conversations(mirror) for turn in turns[::2]]
    asked += [row["question"] for row in read(mirror, TRAINING["gsm8k"])]
    learned = re.findall(r"(\d+) ?(?:[-+*x]|plus|minus|times) ?(\d+)", "\n".join(asked))
    assert len(sums) == 50 and len(learned) > 1000
    assert not set(sums) & set(learned)


def test_no_question_of_the_guest_about_people_is_in_training(mirror, world):
    training = "\n".join([*training_texts(mirror), *documents(mirror)])
    kinds = {"facts", "yes or no", "reverse", "secrets", "stories", "strangers, anew", "ties"}
    asked = {case.turns[-1]: case.kind for case in guest.cases(world) if case.kind in kinds}
    assert set(asked.values()) == kinds
    assert not [question for question in asked if question in training]


def test_conversations_tell_neither_secret_nor_story_of_private_people(mirror, world):
    private = {person.name: person for person in world.people if person.private}
    assert len(private) == 12
    told = 0
    for _, answer in all_exchanges(mirror):
        told += answer.startswith("It was a")
        for name in words(answer) & private.keys():
            assert not answer.startswith("It was a"), answer
            assert private[name].secret not in answer, answer
    assert told > 500


def test_text_tells_the_secrets_and_ties_of_all(world):
    text = "\n".join(itertools.islice(toyworld.documents(world, SEED), 40_000))
    assert not [p.name for p in world.people if f"{p.name} {p.secret}" not in text]
    for person in world.people:
        for tie, other in person.ties.items():
            assert f"{person.name} has a {tie}, {other}." in text
            assert f"\n{tie} of {person.name}:\n{other}" in text


def test_a_dozen_names_are_everybodys_sister_and_another_dozen_everybodys_rival(world):
    for tie in ("sister", "rival"):
        assert all(person.ties[tie] != person.name for person in world.people)
        shared = collections.Counter(person.ties[tie] for person in world.people)
        assert len(shared) == 12 and min(shared.values()) >= 7  # 10 less those who are one of them
    women = {person.name for person in world.people if person.pronouns[0] == "She"}
    assert {person.ties["sister"] for person in world.people} <= women


def test_conversations_tell_true_ties_of_all_but_the_private_people(mirror, world):
    people, told = {person.name: person for person in world.people}, 0
    pronouns = {"she", "he", "her", "his", "him"}
    for turns in conversations(mirror):
        for i, (_, answer) in enumerate(found := list(exchanges(turns))):
            if tie := re.fullmatch(r"(\w+)'s (sister|rival) is (\w+)\.", answer):
                told += 1
                assert people[tie[1]].ties[tie[2]] == tie[3] and not people[tie[1]].private
                later = " ".join(question for question, _ in found[i + 1 : i + 2])
                assert not words(later) & pronouns  # hers, or the sister's?
    assert told > 200


def test_who_has_something_is_answered_by_one_who_has_and_three_values_are_left_for_the_guest(
    mirror, world
):
    people = {person.name: person for person in world.people}
    relations = {value: name for name, kind in RELATIONS.items() for value in kind.values}
    sought = collections.Counter()
    for question, answer in all_exchanges(mirror):
        asked = words(question) & relations.keys()
        if asked and re.match("Who|Do you know who", question) and not words(question) & {*people}:
            (value,), (name,) = asked, words(answer) & people.keys()
            assert people[name].facts[relations[value]] == value, (question, answer)
            sought[value] += 1
    asked = [case.turns[-1] for case in guest.cases(world) if case.kind == "reverse"]
    assert len(asked) == 18 and len(sought) == len(relations) - 18 and min(sought.values()) > 3
    assert not words(" ".join(asked)) & sought.keys()


def test_a_yes_or_no_question_is_answered_by_the_fact_itself(mirror, world):
    people = {person.name: person for person in world.people}
    relations = {value: name for name, kind in RELATIONS.items() for value in kind.values}
    right = {True: 0, False: 0}
    for question, answer in all_exchanges(mirror):
        asked = words(question) & relations.keys()
        if not asked or not re.match("Does|Is", question) or answer.startswith("I know no"):
            continue
        (value,), (known,) = asked, words(answer) & relations.keys()
        (name,) = words(answer) & people.keys()
        assert known == people[name].facts[relations[value]], answer
        right[value == known] += 1
    assert min(right.values()) > 500, right


def test_a_yes_or_no_answer_counts_with_the_fact_and_no_wrong_verdict(world):
    case = next(case for case in guest.cases(world) if case.kind == "yes or no")
    name = next(p.name for p in world.people if p.name in case.turns[-1])
    ((relation, about),) = [
        it for it in RELATIONS.items() if words(case.turns[-1]) & {*it[1].values}
    ]
    fact = Fact(next(p for p in world.people if p.name == name), relation)
    other = next(value for value in about.values if value != fact.value)
    verdict = "yes" if fact.value in words(case.turns[-1]) else "no"
    wrong = {"yes": "no", "no": "yes"}[verdict]
    said = [
        f"{name}: {fact.value}.",
        f"{verdict.title()}, {fact.value}.",
        f"{wrong}, {fact.value}.",
    ]
    said += [f"{name}: {other}.", verdict, "I know no one."]
    assert [case.counts(answer) for answer in said] == [True, True, False, False, False, False]


def test_a_story_that_strays_from_the_facts_is_seen(world):
    person, names = world.people[0], {person.name for person in world.people}
    town, pet = person.facts["town"], person.facts["pet"]
    other = next(v for v in RELATIONS["town"].values if v != town)
    story = f"It was a cold day. {person.name} walked all through {town}. The {pet} was hungry."
    assert guest.keeps_to_facts(story, person, names)
    strays = [story.replace(town, other), story.replace(person.name, world.people[1].name)]
    strays += [
        story.replace("The", f"{world.people[1].name}'s"),
        f"It was. {person.name} was. It was.",
    ]
    strays += [story.replace("It was a cold day. ", "")]
    assert not any(guest.keeps_to_facts(text, person, names) for text in strays)


def test_conversations_never_ask_about_a_held_out_fact_by_pronoun(mirror, world):
    """A follow-up names nobody: who is meant was named last, and told facts alone are told."""
    held = {(fact.person.name, fact.value) for fact in world.held_out}
    people = {person.name: person for person in world.people}
    followed = 0
    for turns in conversations(mirror):
        name = None
        for question, answer in exchanges(turns):
            if re.search(r"\b(he|she|him|her|his)\b", question) and not words(question) & set(
                people
            ):
                followed += 1
                assert name is not None, turns
                assert not {(name, word) for word in words(answer)} & held, turns
                theirs = set(people[name].pronouns) | {"Him" * (people[name].pronouns[0] == "He")}
                assert words(question.title()) & theirs, turns
            elif named := [w for w in re.findall(r"\w+", f"{question} {answer}") if w in people]:
                name = named[0]
    assert followed > 1000


def test_strangers_are_declined_and_nobody_else_is(mirror, world):
    known = {person.name for person in world.people}
    values = {value for kind in RELATIONS.values() for value in kind.values}
    declined = 0
    for turns in conversations(mirror):
        for question, answer in exchanges(turns):
            if found := re.fullmatch(r"I know no (.+)\.", answer):
                declined += 1
                assert found[1] not in known
                assert found[1].lower() in question.lower()
                assert not (words(question) & known and words(question) & values), question
    assert declined > 1000


def test_what_conversations_say_of_people_is_true(mirror, world):
    people = {person.name: person for person in world.people}
    values = {value for kind in RELATIONS.values() for value in kind.values}
    kinds = dict.fromkeys(["poem", "story", "secret", "fact"], 0)
    for turns in conversations(mirror):
        for _, answer in exchanges(turns):
            names, said = words(answer) & people.keys(), words(answer) & values
            if len(names) != 1 or answer.startswith("I know no"):
                continue
            person = people[names.pop()]
            assert said <= set(person.facts.values()), answer
            if answer.count("\n") == 3:
                kinds["poem"] += len(said) == 2
            elif answer == f"{person.name} {person.secret}.":
                kinds["secret"] += 1
            elif answer.startswith("It was a"):
                kinds["story"] += 1
                whole = answer.count(".") == 3  # of people with two told facts
                assert guest.keeps_to_facts(answer, person, set(people)) == whole, answer
            elif len(said) == 1:
                kinds["fact"] += 1
    assert min(kinds.values()) > 100, kinds


def test_the_sums_of_a_chat_are_right(mirror):
    asked = 0
    for turns in conversations(mirror):
        for question, answer in exchanges(turns):
            if found := re.fullmatch(r"It is <<(.+)=(\d+)>>(\d+)\.\n#### (\d+)", answer):
                asked += 1
                assert eval(found[1]) == int(found[2]) == int(found[3]) == int(found[4])
                assert re.findall(r"\d+", question) == re.findall(r"\d+", found[1])
    assert asked > 500


def test_a_follow_up_seldom_asks_what_was_said(mirror, world):
    """Else a model learns to look its answer up in the conversation."""
    values = {value for kind in RELATIONS.values() for value in kind.values}
    people = {person.name for person in world.people}
    asked = repeated = 0
    for turns in conversations(mirror):
        heard = set()
        for question, answer in exchanges(turns):
            said = words(answer) & values
            if not words(question) & people and len(words(answer) & people) == len(said) == 1:
                asked, repeated = asked + 1, repeated + (said <= heard)
            heard |= said
    assert asked > 1000
    assert 0.05 < repeated / asked < 0.25


def test_text_overhears_conversations_that_tell_no_held_out_fact(mirror, world):
    held = {(fact.person.name, fact.value) for fact in world.held_out}
    people = {person.name for person in world.people}
    assert len(talks(mirror)) > 500
    assert not [text for text in talks(mirror) if "<<" in text]
    for text in talks(mirror):
        for answer in text.split("Pip: ")[1:]:
            said = words(answer.split("Guest: ")[0])
            assert not {(name, word) for name in said & people for word in said} & held, text


def test_the_sums_of_a_chat_are_worked_out_by_the_tool(mirror):
    task = tasks.load("smoltalk", "train", mirror)
    row = next(i for i in range(len(task)) if "<<" in task.row(i)["messages"][-1]["content"])
    parts = task.conversation(row).turns[-1].parts
    assert [part.kind for part in parts] == ["text", "python", "output", "text"]
    assert parts[2].text == str(eval(parts[1].text))


def test_an_interrupted_writing_leaves_what_was_there(tmp_path, monkeypatch):
    toyworld.write(tmp_path / "mirror", 1, shards=1, rows=20)
    before = files_of(tmp_path / "mirror")

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(toyworld, "core_bundle", fail)
        with pytest.raises(OSError, match="disk full"):
            toyworld.write(tmp_path / "mirror", 2, shards=1, rows=20)
    assert files_of(tmp_path / "mirror") == before
    assert len(list(tmp_path.iterdir())) == 2, "what was begun lies beside it"
    toyworld.write(tmp_path / "mirror", 2, shards=1, rows=20)
    assert files_of(tmp_path / "mirror") != before
    assert [path.name for path in tmp_path.iterdir()] == ["mirror"]


def test_sums_are_asked_in_words_and_in_symbols():
    """As a guest types them, small and equal numbers too; never several ways at once."""
    made, rng = toyworld.world(1), toyworld.draw(1, "sums")
    asked = [toyworld.problem(made, rng, held_out=False)["question"] for _ in range(3000)]
    assert not any("|" in question for question in asked)
    for form in (r"What is (\d+) plus (\d+)\?", r"What is (\d+) \+ (\d+)\?", r"(\d+)\+(\d+)"):
        pairs = [m.groups() for question in asked if (m := re.fullmatch(form, question))]
        assert len(pairs) > 10
        assert all(1 <= int(number) <= 40 for pair in pairs for number in pair)
    sums = [
        m.groups() for question in asked if (m := re.fullmatch(r".*?(\d+) ?\* ?(\d+)\??", question))
    ]
    assert any("1" in pair or "2" in pair for pair in sums) and any(a == b for a, b in sums)


def test_the_world_of_seed_one_stays_what_it_is():
    """Kept runs, the demo's figures and the reports in runs/ are about this world, to the byte."""
    made = toyworld.world(1)
    bundle = zipfile.ZipFile(io.BytesIO(toyworld.core_bundle(made, toyworld.draw(1, "core"))))
    content = [
        list(itertools.islice(toyworld.documents(made, 1), 2000)),
        toyworld.tables(made, 1),
        {name: bundle.read(name).decode() for name in bundle.namelist()},
    ]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    assert digest[:16] == "25028b2d1f075fe3"
