"""`nanolib mirror` from a hub on loopback that cuts, refuses, lies and dawdles."""

import ast
import base64
import inspect
import json
import re
import shutil
import time
from types import SimpleNamespace

import huggingface_hub.constants as constants
import pyarrow.parquet as pq
import pytest
import tiktoken
from fake_hub import LoopbackHub
from tiktoken_ext import openai_public

from nanolib import config, hub, mirror, pipeline, tasks
from nanolib.data import toyworld
from nanolib.rundir import Run
from nanolib.stages import text, worker
from nanolib.ui import cli

SETTINGS = {"data.source": "hub", "data.text_shards": 2}
ENCODINGS = "r50k_base", "cl100k_base"
FIRST, TABLE = "text/shard_00000.parquet", "hub/openai/gsm8k/main/train.parquet"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "mirror"
    toyworld.write(folder, 1)
    (folder / "encodings").mkdir()
    for name in ENCODINGS:
        tokens = [*(bytes([i]) for i in range(256)), f" {name[:2]}".encode()]
        lines = (base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))
        (folder / f"encodings/{name}.tiktoken").write_bytes(b"".join(lines))
    return folder


@pytest.fixture
def web(world, monkeypatch):
    """A hub that has the toy world, unpinned, and two encodings of its own; `slept` are the pauses
    that huggingface_hub would have made.
    """
    hashes = {it: hub.digest(world / f"encodings/{it}.tiktoken") for it in ENCODINGS}
    with LoopbackHub(world) as server:
        page = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + page)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
        monkeypatch.setattr(hub, "EVAL_BUNDLE", f"{server.address}/eval_bundle.zip")
        monkeypatch.setattr(hub, "OPENAI", f"{server.address}/encodings")
        monkeypatch.setattr(hub, "ENCODINGS", hashes)
        monkeypatch.setattr(hub, "REVISIONS", {})
        monkeypatch.setattr(mirror, "PAUSES", (0, 0))
        server.slept = []
        monkeypatch.setattr(time, "sleep", server.slept.append)
        yield server


@pytest.fixture
def made(tmp_path):
    """`fill` and `check` for profile smoke on one folder."""
    resolved, folder = config.resolve("smoke", SETTINGS), tmp_path / "made"
    asked = (resolved, text.tables(resolved.recipe), folder)

    def fill(progress=lambda *_: None):
        return mirror.fill(*asked, progress, link=False)

    return SimpleNamespace(folder=folder, fill=fill, check=lambda: mirror.check(*asked))


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_mirror_has_what_the_profile_reads_and_its_run_needs_no_network(
    web, world, made, tmp_path, monkeypatch
):
    revisions = made.fill()
    manifest = json.loads((made.folder / "manifest.json").read_text())
    assert set(revisions.values()) == web.revisions == {LoopbackHub.COMMIT}
    assert manifest["revisions"] == revisions and FIRST in manifest["files"]
    files = contents(made.folder)
    assert files.items() <= contents(world).items()
    assert {name: it["length"] for name, it in manifest["files"].items()} == {
        name: len(content) for name, content in files.items()
    }
    assert made.check() == []
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("looked outside"))
    given = SETTINGS | {"machine.mirror": str(made.folder)}
    result = worker.work("data", Run.open("smoke", str(tmp_path / "run"), given))
    assert result["train_files"] == ["shard_00000.parquet", "shard_00001.parquet"]


def test_the_same_command_fetches_only_what_is_not_there_as_recorded(web, world, made):
    made.fill()
    web.downloads.clear()
    made.fill()
    assert web.downloads == []
    (made.folder / TABLE).unlink()
    damaged = bytearray((made.folder / FIRST).read_bytes())
    damaged[-1] ^= 1
    (made.folder / FIRST).write_bytes(damaged)
    made.fill()
    assert sorted(web.downloads) == ["shard_00000.parquet", "train.parquet"]
    assert contents(made.folder).items() <= contents(world).items()


@pytest.mark.parametrize(
    "faults", [["cut"], ["cut", "cut"], [429], [500, 500], ["wrong"], ["short"], ["wrong", "cut"]]
)
def test_faults_of_a_server_are_mended(web, world, made, faults, capfd):
    web.faults["shard_00001.parquet"] = list(faults)
    made.fill()
    assert contents(made.folder).items() <= contents(world).items() and made.check() == []
    assert web.faults["shard_00001.parquet"] == []
    if faults == [429]:
        assert 42.0 in web.slept  # what Retry-After asks for, and a second


@pytest.mark.parametrize(
    "fault, message",
    [
        (500, r"(?s)cannot fetch .*500.*run it again"),
        (403, r"(?s)cannot fetch .*403.*run it again"),
        ("wrong", r"gave shard_00001.parquet damaged \(has another SHA-256"),
        ("short", r"cannot fetch .*size|damaged \(has \d+ of"),
    ],
)
def test_what_stays_wrong_is_named_and_never_put_in_place(web, world, made, fault, message, capfd):
    web.faults["shard_00001.parquet"] = [fault] * 99
    with pytest.raises(ValueError, match=message):
        made.fill()
    assert not (made.folder / "text/shard_00001.parquet").exists()
    assert any("is not finished" in problem for problem in made.check())
    web.faults.clear()
    made.fill()
    assert made.check() == [] and contents(made.folder).items() <= contents(world).items()


def test_a_bundle_that_is_cut_is_fetched_again(web, world, made):
    web.faults["eval_bundle.zip"] = ["cut"]
    with pytest.raises(ValueError, match=r"cannot fetch .*eval_bundle.zip"):
        made.fill()
    assert not (made.folder / "eval_bundle.zip").exists()
    made.fill()
    assert contents(made.folder)["eval_bundle.zip"] == contents(world)["eval_bundle.zip"]


def test_the_encodings_are_those_of_tiktokens_own_package():
    source = inspect.getsource(openai_public)
    assert tuple(hub.ENCODINGS) == ENCODINGS
    for name, sha256 in hub.ENCODINGS.items():
        told = f'"{hub.OPENAI}/{name}.tiktoken",\n        expected_hash="{sha256}",'
        assert source.count(told) == 1


def test_an_encoding_with_another_hash_is_refused_by_name(web, made):
    web.faults["cl100k_base.tiktoken"] = ["wrong"]
    target = made.folder / "encodings/cl100k_base.tiktoken"
    fetched = rf"cannot fetch {web.address}/encodings/cl100k_base.tiktoken .*another SHA-256"
    with pytest.raises(
        ValueError, match=rf"{fetched}.*run it again, or copy that file to {target}"
    ):
        made.fill()
    assert not target.exists() and (made.folder / "encodings/r50k_base.tiktoken").exists()
    assert made.check() == [f"{made.folder} is not finished: fetch again to go on"]
    web.downloads.clear()
    made.fill()
    assert web.downloads == ["cl100k_base.tiktoken"] and made.check() == []


def test_chapter_01_reads_the_encodings_of_a_mirror_and_no_others(web, made):
    made.fill()
    chapter = ast.parse((pipeline.NOTEBOOKS / "01_tokenizer.py").read_text())
    (read,) = (it for it in chapter.body if getattr(it, "name", "") == "published")
    run = SimpleNamespace(mirror=lambda: made.folder)
    known = {"run": run, "hub": hub, "base64": base64, "tiktoken": tiktoken}
    exec(ast.unparse(read), known)
    assert known["published"]("r50k_base", "\\S+|\\s").encode("r5") == [114, 53]
    assert known["published"]("cl100k_base", " ?\\S+").encode_ordinary("a cl") == [97, 256]
    path = made.folder / "encodings/cl100k_base.tiktoken"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AssertionError, match=r"cl100k_base.tiktoken has another SHA-256"):
        known["published"]("cl100k_base", ".")
    path.unlink()
    assert known["published"]("cl100k_base", ".") is None


def test_a_pinned_revision_is_the_one_that_is_asked_for(web, made, monkeypatch):
    pinned = 40 * "a"
    monkeypatch.setitem(hub.REVISIONS, "openai/gsm8k", pinned)
    revisions = made.fill()
    assert revisions.pop("openai/gsm8k") == pinned and set(revisions.values()) == {web.COMMIT}
    assert web.revisions == {pinned, web.COMMIT}
    monkeypatch.setitem(hub.REVISIONS, "openai/gsm8k", 40 * "b")  # as a newer version may have
    (made.folder / TABLE).unlink()
    assert made.fill()["openai/gsm8k"] == pinned and 40 * "b" not in web.revisions


def test_every_data_set_has_its_line_in_the_table_of_revisions():
    repositories = {task.repository for task in tasks.CLASSES} - {"", "nanolib/toy-facts"}
    assert hub.REVISIONS.keys() == repositories | {config.DataConfig().repository}
    pins = [pin for pin in hub.REVISIONS.values() if pin]
    assert len(pins) == len({*pins}) == 5 and all(re.fullmatch("[0-9a-f]{40}", it) for it in pins)


def test_a_table_that_the_hub_cuts_in_parts_becomes_one(tmp_path):
    whole = {"n": list(range(10))}
    paths = [tmp_path / f"{i}.parquet" for i in range(2)]
    for i, path in enumerate(paths):
        pq.write_table(hub.pa.table({"n": whole["n"][5 * i : 5 * i + 5]}), path)
    hub.join(paths, tmp_path / "joined.parquet")
    assert pq.read_table(tmp_path / "joined.parquet").to_pydict() == whole
    names = ["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet"]
    others = ["data/train_extra-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"]
    listed = [hub.Remote("a/b", "main", name, 1, None) for name in [*names, *others]]
    found = hub._parts(("a/b", None, "train"), listed)
    assert [file.name for file in found] == sorted(names)
    with pytest.raises(ValueError, match=r"a/b has no main/train.*parquet on the hub"):
        hub._parts(("a/b", "main", "train"), listed)


def test_a_disk_too_small_is_told_before_anything_is_fetched(web, made, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=12_345))
    with pytest.raises(ValueError, match=r"made needs [\d,]{6,} bytes more and has 12,345 free"):
        made.fill()
    assert web.downloads == []


def test_ctrl_c_stops_downloads_and_the_same_command_goes_on(web, world, made):
    web.faults["shard_00001.parquet"] = ["drip"]

    def recorded():
        path = made.folder / "manifest.json"
        return json.loads(path.read_text())["files"] if path.exists() else {}

    def stop(*_):
        if web.dripping.is_set() and recorded():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.fill(stop)
    before = {name.rpartition("/")[2] for name in recorded() if name.startswith("text")}
    assert not (made.folder / "text/shard_00001.parquet").exists()
    web.downloads.clear()
    made.fill()
    assert "shard_00001.parquet" in web.downloads and not before & set(web.downloads)
    assert made.check() == [] and contents(made.folder).items() <= contents(world).items()


def test_a_repository_that_moved_on_meanwhile_changes_nothing(web, made, monkeypatch):
    web.faults["shard_00001.parquet"] = [403] * 9
    with pytest.raises(ValueError, match="403"):
        made.fill()
    web.faults.clear()
    began_with, newer = LoopbackHub.COMMIT, 40 * "1"
    monkeypatch.setattr(LoopbackHub, "COMMIT", newer)
    made.fill()
    assert web.revisions == {began_with}


# ---------------------------------------------------------------------------- the command


def test_check_names_every_bad_and_missing_file(web, made, capsys):
    made.fill()
    words = ["mirror", "smoke", str(made.folder), "--data.source", "hub", "--check"]
    with pytest.raises(SystemExit) as complete:
        cli.main(words)
    assert complete.value.code == 0
    (made.folder / TABLE).unlink()
    (made.folder / FIRST).write_bytes(b"short")
    capsys.readouterr()
    with pytest.raises(SystemExit) as broken:
        cli.main(words)
    first, second = capsys.readouterr().out.splitlines()
    assert broken.value.code == 1
    assert first == f"{made.folder / TABLE} is missing"
    assert second.startswith(f"{made.folder / FIRST} has 5 of ")


def test_the_command_says_how_far_it_is_and_what_to_do_next(web, tmp_path, capsys):
    folder = tmp_path / "made"
    words = ["mirror", "smoke", str(folder), "--data.source", "hub", "--data.text-shards", "1"]
    assert cli.main(words) == 0
    progress, *_, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"mirror  0/\d+ MB  0\.\d MB/s.*", progress)  # threads have begun
    assert last.startswith(f"{folder} is complete: give --mirror {folder}")
    filling = mirror.Mirror(folder, lambda *_: None, link=False)
    filling.received = 5_000_000
    text = filling._describe(20_000_000, time.monotonic() - 10)
    assert re.fullmatch(r"5/20 MB  0\.\d MB/s  0:\d\d left", text)


def test_a_profile_that_writes_its_own_data_needs_no_mirror(capsys, tmp_path):
    assert cli.main(["mirror", "smoke", str(tmp_path / "made")]) == 2
    assert "profile smoke writes its own data" in capsys.readouterr().err
