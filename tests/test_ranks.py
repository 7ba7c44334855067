"""Two gloo ranks, started from a notebook cell, do what one rank does.

Every weight is drawn at random: zero-initialised projections would make most gradients zero.
"""

import shutil

import nbclient
import nbformat
import pytest
import torch
from torch.testing import assert_close

from nanolib import checkpoint, launch, stages
from nanolib.config import OptimConfig, flatten
from nanolib.model import GPT
from nanolib.optim import SLOTS, MuonAdamW
from nanolib.rundir import Run
from nanolib.runtime import Runtime

STEPS = 20


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory):
    """A runs folder with the smoke run's data, tokenizer and shards."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOLIB_RUNS", str(folder))
        launch.stage("shards", Run.open("smoke"))
    return folder


@pytest.fixture
def make_run(shared_runs, monkeypatch):
    """Runs with those shards and a checkpoint of random weights at step 0."""
    monkeypatch.setenv("NANOLIB_RUNS", str(shared_runs))

    def make(name: str, steps: int, ranks: int) -> Run:
        overrides = {"base.steps": steps, "base.save_every": 10, "machine.ranks": ranks}
        run = Run.open("smoke", name, overrides)
        for stage in ("data", "tokenizer", "shards"):
            shutil.copytree(shared_runs / "smoke" / stage, run.path / stage, dirs_exist_ok=True)
        _save_random_weights(run)
        return run

    return make


def _save_random_weights(run: Run) -> None:
    recipe, encoder = run.config.recipe, stages.load_tokenizer(run)
    runtime = Runtime(device=torch.device("cpu"), dtype=torch.float32)
    model = GPT(recipe.model, encoder.vocab_size)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    about = {
        "recipe": flatten(recipe),
        "vocab_size": encoder.vocab_size,
        "tokenizer": encoder.fingerprint(),
    }
    optimizer = MuonAdamW(model, OptimConfig(), runtime)
    checkpoint.save(run.stage("base").checkpoints, 0, model, optimizer, about, runtime)


def _launch_from_a_cell(run: Run) -> None:
    source = (
        f"from nanolib import launch\nfrom nanolib.rundir import Run\n"
        f"run = Run.load({run.id!r}, {{'machine.ranks': {run.config.machine.ranks}}})\n"
        f"launch.stage('base', run)"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120).execute()


def _losses(run: Run) -> list[float]:
    return [row["loss"] for row in run.stage("base").metrics.rows() if row["kind"] == "train"]


def test_first_step_loss_and_every_gradient_are_equal(make_run):
    """After one step the first moments are (1 − β) times the clipped gradient."""
    one, two = make_run("one-step-1", 1, 1), make_run("one-step-2", 1, 2)
    launch.stage("base", one)
    _launch_from_a_cell(two)
    assert abs(_losses(one)[0] - _losses(two)[0]) < 1e-6
    saved = [checkpoint.latest(run.stage("base").checkpoints) for run in (one, two)]
    config = one.config.recipe.optim
    kept = {"momentum": 1 - config.momentum_start, "moment1": 1 - config.adam_beta1}
    compared = 0
    for name in saved[0].index["tensors"]:
        slot = name.rsplit(".", 1)[1]
        if slot in kept and slot in SLOTS["muon"] + SLOTS["adamw"]:
            alone, together = (found.tensor(name) / kept[slot] for found in saved)
            assert float(alone.abs().max()) > 1e-4, name
            assert_close(together, alone, rtol=0, atol=1e-6, msg=name)
            compared += 1
    assert compared == len(list(GPT(one.config.recipe.model, 265).parameters()))


def test_twenty_steps_and_resuming_on_another_number_of_ranks(make_run):
    runs = {ranks: make_run(f"twenty-{ranks}", STEPS, ranks) for ranks in (1, 2)}
    for run in runs.values():
        launch.stage("base", run)
    straight = _losses(runs[1])
    assert len(straight) == STEPS and straight[-1] < straight[0]
    assert_close(_losses(runs[2]), straight, rtol=0, atol=1e-4)
    for saved_on, resumed_on in ((2, 1), (1, 2)):
        run = runs[saved_on]
        place = run.stage("base")
        shutil.rmtree(place.checkpoints / f"step_{STEPS:08d}")
        (place.path / "done.json").unlink()
        launch.stage("base", Run.load(run.id, {"machine.ranks": resumed_on}))
        record = place.done()
        assert record is not None and record["machine"]["ranks"] == resumed_on
        assert_close(_losses(run), straight, rtol=0, atol=1e-4)
