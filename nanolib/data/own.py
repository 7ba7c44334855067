"""The user's own data: conversations (data.conversations) and pretraining text (data.text).

The data stage validates it and copies it to ``data/own`` in the run, in a mirror's layout. Later
stages read the copy, so they can run on other machines; the originals must not change if present.
"""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanolib import hub
from nanolib.config import REPOSITORY, DataConfig
from nanolib.conversation import Conversation
from nanolib.rundir import Run, whole_folder
from nanolib.tasks import SmolTalk

TXT_LINES = 100  # per document of a .txt file, cut so that some of it is held out
AT_ONCE, HELD_OUT = 1000, 100  # documents per write; 1 in HELD_OUT is for validation
MESSAGES = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'


def write(run: Run, progress: hub.Progress) -> dict[str, str]:
    """Validate and copy a run's own data; returns the digests of the original files."""
    data = run.config.recipe.data
    files = [*_files(data.conversations), *_files(data.text)]
    if files:
        with whole_folder(run.own()) as draft:
            chats = pa.Table.from_pylist([*conversations(data.conversations)])
            for split in ("train", "test") if chats else ():  # all rows in both; read as SmolTalk
                path = draft / hub.table_path(SmolTalk.source(split))
                path.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(chats, path)
            if data.text:
                _write_text(data.text, draft / "text", progress)
    return {str(path): hub.digest(path) for path in files}


def _write_text(given: str, folder: Path, progress: hub.Progress) -> None:
    schema, texts, count = pa.schema({"text": pa.string()}), documents(given), 0
    folder.mkdir()
    paths = (folder / f"{name}.parquet" for name in ("train", "validation"))
    train, held_out = (pq.ParquetWriter(path, schema) for path in paths)
    with train, held_out:
        while group := list(islice(texts, AT_ONCE)):
            held_out.write_table(pa.table({"text": group[::HELD_OUT]}, schema))
            del group[::HELD_OUT]
            train.write_table(pa.table({"text": group}, schema))
            progress(0, 1, f"{given}: {(count := count + len(group)):,} documents")
    if not count:
        raise ValueError(f"{given} needs two documents, one to train on and one for validation")


def check_unchanged(run: Run) -> None:
    data, recorded = run.config.recipe.data, run.stage("data").result().get("own", {})
    there = [path for it in (data.conversations, data.text) for path in _files(it, needed=False)]
    if changed := [str(it) for it in there if recorded.get(str(it)) != hub.digest(it)]:
        remedy = "put it back as it was, or start a new run with --run NAME"
        raise ValueError(f"{', '.join(changed)} changed after run {run.id} began; {remedy}")


def describe(data: DataConfig) -> Iterator[str]:
    """A line for the plan; ValueError if the data is malformed."""
    if data.conversations or data.text:
        chats = sum(1 for _ in conversations(data.conversations))
        chars = sum(map(len, documents(data.text)))
        yield f"own data     {chats:,} conversations, {chars:,} characters of text"


def _files(given: str | None, needed: bool = True) -> list[Path]:
    if given is None:
        return []
    path = REPOSITORY / Path(given).expanduser()
    found = sorted(it for it in (path, *path.rglob("[!.]*")) if it.is_file())
    if needed and not found:
        raise ValueError(f"{path} is missing or empty: fix data.conversations or data.text")
    return found


def conversations(given: str | None) -> Iterator[dict[str, list]]:
    for file in _files(given):
        yield from _parsed(file, _messages)


def documents(given: str | None) -> Iterator[str]:
    for file in _files(given):
        if file.suffix == ".parquet":
            found = hub.documents(file)
        elif file.suffix == ".jsonl":
            found = _parsed(file, _text)
        elif file.suffix == ".txt":
            lines = _parsed(file, bytes.decode)
            found = iter(lambda lines=lines: "".join(islice(lines, TXT_LINES)), "")
        else:
            raise ValueError(f"{file} is not a .txt, .jsonl or .parquet file: rename or remove it")
        yield from filter(str.strip, found)


def _messages(line: bytes) -> dict[str, list]:
    match json.loads(line):
        case {"messages": [*messages]} if all(map(_is_message, messages)):
            if Conversation.from_messages(messages).messages[-1].role != "assistant":
                raise ValueError("the last message must be the assistant's")
            return {"messages": [{k: it[k] for k in ("role", "content")} for it in messages]}
        case row:
            raise ValueError(f"it must be {MESSAGES}, got {row!s:.100}")


def _is_message(it: Any) -> bool:
    texts = [it.get(key) for key in ("role", "content")] if isinstance(it, dict) else [None]
    return all(isinstance(text, str) and text.strip() for text in texts)


def _text(line: bytes) -> str:
    match json.loads(line):
        case {"text": str(text)}:
            return text
        case row:
            raise ValueError(f'it must be {{"text": "…"}}, got {row!s:.100}')


def _parsed(path: Path, parse: Callable[[bytes], Any]) -> Iterator[Any]:
    """Parse each line, skipping blank ones in JSON; ValueError names file and line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip() or parse is bytes.decode:
                    yield parse(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}; fix that line") from None
