"""Files from a mirror, and bad input that is refused by name."""

import http.server
import io
import re
import threading
import zipfile
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import FakeHub

from nanolib import hub
from nanolib import mirror as mirrors
from nanolib.config import Config, Recipe, from_flat


def config(**flat) -> Config:
    return from_flat("test", {k.replace("__", "."): v for k, v in flat.items()})


def write(path, columns, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


@pytest.fixture
def mirror(tmp_path):
    for i in range(4):
        write(tmp_path / f"text/shard_{i}.parquet", {"text": [f"document {i}", "more"]})
    write(tmp_path / "hub/someone/questions/main/test.parquet", {"question": ["why?"]})
    write(tmp_path / "hub/someone/plain/train.parquet", {"question": ["how?"]})
    return tmp_path


def test_the_validation_shard_is_the_last_name_however_many_are_used(mirror):
    everything = hub.text_files(config(), mirror)
    assert [path.name for path in everything.train] == [f"shard_{i}.parquet" for i in range(3)]
    some = hub.text_files(config(data__text_shards=1), mirror)
    assert [path.name for path in some.train] == ["shard_0.parquet"]
    assert some.validation == everything.validation == mirror / "text/shard_3.parquet"
    assert list(hub.documents(some.validation)) == ["document 3", "more"]


def test_documents_come_in_order_whatever_is_read_ahead(tmp_path):
    """Of many row groups that are larger and smaller than what is read together."""
    texts = [f"{i} " * (i % 700) for i in range(5000)]
    for size in (7, 1500):
        path = write(tmp_path / "shard.parquet", {"text": texts}, row_group_size=size)
        assert list(hub.documents(path)) == texts


def test_tables(mirror):
    assert hub.table(("someone/questions", "main", "test"), mirror).to_pydict() == {
        "question": ["why?"]
    }
    assert hub.table(("someone/plain", None, "train"), mirror).num_rows == 1


def test_a_mirror_never_falls_through_to_the_hub(mirror, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("looked outside"))
    with pytest.raises(ValueError, match=r"someone/else/train.parquet is missing.*--mirror"):
        hub.table(("someone/else", None, "train"), mirror)


# ---------------------------------------------------------------------------- single files


def zipped(text: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("core.yaml", text)
    return buffer.getvalue()


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A server whose `body` is the bundle, of which it sends as many bytes as `sent` says."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            page.requests += 1
            self.send_response(200 if page.body else 404)
            self.send_header("Content-Length", str(len(page.body)))
            self.end_headers()
            self.wfile.write(page.body[: page.sent])

        def log_message(self, *_):
            pass

    page = SimpleNamespace(body=zipped(b"tasks" * 1000), sent=None, requests=0)
    page.cached = tmp_path / "home/.cache/nanolib/eval_bundle.zip"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path / "home")
        address = f"http://127.0.0.1:{server.server_port}/eval_bundle.zip"
        monkeypatch.setattr(hub, "EVAL_BUNDLE", address)
        yield page
        server.shutdown()


def test_a_download_cut_short_is_not_kept(web):
    web.sent = len(web.body) // 2
    with pytest.raises(
        ValueError, match=r"cannot fetch .*cut short.*--mirror DIR.*core_problems = 0"
    ):
        hub.fetch_bundle()
    assert not list(web.cached.parent.iterdir())
    web.sent = None
    assert hub.fetch_bundle().read_bytes() == web.body


def test_a_download_is_kept_and_a_damaged_one_is_named_and_fetched_again(web, capsys):
    for _ in range(2):
        assert hub.fetch_bundle() == web.cached
    assert web.requests == 1
    damaged = bytearray(web.body)
    damaged[1000] ^= 1
    for content, problem in ((web.body[:-30], "no zip file"), (damaged, "has damaged core")):
        web.cached.write_bytes(content)
        assert hub.fetch_bundle().read_bytes() == web.body
        assert re.search(f"{web.cached} .*{problem}.*: fetching it again", capsys.readouterr().out)


def test_a_page_that_is_not_the_bundle_is_refused(web):
    web.body = b"<html>Please log in</html>"
    with pytest.raises(ValueError, match=r"cannot fetch .*no zip file.*--mirror DIR"):
        hub.fetch_bundle()
    web.body = b""
    with pytest.raises(ValueError, match=r"cannot fetch .*404.*--mirror DIR"):
        hub.fetch_bundle()
    assert not list(web.cached.parent.iterdir())


# ---------------------------------------------------------------------------- bad text


def binary_text(path):
    """A text column whose bytes are not UTF-8, written the way a careless tool would."""
    bad = pa.array([b"fine", b"\xff\xfe broken"], pa.binary())
    strings = pa.StringArray.from_buffers(2, bad.buffers()[1], bad.buffers()[2])
    return write(path, {"text": strings})


BREAKAGES = {
    "size is 0 bytes": lambda path: path.write_bytes(b""),
    "is damaged .*magic bytes": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "has no rows": lambda path: write(path, {"text": pa.array([], pa.string())}),
    "column 'text' of strings, it has title .string": lambda path: write(path, {"title": ["x"]}),
    "column 'text' of strings, it has text .int64": lambda path: write(path, {"text": [1, 2]}),
}


@pytest.mark.parametrize("reason", BREAKAGES)
@pytest.mark.parametrize("name", ["shard_1.parquet", "shard_3.parquet"])
def test_a_bad_shard_is_refused_before_work_starts(mirror, reason, name):
    BREAKAGES[reason](mirror / "text" / name)
    with pytest.raises(ValueError, match=f"{name}.*{reason}"):
        hub.text_files(config(), mirror)


def test_text_that_is_not_utf8_or_missing_is_refused_when_read(mirror):
    with pytest.raises(ValueError, match=r"shard_1.*UTF8"):
        list(hub.documents(binary_text(mirror / "text/shard_1.parquet")))
    with pytest.raises(ValueError, match=r"shard_1.* 1 rows without text"):
        list(hub.documents(write(mirror / "text/shard_1.parquet", {"text": ["a", None]})))


def test_damage_in_the_middle_is_refused_when_read(mirror):
    path = mirror / "text/shard_1.parquet"
    write(path, {"text": [f"{i} some text {i * i}" for i in range(5000)]})
    data = bytearray(path.read_bytes())
    data[200:1200] = bytes(1000)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="shard_1"):
        assert len(list(hub.documents(path))) == 5000


@pytest.mark.parametrize("shards", [4, 99])
def test_more_shards_than_there_are_is_an_error(mirror, shards):
    with pytest.raises(ValueError, match=f"text_shards must be between 1 and 3 .*got {shards}"):
        hub.text_files(config(data__text_shards=shards), mirror)


def test_a_folder_that_is_no_mirror(tmp_path):
    with pytest.raises(
        ValueError, match=r"nowhere/text: 0 parquet files, text needs two; give --mirror DIR"
    ):
        hub.text_files(config(), tmp_path / "nowhere")
    write(tmp_path / "text/only.parquet", {"text": ["x"]})
    with pytest.raises(ValueError, match="1 parquet files, text needs two; give --mirror DIR"):
        hub.text_files(config(), tmp_path)


# ---------------------------------------------------------------------------- the hub


@pytest.fixture
def fetch(mirror, tmp_path, monkeypatch):
    """`mirror.fill` with links to the cache, from a hub that has the mirror's files."""
    fake = FakeHub(mirror, monkeypatch)

    def call(splits=(), **flat):
        folder = tmp_path / f"fetched-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        given = config(eval__core_problems=0, **flat)
        fake.revisions = mirrors.fill(given, splits, folder, lambda *_: None, link=True)
        return hub.text_files(given, folder), folder

    fake.fetch = call
    return fake


def test_the_hub_gives_as_many_shards_as_the_horizon_needs(fetch, mirror):
    size = hub.text_bytes(mirror / "text/shard_0.parquet")
    tokens = int(1.5 * size / hub.BYTES_PER_TOKEN)
    one_each = {"base__batch_tokens": 1, "model__sequence_len": 1, "sft__batch_tokens": 1}
    files, _ = fetch.fetch(base__steps=tokens, **one_each)
    assert [path.name for path in files.train] == ["shard_0.parquet", "shard_1.parquet"]
    assert sorted(name for name, _ in fetch.downloads) == [f"shard_{i}.parquet" for i in (0, 1, 3)]
    assert [path.name for path in fetch.fetch(data__text_shards=1)[0].train] == ["shard_0.parquet"]


def test_every_file_is_of_one_revision_and_looks_like_a_mirrors(fetch, mirror):
    splits = [("someone/questions", "main", "test"), ("someone/plain", None, "train")]
    files, folder = fetch.fetch(splits)
    assert {revision for _, revision in fetch.downloads} == {FakeHub.COMMIT}
    assert fetch.revisions == dict.fromkeys(
        (Recipe().data.repository, "someone/questions", "someone/plain"), FakeHub.COMMIT
    )
    assert [list(hub.documents(path)) for path in files.train] == [
        list(hub.documents(path)) for path in sorted((mirror / "text").glob("*"))[:3]
    ]
    for split in splits:
        tables = [hub.table(split, place) for place in (mirror, folder)]
        assert tables[0].to_pylist() == tables[1].to_pylist()


@pytest.mark.parametrize("wrong", ["size", "hash"])
def test_a_damaged_file_of_the_hubs_cache_is_named_and_fetched_again(fetch, mirror, wrong, capsys):
    path = mirror / "text/shard_0.parquet"
    whole = path.read_bytes()
    bad = whole[:-20] if wrong == "size" else bytes([whole[0] ^ 1]) + whole[1:]
    fetch.cached[path.name] = bad
    files, _ = fetch.fetch(data__text_shards=1)
    assert files.train[0].read_bytes() == whole
    problem = f"has {len(bad)} of {len(whole)} bytes" if wrong == "size" else "another SHA-256"
    assert re.search(f"shard_0.* {problem}.*: fetching it again", capsys.readouterr().out)
    fetch.cached[path.name] = fetch.fresh[path.name] = bad
    with pytest.raises(ValueError, match=r"gave shard_0.parquet damaged .*--mirror DIR"):
        fetch.fetch(data__text_shards=1)


def test_a_download_that_left_the_cache_is_named(fetch):
    files, folder = fetch.fetch()
    files.train[1].resolve().unlink()
    with pytest.raises(ValueError, match=r"shard_1.parquet was linked to .*gone: delete .*done"):
        hub.text_files(config(), folder)


def network_errors():
    """One of every family that huggingface_hub lets through."""
    import httpx2
    from huggingface_hub import errors

    reply = httpx2.Response(503, request=httpx2.Request("GET", "https://hub"))
    return [
        ConnectionError("no route"),
        httpx2.ConnectError("no route"),
        httpx2.ReadTimeout("no route"),
        httpx2.RemoteProtocolError("no route"),
        httpx2.InvalidURL("no route"),
        errors.HfHubHTTPError("no route", response=reply),
        errors.OfflineModeIsEnabled("no route"),
        errors.XetDownloadError("no route"),
        RuntimeError("no route"),
    ]


@pytest.mark.parametrize("error", network_errors(), ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("call", ["dataset_info", "hf_hub_download", "someone/plain"])
def test_no_network_says_what_to_do(fetch, error, call):
    fetch.broken[call] = error
    name = {"dataset_info": Recipe().data.repository, "hf_hub_download": ""}.get(call, call)
    message = f"cannot fetch {name}.*{type(error).__name__}: .*no route.*--mirror DIR.*toyworld"
    with pytest.raises(ValueError, match=message):
        fetch.fetch([("someone/plain", None, "train")])
