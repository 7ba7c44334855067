"""Two gloo ranks, started from a notebook cell, do what one rank does.

Every weight is drawn at random: zero-initialised projections would make most gradients zero. The
rewards of GRPO are by length (see `many_stages`), for nobody's answer is right here.
"""

import json
import math
import shutil
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch
from many_stages import by_length
from torch.testing import assert_close

from nanolib import checkpoint, launch
from nanolib.config import MODELS, OptimConfig
from nanolib.model import GPT
from nanolib.optim import SLOTS, MuonAdamW
from nanolib.rundir import Run
from nanolib.runtime import Runtime
from nanolib.stages import training, worker
from nanolib.tasks import GSM8K
from nanolib.tokenizer import Tokenizer
from runs.bench import ranks

MANY = [("base", 1), ("mid", 1), ("sft", 1), ("mid", 12), ("grpo", 1), ("grpo", 8)]  # stage, steps
STEPS = 20
CURVE = 0.3  # between GRPO's mean rewards of a step's 16 answers: some may have flipped


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory):
    """A runs folder with the smoke run's data, tokenizer and shards."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOLIB_RUNS", str(folder))
        for name in ("data", "tokenizer", "shards"):
            worker.work(name, Run.open("smoke"))
    return folder


def _make_run(folder: Path, stage: str, steps: int, ranks: int) -> Run:
    """A run with those shards and random weights at step 0 of a stage; what is before it is done."""
    overrides = {
        f"{stage}.steps": steps,
        f"{stage}.save_every": 10,
        f"{stage}.eval_every": 10,
        "machine.ranks": ranks,
        "grpo.kl": 0.1,
    }
    run = Run.open("smoke", str(folder / f"{stage}-{steps}-on-{ranks}"), overrides)
    for name in ("data", "tokenizer", "shards"):
        shutil.copytree(folder / "smoke" / name, run.path / name)
    earlier = MODELS[: MODELS.index(stage)]
    for name in (*earlier, stage):
        _save_random_weights(run, name)
    for name in earlier:
        run.stage(name).finish({})
    return run


def _save_random_weights(run: Run, stage: str) -> None:
    recipe, tokenizer = run.config.recipe, Tokenizer.load(run.path / "tokenizer/tokenizer.json")
    runtime = Runtime(device=torch.device("cpu"), dtype=torch.float32)
    model = GPT(recipe.model, tokenizer.vocab_size)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    about = training.about_checkpoint(run, stage, tokenizer)
    optimizer = MuonAdamW(model, OptimConfig(), runtime)
    checkpoint.begin(run.stage(stage).checkpoints, 0, model, optimizer, about).result()


@pytest.fixture(scope="module")
def pairs(shared_runs):
    """(stage, steps) -> the same training on one rank and on two, and base resumed on the other.

    One rank: in this process. Two: `tests.many_stages`, launched from a notebook cell.
    """
    folder, asked = shared_runs, [*MANY, ("base", STEPS)]
    made = {(s, n): tuple(_make_run(folder, s, n, ranks) for ranks in (1, 2)) for s, n in asked}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GSM8K, "grade", by_length)
        for (stage, _), (one, _) in made.items():
            worker.work(stage, one)
        resumed_on_two = _half_done(made["base", STEPS][0])
        jobs = [(stage, made[stage, steps][1]) for stage, steps in MANY]
        jobs = [(stage, str(run.path)) for stage, run in [*jobs, ("base", resumed_on_two)]]
        patch.setenv("MANY_STAGES", json.dumps(jobs))
        _launch_from_a_cell(made["base", STEPS][1])
        resumed_on_one = _half_done(made["base", STEPS][1])
        worker.work("base", resumed_on_one)
    return made | {"resumed": (resumed_on_one, resumed_on_two)}


def _half_done(run: Run) -> Run:
    """A copy of a run that was killed before the end of base."""
    copy = run.path.with_name(f"{run.id}-killed")
    shutil.copytree(run.path, copy)
    shutil.rmtree(copy / "base" / "checkpoints" / f"step_{STEPS:08d}")
    (copy / "base" / "done.json").unlink()
    return Run.load(str(copy), {"machine.ranks": 1})


def _launch_from_a_cell(run: Run) -> None:
    source = (
        f"from nanolib import launch\nfrom nanolib.rundir import Run\n"
        f"launch.WORKER = 'tests.many_stages'\n"
        f"run = Run.load({str(run.path)!r}, {{'machine.ranks': {run.config.machine.ranks}}})\n"
        f"launch.stage('base', run)"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=1200).execute()


def _rows(run: Run, stage: str, kind: str) -> list[dict]:
    return [row for row in run.stage(stage).metrics.rows() if row["kind"] == kind]


def _losses(run: Run, stage: str = "base") -> list[float]:
    return [row["loss"] for row in _rows(run, stage, "train")]


def _assert_same_gradients(one: Run, two: Run, stage: str) -> None:
    """After one step the first moments are (1 − β) times the clipped gradient."""
    saved = [checkpoint.latest(run.stage(stage).checkpoints) for run in (one, two)]
    config = one.config.recipe.optim
    momentum = config.momentum_start if stage in ("base", "mid") else config.momentum
    kept = {"momentum": 1 - momentum, "moment1": 1 - config.adam_beta1}
    compared = 0
    for name in saved[0].index["tensors"]:
        slot = name.rsplit(".", 1)[1]
        if slot in kept and slot in SLOTS["muon"] + SLOTS["adamw"]:
            alone, together = (found.tensor(name) / kept[slot] for found in saved)
            assert float(alone.abs().max()) > 1e-4, name
            assert_close(together, alone, rtol=0, atol=1e-6, msg=name)
            compared += 1
    assert compared == len(list(GPT(one.config.recipe.model, 265).parameters()))


@pytest.mark.parametrize("stage", ["base", "mid", "sft"])
def test_first_step_loss_and_every_gradient_are_equal(stage, pairs):
    one, two = pairs[stage, 1]
    assert two.stage(stage).done()["machine"]["ranks"] == 2
    assert abs(_losses(one, stage)[0] - _losses(two, stage)[0]) < 1e-6
    _assert_same_gradients(one, two, stage)


def test_twelve_steps_on_conversations(pairs):
    one, two = pairs["mid", 12]
    straight = _losses(one, "mid")
    assert len(straight) == 12 and straight[-1] < straight[0]
    assert_close(_losses(two, "mid"), straight, rtol=0, atol=1e-4)
    for alone, together in zip(*(_rows(run, "mid", "eval") for run in (one, two)), strict=True):
        assert alone["step"] == together["step"]
        for source in ("smoltalk", "mmlu", "gsm8k"):
            assert abs(alone[f"{source}_loss"] - together[f"{source}_loss"]) < 1e-4


def test_first_rollouts_loss_and_gradients_of_grpo_are_equal(pairs):
    one, two = pairs["grpo", 1]
    (alone,), (together,) = (_rows(run, "grpo", "rollout") for run in (one, two))
    assert 0 < alone["reward"] < 1 and alone["mixed"] == 1
    for value in ("reward", "mixed", "answer_tokens", "cut"):
        assert abs(alone[value] - together[value]) < 1e-12, value
    assert alone["kl"] == together["kl"] == 0  # of the start from itself
    assert abs(alone["entropy"] - together["entropy"]) < 1e-6 < alone["entropy"]
    (mine,), (theirs,) = (_rows(run, "grpo", "train") for run in (one, two))
    assert mine["tokens"] == theirs["tokens"] > 0
    assert abs(mine["loss"]) > 1e-4 and abs(mine["loss"] - theirs["loss"]) < 1e-6
    _assert_same_gradients(one, two, "grpo")
    first = [_rows(run, "grpo", "eval")[0] for run in (one, two)]  # before any update
    assert first[0] == first[1]


def test_rewards_of_grpo_take_the_same_road(pairs):
    """After the first step only about: one flipped sample makes all later rollouts differ."""
    curves = [[row["reward"] for row in _rows(run, "grpo", "rollout")] for run in pairs["grpo", 8]]
    assert len(curves[0]) == len(curves[1]) == 8 and len(set(curves[0])) > 1
    assert abs(curves[0][0] - curves[1][0]) < 1e-12
    assert_close(curves[1], curves[0], rtol=0, atol=CURVE)


def test_twenty_steps_and_resuming_on_another_number_of_ranks(pairs):
    one, two = pairs["base", STEPS]
    straight = _losses(one)
    assert len(straight) == STEPS and straight[-1] < straight[0]
    assert_close(_losses(two), straight, rtol=0, atol=1e-4)
    for run, count in zip(pairs["resumed"], (1, 2), strict=True):
        assert run.stage("base").done()["machine"]["ranks"] == count
        assert_close(_losses(run), straight, rtol=0, atol=1e-4)


def test_a_phase_counts_without_those_within_it(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 5.0, 7.0, 10.0])
    monkeypatch.setattr(ranks.time, "perf_counter", lambda: next(clock))
    counts = ranks.Counts()
    with counts.phase("step"):  # from 0 to 10, of that 1 to 4 and 5 to 7 within
        for size in (100, 20):
            with counts.phase("all_reduce", size):
                pass
    assert counts.seconds == {"step": 5.0, "all_reduce": 5.0}
    assert counts.bytes["all_reduce"] == 120


def test_four_ranks_share_the_optimizer_and_send_what_zero_2_sends(shared_runs, monkeypatch):
    """What `nanolib bench ranks` measures, against a count by hand: stacks of whole fours."""
    one, four = (_make_run(shared_runs, "base", 4, count) for count in (1, 4))
    worker.work("base", one)
    monkeypatch.setattr(launch, "WORKER", "runs.bench.ranks")
    launch.stage("base", four)
    assert ranks.furthest(ranks.losses(four), ranks.losses(one)) < 1e-5
    width, depth = four.config.recipe.model.width, four.config.recipe.model.depth
    vocab = Tokenizer.load(four.path / "tokenizer/tokenizer.json").vocab_size
    assert depth == 2  # 8 square matrices; 2 each of `up` and `down`, made 4
    matrices = (8 + 4 * 4 + 4 * 4) * width**2
    ends = 2 * 4 * math.ceil(vocab / 4) * width
    for rank in range(4):
        counted = json.loads((four.path / "base" / f"rank_{rank}.json").read_text())
        assert counted["steps"] == 2
        for name in ("reduce_scatter_tensor", "all_gather_into_tensor"):
            assert counted["bytes"][name] == 2 * 4 * (matrices + ends), name
        assert 0 < counted["bytes"]["all_reduce"] < 100
        assert counted["state"] == 4 * (matrices + 2 * ends) / 4
