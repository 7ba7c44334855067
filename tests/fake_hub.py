"""The hub, played by a mirror: its text as one repository, its tables as data sets."""

import hashlib
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest


class FakeHub:
    """Takes the place of what `nanolib.hub` calls of huggingface_hub and datasets.

    `cached` and `fresh` are contents that differ from the listing's: in the cache, and of a file
    fetched anew. `broken` maps one of `calls` to the error it raises. `downloads` are the files
    asked for, with their revision.
    """

    COMMIT = "c0ffee"
    calls = ("dataset_info", "hf_hub_download", "load_dataset", "bundle")

    def __init__(self, mirror, patch: pytest.MonkeyPatch):
        self.mirror, self.cache = mirror, mirror.parent / f"{mirror.name}-cache"
        self.cached: dict[str, bytes] = {}
        self.fresh: dict[str, bytes] = {}
        self.broken: dict[str, Exception] = {}
        self.downloads: list[tuple[str, str]] = []
        patch.setattr(huggingface_hub.HfApi, "dataset_info", self.dataset_info)
        patch.setattr(huggingface_hub, "hf_hub_download", self.hf_hub_download)
        patch.setattr(datasets, "load_dataset", self.load_dataset)

    def call(self, name: str) -> None:
        if name in self.broken:
            raise self.broken[name]

    def dataset_info(self, repository, files_metadata=False):
        self.call("dataset_info")
        files = [SimpleNamespace(rfilename="README.md", size=9, lfs=None)]
        for path in sorted((self.mirror / "text").glob("*"), reverse=True):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            lfs = SimpleNamespace(sha256=digest)
            files.append(SimpleNamespace(rfilename=path.name, size=path.stat().st_size, lfs=lfs))
        return SimpleNamespace(sha=self.COMMIT, siblings=files)

    def hf_hub_download(self, repository, name, repo_type, revision, force_download=False):
        self.call("hf_hub_download")
        assert repo_type == "dataset"
        self.downloads.append((name, revision))
        path = self.cache / name
        path.parent.mkdir(exist_ok=True)
        whole = (self.mirror / "text" / name).read_bytes()
        path.write_bytes((self.fresh if force_download else self.cached).get(name, whole))
        return str(path)

    def load_dataset(self, repository, config, split, revision):
        self.call("load_dataset")
        assert revision == self.COMMIT
        path = self.mirror / "hub" / repository / (config or "") / f"{split}.parquet"
        return datasets.Dataset.from_parquet(str(path), cache_dir=str(self.cache))
