"""The hub, played by a mirror: its text as one repository, its tables as data sets."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest


def listing(mirror: Path, repository: str) -> dict[str, Path]:
    """A repository's files, named as the hub names them."""
    folder = mirror / "hub" / repository
    if not folder.is_dir():
        return {path.name: path for path in sorted((mirror / "text").glob("*"), reverse=True)}
    tables = {path.relative_to(folder): path for path in folder.glob("**/*.parquet")}
    return {
        f"{'data' if name.parent == Path() else name.parent}/{name.stem}-00000-of-00001.parquet": path
        for name, path in tables.items()
    }


class FakeHub:
    """Takes the place of what `nanolib.hub` calls of huggingface_hub.

    `cached` and `fresh` are contents that differ from the listing's: in the cache, and of a file
    fetched anew. `broken` maps one of `calls`, or a repository whose files are asked for, to the
    error it raises. `downloads` are the files asked for, with their revision.
    """

    COMMIT = "c0ffee"
    calls = ("dataset_info", "hf_hub_download", "bundle")

    def __init__(self, mirror, patch: pytest.MonkeyPatch):
        self.mirror, self.cache = mirror, mirror.parent / f"{mirror.name}-cache"
        self.cached: dict[str, bytes] = {}
        self.fresh: dict[str, bytes] = {}
        self.broken: dict[str, Exception] = {}
        self.downloads: list[tuple[str, str]] = []
        patch.setattr(huggingface_hub.HfApi, "dataset_info", self.dataset_info)
        patch.setattr(huggingface_hub, "hf_hub_download", self.hf_hub_download)
        patch.setattr("nanolib.mirror.PAUSES", (0,))
        patch.setattr("nanolib.hub.ENCODINGS", {})

    def call(self, *names: str) -> None:
        for name in names:
            if name in self.broken:
                raise self.broken[name]

    def dataset_info(self, repository, revision=None, files_metadata=False):
        self.call("dataset_info")
        files = [SimpleNamespace(rfilename="README.md", size=9, lfs=None)]
        for name, path in listing(self.mirror, repository).items():
            lfs = SimpleNamespace(sha256=hashlib.sha256(path.read_bytes()).hexdigest())
            files.append(SimpleNamespace(rfilename=name, size=path.stat().st_size, lfs=lfs))
        return SimpleNamespace(sha=self.COMMIT, siblings=files)

    def hf_hub_download(self, repository, name, revision, **options):
        self.call("hf_hub_download", repository)
        assert options["repo_type"] == "dataset"
        self.downloads.append((name, revision))
        path = self.cache / repository / name
        path.parent.mkdir(exist_ok=True, parents=True)
        whole = listing(self.mirror, repository)[name].read_bytes()
        path.write_bytes(self.cached.pop(name, None) or self.fresh.get(name, whole))
        return str(path)


class LoopbackHub(http.server.ThreadingHTTPServer):
    """The hub's addresses on 127.0.0.1, for the real huggingface_hub.

    `faults` maps a file's name to what its next downloads suffer: "cut" in the middle, "drip" so
    slowly that it never ends, "wrong" bytes, a "short" file, or a status such as 500. `downloads`
    are the names of files asked for.
    """

    COMMIT = "c0ffee" + 34 * "0"
    daemon_threads = True

    def __init__(self, mirror: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.mirror = mirror
        self.faults: dict[str, list[str | int]] = {}
        self.downloads: list[str] = []
        self.revisions: set[str] = set()
        self.dripping = threading.Event()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: LoopbackHub

    def do_GET(self):
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/(\w+))?", path):
            self._listing(*found.groups())
        elif found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            repository, revision, name = found.groups()
            self.server.revisions.add(revision)
            self._file(listing(self.server.mirror, repository)[name])
        else:
            self._file(self.server.mirror / path[1:])

    do_HEAD = do_GET

    def _listing(self, repository: str, revision: str | None):
        siblings = []
        for name, path in listing(self.server.mirror, repository).items():
            digest, size = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size
            lfs = {"sha256": digest, "size": size, "pointerSize": 1}
            siblings.append({"rfilename": name, "size": size, "lfs": lfs})
        about = {"id": repository, "sha": revision or LoopbackHub.COMMIT, "siblings": siblings}
        self._answer(200, json.dumps(about).encode())

    def _file(self, path: Path):
        whole = path.read_bytes()
        tag = {
            "ETag": f'"{hashlib.sha256(whole).hexdigest()}"',
            "X-Repo-Commit": LoopbackHub.COMMIT,
        }
        if self.command == "HEAD":
            self._answer(200, whole, tag)
        else:
            self._content(path.name, whole, tag)

    def _content(self, name: str, whole: bytes, tag: dict[str, str]):
        self.server.downloads.append(name)
        faults = self.server.faults.get(name)
        fault = faults.pop(0) if faults else None
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        body = whole[start:]
        if isinstance(fault, int):
            self._answer(fault, b"", {"Retry-After": "41"} if fault == 429 else {})
            return
        if fault == "wrong":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault == "short":
            body = body[:-9]
        sent = len(body) // 2 if fault in ("cut", "drip") else len(body)
        self._answer(206 if start else 200, body, tag, sent)
        while fault == "drip":  # until the client hangs up
            self.server.dripping.set()
            self.wfile.write(b"x" * 10)
            threading.Event().wait(0.01)

    def _answer(self, status: int, body: bytes, headers=None, sent: int | None = None):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])

    def handle(self):
        with contextlib.suppress(OSError):  # the client hung up
            super().handle()

    def log_message(self, *_):
        pass
