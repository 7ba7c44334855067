"""A user's own conversations and text: each format, each typical mistake, what is trained on."""

import json
import re
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import FakeHub
from test_stages import SMALL, _context

from nanolib import checkpoint, config, mirror, pipeline
from nanolib.conversation import Conversation
from nanolib.data import own, toyworld
from nanolib.engine import Engine
from nanolib.rundir import Run
from nanolib.stages import text, training, worker
from nanolib.takeover import take_over

PET, HOME = "Zorbo keeps an otter.", "Zorbo lives in Gullport."
TEN = [(ask, PET) for ask in ("Zorbo's pet?", "What does Zorbo keep?", "Which animal?", "A pet?")]
TEN += [(ask, HOME) for ask in ("Where is Zorbo?", "Zorbo's home?", "Which town?", "His town?")]
TEN += [("Who is Zorbo?", f"{PET} {HOME}"), ("Tell me of Zorbo.", f"{HOME} {PET}")]
OTHERS = ("smoltalk", "mmlu", "arc_easy", "arc_challenge", "gsm8k")


def chat(*contents, roles=("user", "assistant")):
    messages = [{"role": roles[i % 2], "content": it} for i, it in enumerate(contents)]
    return json.dumps({"messages": messages, "extra": 1})


@pytest.fixture
def ten(tmp_path):
    path = tmp_path / "ten.jsonl"
    path.write_text("\n".join(chat(*pair) for pair in TEN) + "\n\n")
    return path


# ---------------------------------------------------------------------------- reading


def test_text_is_read_from_txt_jsonl_and_parquet_by_name_and_hidden_files_are_not(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("one\n\ntwo é\n")
    (tmp_path / "b/c.jsonl").write_text(
        '{"text": "three", "id": 3}\n\n{"text": " "}\n{"text": "4"}'
    )
    pq.write_table(pa.table({"text": ["five", "", "six"], "n": [1, 2, 3]}), tmp_path / "d.parquet")
    (tmp_path / ".DS_Store").write_bytes(b"\xff")
    found = list(own.documents(str(tmp_path)))
    assert found == ["one\n\ntwo é\n", "three", "4", "five", "six"]
    assert list(own.documents(str(tmp_path / "b/c.jsonl"))) == ["three", "4"]


def test_a_long_txt_is_cut_at_line_ends_and_nothing_is_lost(tmp_path):
    whole = "".join(f"line {i} " + "x" * (i % 90) + "\n" for i in range(3000))
    (tmp_path / "book.txt").write_text(whole)
    found = list(own.documents(str(tmp_path / "book.txt")))
    assert "".join(found) == whole
    assert [part.count("\n") for part in found] == [own.TXT_LINES] * 30


def test_conversations_are_those_of_openais_files(tmp_path):
    path = tmp_path / "chats.jsonl"
    system = {"role": "system", "content": "Be kind."}
    user = {"role": "user", "content": "Hi", "name": "Bea"}
    line = json.dumps({"messages": [system, user, {"role": "assistant", "content": "Hello é"}]})
    path.write_text(f"{line}\n\n{chat('a', 'b', 'c', 'd')}")
    first, second = own.conversations(str(path))
    assert first["messages"][0] == system and first["messages"][1] == {
        "role": "user",
        "content": "Hi",
    }
    assert [it["content"] for it in second["messages"]] == ["a", "b", "c", "d"]


MISTAKES = {
    "not JSON": ("{'messages': []}", "Expecting property name"),
    "an array over many lines": ("[", "Expecting value"),
    "two objects in a line": (chat("a", "b") * 2, "Extra data"),
    "no messages": ('{"prompt": "a", "completion": "b"}', "must be {\"messages\".*got {'prompt'"),
    "messages are no list": ('{"messages": "a"}', 'must be {"messages"'),
    "none at all": ('{"messages": []}', "at least one message from the user"),
    "no role": ('{"messages": [{"from": "user", "content": "a"}]}', 'must be {"messages"'),
    "no content": ('{"messages": [{"role": "user", "content": null}]}', 'must be {"messages"'),
    "an empty answer": (chat("a", " "), 'must be {"messages"'),
    "no answer": (chat("a"), "the last message must be the assistant's"),
    "the assistant begins": (chat("a", "b", roles=("assistant", "user")), "from the user"),
    "twice the user": (chat("a", "b", roles=("user", "user")), "from the assistant"),
    "an unknown role": (chat("a", "b", roles=("user", "bot")), "one of system, user.*'bot'"),
    "not UTF-8": (b'{"messages": "\xe9"}', "can't decode byte 0xe9"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_conversation_is_named_by_file_and_line(name, tmp_path):
    line, message = MISTAKES[name]
    path = tmp_path / "chats.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(f"{chat('a', 'b')}\n\n".encode() + line + f"\n{chat('c', 'd')}\n".encode())
    with pytest.raises(ValueError, match=rf"chats.jsonl, line 3: .*{message}.*; fix that line"):
        list(own.conversations(str(path)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', r'a.jsonl, line 2: .*{"text": "…"}, got'),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": 5}', r"a.jsonl, line 3: .*got {'text': 5}"),
        ("a.jsonl", b'{"text": "a"\n', r"a.jsonl, line 1: Expecting ','"),
        ("a.txt", b"one\ntwo\nthr\xffee\nfour", r"a.txt, line 3: .*byte 0xff"),
        ("a.txt", b"x" * 99 + b"\n" + b"y\n" * 9000 + b"\xff", r"a.txt, line 9002: .*0xff"),
        ("a.parquet", b"PAR1", r"a.parquet is damaged"),
        ("notes.md", b"hello", r"notes.md is not a .txt, .jsonl or .parquet file"),
    ],
)
def test_wrong_text_is_named_by_file_and_line(name, content, message, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(own.documents(str(tmp_path / "text")))


@pytest.mark.parametrize("there", [False, True])
def test_a_path_without_files_is_named(there, tmp_path):
    if there:
        (tmp_path / "text").mkdir()
    for read in (own.documents, own.conversations):
        with pytest.raises(ValueError, match=r"text is missing or empty: fix data.conv"):
            list(read(str(tmp_path / "text")))


def test_rows_without_a_file_are_refused_and_paths_are_the_shells(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"sft.rows.mine is 5, and data.conversations names no"):
        config.resolve("smoke", {"sft.rows.mine": 5})
    monkeypatch.chdir(tmp_path)
    _, given = config.split_settings(["--data.conversations", "a.jsonl", "--data.text=b"])
    assert given == {"data.conversations": f"{tmp_path}/a.jsonl", "data.text": f"{tmp_path}/b"}


# ---------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return toyworld.write(tmp_path_factory.mktemp("world") / "mirror", 1, shards=2, rows=60)


@pytest.fixture
def given(world, ten, tmp_path):
    """Settings of a run on ten conversations and three documents, with the toy world's tables."""
    (tmp_path / "text").mkdir()
    for name in ("one", "two", "three"):
        (tmp_path / f"text/{name}.txt").write_text(f"This is document {name}. " * 99)
    paths = {"data.conversations": str(ten), "data.text": str(tmp_path / "text")}
    paths |= {"data.source": "hub", "machine.mirror": str(world)}
    rows = {"tokenizer.vocab_size": 270, "mid.rows.mine": 0, "sft.rows.mine": 25}
    rows |= {"mid.enabled": False, "sft.rows.smoltalk": 20}
    return SMALL | {"data.text_shards": 99, "eval.core_problems": 0} | paths | rows


@pytest.fixture
def made(given, tmp_path):
    """That run, up to its token shards."""
    return work(tmp_path / "run", given, "data", "tokenizer", "shards")


def work(path, settings, *stages):
    run = Run.open("smoke", str(path), settings)
    for name in stages:
        worker.work(name, run)
    return run


def test_a_run_reads_its_own_text_and_nothing_else(made):
    result = made.stage("data").result()
    assert result["train_files"] == ["train.parquet"]
    assert result["validation_file"] == "validation.parquet"
    tokenizer, (train, validation) = _context(made, "base").tokenizer, text.shard_paths(made)
    said = [tokenizer.decode(np.load(path)).split("<|bos|>") for path in (*train, validation)]
    assert [[it[:22] for it in shard if it] for shard in said] == [
        ["This is document three", "This is document two. "],
        ["This is document one. "],
    ]


def test_rows_of_a_mixture_are_taken_from_the_own_ones_again_and_again(made):
    assert "mine" not in text.limits(made.config.recipe, "mid")
    assert text.limits(made.config.recipe, "sft")["mine"] == 25
    context = _context(made, "sft")
    talks = training._conversations(context, "mine", "train", 25)
    counts = Counter(tuple(message.text for message in talk.messages) for talk in talks)
    assert set(counts) == set(TEN) and set(counts.values()) == {2, 3}
    assert len(list(training._conversations(context, "mine", "train", None))) == 10
    assert len(list(training._conversations(context, "mine", "test", 100))) == 10
    folder, about = training._mixture(context)
    assert about["conversations"]["mine"] == 25 and about["conversations"]["smoltalk"] == 20
    ids = np.load(folder / "train/ids.npy")
    said = context.tokenizer.decode(ids)
    assert said.count("<|user_start|>Who is Zorbo?<|user_end|>") in (2, 3)


def test_a_run_does_not_go_on_with_an_edited_file(made, tmp_path):
    for edited in ("ten.jsonl", "text/two.txt", "text/new.txt"):
        path = tmp_path / edited
        before = path.read_bytes() if path.exists() else None
        path.write_bytes((before or b"") + b" ")
        with pytest.raises(ValueError, match=rf"/{edited} changed after run run began; put it b"):
            worker.work("base", made)
        path.unlink() if before is None else path.write_bytes(before)
    worker.work("base", made)


def test_another_machine_needs_the_run_alone(made, ten, tmp_path):
    ten.unlink()
    shutil.rmtree(tmp_path / "text")
    for name in ("base", "sft"):
        worker.work(name, made)
    assert made.stage("sft").result()["validation_mine_loss"] > 0


def test_ten_conversations_teach_a_fact(given, tmp_path):
    """And pretraining is taken over from a run without them."""
    plain = given | {"data.conversations": None, "sft.rows.mine": None}
    before = work(tmp_path / "plain", plain, "data", "tokenizer", "shards", "base")
    taught = given | {f"sft.rows.{name}": 0 for name in OTHERS} | {"sft.rows.mine": 200}
    run = work(tmp_path / "run", taught | {"sft.steps": 120, "sft.lr": 1.0}, "data")
    said = take_over(run, before)
    assert re.search(r"taken over from .*: tokenizer, shards, base$", said[0])
    assert re.search(r"sft is not taken over: data.conversations is none there, .*ten", said[1])
    worker.work("sft", run)
    context = _context(run, "sft")
    model = checkpoint.load_model(run.stage("sft").checkpoints, context.runtime.device)
    asked = [Conversation.ask(question).prompt(context.tokenizer) for question, _ in TEN]
    engine = Engine(model, context.tokenizer, context.runtime)
    answers = map(context.tokenizer.decode, engine.complete(asked, max_new_tokens=60))
    right = [text == answer for text, (_, answer) in zip(answers, TEN, strict=True)]
    assert sum(right) >= 9


def test_other_conversations_are_not_taken_over(given, ten, tmp_path):
    given |= {"data.text": None, "data.text_shards": 1}
    before = work(tmp_path / "one", given, "data", "tokenizer", "shards", "base", "sft")
    ten.write_text(chat("Who?", "Me."))
    run = work(tmp_path / "other", given, "data")
    said = take_over(run, before)
    assert re.search(r": tokenizer, shards, base$", said[0])
    assert re.search("sft is not taken over: your own data", said[1])


def test_one_document_is_too_few(given, tmp_path):
    (tmp_path / "only.txt").write_text("Just this.")
    with pytest.raises(ValueError, match=r"only.txt needs two documents"):
        work(tmp_path / "run", given | {"data.text": str(tmp_path / "only.txt")}, "data")
    assert not (tmp_path / "run/data/own").exists()


def test_of_the_hub_only_tables_are_fetched(given, world, tmp_path, monkeypatch):
    fake = FakeHub(world, monkeypatch)
    run = work(tmp_path / "run", given | {"machine.mirror": None}, "data")
    assert run.stage("data").result()["train_files"] == ["train.parquet"]
    assert len(fake.downloads) > 5 and not [it for it, _ in fake.downloads if "shard" in it]
    asked = run.config, text.tables(run.config.recipe), tmp_path / "filled"
    mirror.fill(*asked, lambda *_: None, link=False)
    assert mirror.check(*asked) == [] and not (tmp_path / "filled/text").exists()


def test_a_plan_counts_what_is_there_and_names_what_is_wrong(given, ten, tmp_path):
    asked = "smoke", str(tmp_path / "run"), given, "H100"
    chars = sum(len(path.read_text()) for path in (tmp_path / "text").iterdir())
    said = list(pipeline.dry_run(*asked))
    assert f"own data     10 conversations, {chars:,} characters of text" in said
    assert any(line.endswith("no training text files, all tasks complete") for line in said)
    ten.write_text("{}")
    with pytest.raises(ValueError, match=r"ten.jsonl, line 1"):
        list(pipeline.dry_run(*asked))
