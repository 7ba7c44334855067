"""Files from a mirror, and bad input that is refused by name."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanolib import hub
from nanolib.config import Config, MachineConfig, Recipe, from_flat


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


def test_tables_and_single_files(mirror):
    assert hub.table("someone/questions", "test", "main", mirror).to_pydict() == {
        "question": ["why?"]
    }
    assert hub.table("someone/plain", "train", None, mirror).num_rows == 1
    (mirror / "eval_bundle.zip").write_text("")
    assert hub.eval_bundle(mirror) == mirror / "eval_bundle.zip"


def test_a_mirror_never_falls_through_to_the_hub(mirror, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("looked outside"))
    with pytest.raises(ValueError, match=r"someone/else/train.parquet is missing.*--mirror"):
        hub.table("someone/else", "train", None, mirror)


def test_the_bundle_is_fetched_once_or_not_at_all(mirror, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no eval_bundle.zip.*core_problems = 0"):
        hub.eval_bundle(mirror)
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path / "home")
    monkeypatch.setattr(hub, "EVAL_BUNDLE", (tmp_path / "web" / "eval_bundle.zip").as_uri())
    with pytest.raises(ValueError, match=r"cannot fetch .*eval_bundle.zip.*core_problems = 0"):
        hub.eval_bundle(None)
    assert not list((tmp_path / "home").rglob("*.zip*"))
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "eval_bundle.zip").write_bytes(b"tasks")
    fetched = hub.eval_bundle(None)
    (tmp_path / "web" / "eval_bundle.zip").unlink()
    assert hub.eval_bundle(None) == fetched and fetched.read_bytes() == b"tasks"


def binary_text(path):
    """A text column whose bytes are not UTF-8, written the way a careless tool would."""
    bad = pa.array([b"fine", b"\xff\xfe broken"], pa.binary())
    strings = pa.StringArray.from_buffers(2, bad.buffers()[1], bad.buffers()[2])
    return write(path, {"text": strings})


BREAKAGES = {
    "is empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "has no rows": lambda path: write(path, {"text": pa.array([], pa.string())}),
    "no column 'text' .it has title": lambda path: write(path, {"title": ["x"]}),
    "must hold strings, got int64": lambda path: write(path, {"text": [1, 2]}),
}


@pytest.mark.parametrize("reason", BREAKAGES)
@pytest.mark.parametrize("name", ["shard_1.parquet", "shard_3.parquet"])
def test_a_bad_shard_is_refused_before_work_starts(mirror, reason, name):
    BREAKAGES[reason](mirror / "text" / name)
    with pytest.raises(ValueError, match=f"{name}.*{reason}"):
        hub.text_files(config(), mirror)


def test_text_that_is_not_utf8_or_missing_is_refused_when_read(mirror):
    with pytest.raises(ValueError, match=r"shard_1.*not UTF-8"):
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
    with pytest.raises(ValueError, match="has no folder text"):
        hub.text_files(config(), tmp_path / "nowhere")
    write(tmp_path / "text/only.parquet", {"text": ["x"]})
    with pytest.raises(ValueError, match="1 parquet files; text needs at least two"):
        hub.text_files(config(), tmp_path)


def test_the_hub_gives_as_many_shards_as_the_horizon_needs(mirror, monkeypatch):
    import huggingface_hub

    fetched = []

    def download(repository, name, repo_type):
        fetched.append(name)
        return mirror / "text" / name

    names = ["README.md", *(f"shard_{i}.parquet" for i in (2, 0, 3, 1))]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: names)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    size = hub._text_bytes(mirror / "text/shard_0.parquet")
    tokens = int(1.5 * size / hub.BYTES_PER_TOKEN)
    recipe = {"base.steps": tokens, "base.batch_tokens": 1, "model.sequence_len": 1}
    files = hub.text_files(
        Config(profile="t", recipe=_recipe(recipe), machine=MachineConfig()), None
    )
    assert [path.name for path in files.train] == ["shard_0.parquet", "shard_1.parquet"]
    assert fetched == ["shard_3.parquet", "shard_0.parquet", "shard_1.parquet"]


def _recipe(flat) -> Recipe:
    return from_flat("t", {"sft.batch_tokens": 1} | flat).recipe


def test_no_network_says_what_to_do(monkeypatch):
    import datasets
    import huggingface_hub

    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"no route.*--mirror DIR.*toyworld"):
        hub.text_files(config(), None)
    with pytest.raises(ValueError, match=r"someone/x .*no route.*--mirror DIR.*toyworld"):
        hub.table("someone/x", "test", None, None)
