"""What tests share: one CPU thread, a tiny model with every weight drawn at random, run folders."""

import fcntl
import os
import signal

import pytest
import torch

from nanolib.config import MODELS, ModelConfig
from nanolib.model import GPT
from nanolib.rundir import Run
from nanolib.runtime import Runtime
from nanolib.stages import worker

TINY = ModelConfig(depth=2, aspect=16, head_dim=16, kv_heads=1, sequence_len=32)
# In a shell's background job Ctrl-C is ignored, and would be by every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers() -> int:
    """One worker for each core that we may use, up to four: many tests start processes."""
    affinity = getattr(os, "sched_getaffinity", None)
    return min(4, len(affinity(0)) if affinity else os.cpu_count() or 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: the last worker to finish then has little left."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_runs_folder(tmp_path, monkeypatch):
    """No test writes into the checkout's runs/out."""
    monkeypatch.setenv("NANOLIB_RUNS", str(tmp_path / "runs"))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Run:
    """A finished run of profile smoke, made in this process. Copy it before changing anything.

    The test processes of one session (pytest-xdist) share it: the first to need it makes it.
    """
    ours = tmp_path_factory.getbasetemp()
    folder = ours.parent if "PYTEST_XDIST_WORKER" in os.environ else ours
    with (folder / "finished.lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.setenv("NANOLIB_RUNS", str(folder / "finished"))
        run = Run.open("smoke")
        if run.stage("report").done() is None:
            for name in ("data", "tokenizer", "shards", *MODELS):
                worker.work(name, run)
            for model in MODELS:
                worker.work("eval", run, of=model)
            worker.work("report", run)
    return run


@pytest.fixture
def cpu() -> Runtime:
    return Runtime(device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def tiny_config() -> ModelConfig:
    return TINY


@pytest.fixture
def random_model():
    """Makes a model whose every weight is random: zero-initialised ones would hide any bug."""

    def make(config: ModelConfig = TINY, vocab_size: int = 300, seed: int = 0) -> GPT:
        model = GPT(config, vocab_size)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
        return model

    return make
