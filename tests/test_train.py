"""The trainer: schedule, sums before division, stopping, resuming, checkpoints and damage."""

import datetime
import itertools
import json
import math
import shutil
import threading
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors import safe_open
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from nanolib import checkpoint, train
from nanolib.config import ModelConfig, OptimConfig, Recipe, Schedule, flatten
from nanolib.data.packing import Batch, batch_of_rows
from nanolib.data.sources import ConversationSource, TextSource
from nanolib.guard import Guard
from nanolib.model import GPT
from nanolib.optim import MuonAdamW
from nanolib.rundir import StageDir
from nanolib.runtime import Runtime
from nanolib.train import Stopped, Trainer, lr_scale

BOS = 299


def _text_source(**settings):
    tokens = np.random.default_rng(0).integers(0, 299, 3000)
    tokens[::37] = BOS
    given = {"length": 32, "batch_rows": 4, "bos": BOS, "seed": 1} | settings
    return TextSource([tokens.astype(np.uint16)], **given)


def _trainer(folder, model, runtime, steps=6, guard=None, source=None, **settings):
    given = {"save_every": 2, "eval_every": 3, "schedule": Schedule(lr=0.5)} | settings
    return Trainer(
        stage=StageDir("base", folder),
        model=model,
        optimizer=MuonAdamW(model, OptimConfig(), runtime),
        source=source or _text_source(),
        steps=steps,
        runtime=runtime,
        guard=guard or Guard(),
        about={"recipe": flatten(Recipe()), "vocab_size": 300, "tokenizer": "x"},
        **given,
    )


def _without_time(rows):
    timed = ("seconds", "seconds_left", "tokens_per_second")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


# ---------------------------------------------------------------------------- schedule


def test_schedule_ends():
    schedule = Schedule(lr=2.0, warmup=0.1, warmdown=0.2, final=0.0)
    scales = [lr_scale(schedule, step, 100) for step in range(100)]
    assert scales[0] == 0.2 and scales[9] == 2.0  # the warmup rises to the full rate
    assert scales[10:80] == [2.0] * 70
    assert scales[80] == 2.0 and math.isclose(scales[99], 0.1)  # one step above 0
    assert all(a >= b for a, b in itertools.pairwise(scales[79:]))
    assert min(scales) > 0


def test_schedule_final_fraction():
    assert math.isclose(lr_scale(Schedule(warmdown=1.0, final=0.5), 99, 100), 0.505)


# ---------------------------------------------------------------------------- the gradient


def test_micro_batches_of_unequal_masks_give_the_gradient_of_one_batch(tmp_path, random_model, cpu):
    """Sum first, divide once: masks differ from row to row, so means per micro-batch would not."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 299, 33) for _ in range(4)]
    masks = [rng.random(33) < share for share in (0.9, 0.1, 0.5, 0.02)]
    whole = batch_of_rows(rows, masks, 32, BOS)
    parts = [batch_of_rows([row], [mask], 32, BOS) for row, mask in zip(rows, masks, strict=True)]
    model = random_model()
    logits = model(whole.inputs_BT)
    loss = F.cross_entropy(logits.flatten(0, 1), whole.targets_BT.flatten(), ignore_index=-1)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    trainer = _trainer(tmp_path, model, cpu)
    count = sum(part.count for part in parts)
    found = trainer.forward_backward(parts, count)
    assert math.isclose(found, float(loss.detach()), rel_tol=1e-6)
    for weight, grad in zip(model.parameters(), expected, strict=True):
        assert_close(weight.grad, grad, rtol=1e-4, atol=1e-6)


def test_a_step_asks_the_device_once(tmp_path, random_model, cpu, monkeypatch):
    """Count, loss and norm come in one transfer. Counting targets is done in the host's memory."""
    transfers = []
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(Batch, "count", property(lambda batch: batch.targets_BT.numel()))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: transfers.append("tolist") or to_list(x))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if operation is torch.ops.aten._local_scalar_dense.default:
                transfers.append("item")
            return operation(*args, **(kwargs or {}))

    trainer = _trainer(tmp_path, random_model(), cpu, source=_text_source(device_batch=1))
    with Watch():
        trainer.train_step()
    assert transfers == ["tolist"]


def test_a_fully_masked_row_is_no_nan(tmp_path, random_model, cpu):
    ids = [[BOS, *range(20)], [BOS, *range(30)]]
    masks = [[False] * 21, [False] * 10 + [True] * 21]
    source = ConversationSource(ids, masks, length=32, batch_rows=2, bos=BOS, seed=1)
    trainer = _trainer(tmp_path, random_model(), cpu, source=source)
    row, *_ = trainer.train_step()
    assert math.isfinite(row["loss"]) and row["tokens"] == 21


def test_a_step_without_targets_is_an_error(tmp_path, random_model, cpu):
    source = ConversationSource(
        [[BOS, 1, 2]], [[False] * 3], length=32, batch_rows=1, bos=BOS, seed=1
    )
    with pytest.raises(ValueError, match="step 0 of base has no token to learn from"):
        _trainer(tmp_path, random_model(), cpu, source=source).train_step()


def test_a_loss_that_is_not_finite_names_step_and_remedy(tmp_path, random_model, cpu):
    model = random_model()
    model.head.weight.data.fill_(float("nan"))
    kept = model.embedding.weight.detach().clone()
    with pytest.raises(FloatingPointError, match=r"nan at step 0 of base; lower base\.lr"):
        _trainer(tmp_path, model, cpu).train_step()
    assert torch.equal(model.embedding.weight, kept), "the update was made all the same"


def test_it_learns(tmp_path, random_model, cpu):
    """Loss on one repeated row falls far below chance: all the parts turn the right way."""
    row = np.random.default_rng(0).integers(0, 299, 33).astype(np.uint16)
    source = TextSource([row], length=32, batch_rows=1, bos=BOS, seed=1)
    trainer = _trainer(tmp_path, random_model(), cpu, steps=40, source=source)
    trainer.fit()
    losses = [row["loss"] for row in trainer.stage.metrics.rows()]
    assert losses[-1] < 0.5 * losses[0]


# ---------------------------------------------------------------------------- stop and resume


@pytest.mark.parametrize("preset", ["classic", "modern"])
def test_resumed_equals_straight(tmp_path, preset, tiny_config, random_model, cpu):
    random_model = partial(random_model, replace(tiny_config, preset=preset))
    straight = _scored(_trainer(tmp_path / "a", random_model(), cpu))
    straight.fit()
    first = _scored(_trainer(tmp_path / "b", random_model(), cpu, guard=Guard(), save_every=5))
    evaluate = first.score

    def stop_after_three():
        if first.step == 3:
            first.guard.request_stop()
        return evaluate()

    first.score = stop_after_three
    with pytest.raises(Stopped, match="saved after step 4 of 6"):
        first.fit()
    second = _scored(_trainer(tmp_path / "b", random_model(seed=9), cpu))
    second.fit()
    for one, two in zip(straight.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert _without_time(straight.stage.metrics.rows()) == _without_time(
        second.stage.metrics.rows()
    )


@pytest.mark.parametrize("at", [2, 6])
@pytest.mark.parametrize("scored", [False, True])
def test_an_evaluation_that_was_interrupted_costs_no_step_and_is_made_up_for(
    at, scored, tmp_path, random_model, cpu
):
    settings = {"save_every": 2, "eval_every": 2}
    straight = _scored(_trainer(tmp_path / "a", random_model(), cpu, **settings))
    straight.fit()
    first = _scored(_trainer(tmp_path / "b", random_model(), cpu, **settings))
    evaluate, run_score = first.score, first.run_score

    def killed():
        if first.step == at and not scored:
            raise Stopped("before an evaluation's end")
        return evaluate()

    def killed_after():
        run_score()
        if first.step == at:
            raise Stopped("after an evaluation's end")

    first.score, first.run_score = killed, killed_after
    with pytest.raises(Stopped):
        first.fit()
    second = _scored(_trainer(tmp_path / "b", random_model(seed=9), cpu, **settings))
    second.resume()
    assert second.step == at
    second.fit()
    rows = [_without_time(trainer.stage.metrics.rows()) for trainer in (straight, second)]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[1] if row["kind"] == "eval"] == [2, 4, 6]


def _scored(trainer):
    weight = next(trainer.model.parameters()).detach()
    trainer.score = lambda: {"probe": float(weight.sum())}
    return trainer


def test_killed_after_the_checkpoint_drops_and_repeats_the_lost_steps(tmp_path, random_model, cpu):
    trainer = _trainer(tmp_path, random_model(), cpu, steps=6, save_every=100)
    trainer.steps = 3
    trainer.fit()  # the checkpoint of step 3
    trainer.stage.metrics.append(kind="train", step=4, loss=0.0)  # then a step that was lost
    again = _trainer(tmp_path, random_model(seed=9), cpu)
    again.fit()
    steps = [row["step"] for row in again.stage.metrics.rows()]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert again.stage.metrics.rows()[3]["loss"] > 0


def test_a_step_is_an_optimizer_update_not_a_micro_batch(tmp_path, random_model, cpu):
    """The schedule counts steps whatever the accumulation, and tokens count once."""
    rows = {}
    for device_batch in (None, 1):
        folder = tmp_path / str(device_batch)
        source = _text_source(device_batch=device_batch)
        trainer = _trainer(folder, random_model(), cpu, source=source)
        trainer.fit()
        rows[device_batch] = trainer.stage.metrics.rows()
    for one, many in zip(rows[None], rows[1], strict=True):
        assert one["lr"] == many["lr"] and one["tokens"] == many["tokens"]
        assert math.isclose(one["loss"], many["loss"], rel_tol=1e-4)


# ---------------------------------------------------------------------------- by the clock


class Clock:
    """Time as the trainer sees it: so many minutes pass in every step."""

    def __init__(self, minutes_a_step: float):
        self.minutes, self.minutes_a_step = 0.0, minutes_a_step

    def monotonic(self) -> float:
        return 60 * self.minutes

    def perf_counter(self) -> float:  # the trainer's, before and after a step
        self.minutes += self.minutes_a_step / 2
        return 60 * self.minutes


def _saved_steps(trainer) -> list[int]:
    """Train to the end; the steps at which a checkpoint was written."""
    steps, save = [], trainer.save

    def saved():
        steps.append(trainer.step)
        save()

    trainer.save = saved
    trainer.fit()
    return steps


def test_saves_by_the_clock_between_those_by_the_step(tmp_path, random_model, cpu, monkeypatch):
    """Four minutes a step: after ten have passed the next step saves, and the clock starts again."""
    settings = {"steps": 12, "save_every": 7}
    straight = _trainer(tmp_path / "a", random_model(), cpu, **settings)
    assert _saved_steps(straight) == [7, 12]
    monkeypatch.setattr(train, "time", Clock(minutes_a_step=4))
    found = _trainer(tmp_path / "b", random_model(), cpu, save_minutes=10.0, **settings)
    assert _saved_steps(found) == [3, 6, 7, 10, 12]
    for step in (10, 12):  # going on from one saved by the clock changes nothing
        shutil.rmtree(found.stage.checkpoints / "step_00000012", ignore_errors=step == 12)
        again = _trainer(tmp_path / "b", random_model(seed=9), cpu, **settings)
        again.fit()
        for one, two in zip(straight.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(one, two)


def _train_with_a_clock(rank: int, folder: str) -> None:
    """Rank 0 waits four minutes a step, rank 1 a hundred."""
    torch.set_num_threads(1)
    store, timeout = f"file://{folder}/store", datetime.timedelta(seconds=60)  # against hanging
    dist.init_process_group("gloo", store, rank=rank, world_size=2, timeout=timeout)
    train.time = Clock((4, 100)[rank])  # ty: ignore[invalid-assignment]
    runtime = Runtime(device=torch.device("cpu"), dtype=torch.float32, rank=rank, world_size=2)
    model = GPT.build(ModelConfig(depth=1, aspect=16, head_dim=16), 300, runtime.device, seed=1)
    source = _text_source(rank=rank, world_size=2)
    settings = {"steps": 7, "save_every": 100, "save_minutes": 10.0, "source": source}
    steps = _saved_steps(_trainer(Path(folder), model, runtime, **settings))
    Path(folder, f"rank_{rank}.json").write_text(json.dumps(steps))
    dist.destroy_process_group()


def test_all_ranks_save_when_the_lead_ranks_clock_says_so(tmp_path):
    mp.spawn(_train_with_a_clock, (str(tmp_path),), nprocs=2)
    saved = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    assert saved == [[3, 6, 7], [3, 6, 7]]


# ---------------------------------------------------------------------------- checkpoints


def _saved(folder, random_model, cpu, steps=(2, 4)):
    trainer = _trainer(folder, random_model(), cpu)
    for step in steps:
        trainer.step = step
        trainer.save()
        trainer.finish_save()
    return trainer


def test_the_last_two_are_kept(tmp_path, random_model, cpu):
    trainer = _saved(tmp_path, random_model, cpu, steps=(2, 4, 6))
    names = sorted(path.name for path in trainer.stage.checkpoints.iterdir())
    assert names == ["step_00000004", "step_00000006"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, random_model, cpu, monkeypatch):
    trainer, may_write = _trainer(tmp_path, random_model(), cpu), threading.Event()
    write = checkpoint._write_file

    def slowly(*given):
        assert may_write.wait(60)
        return write(*given)

    monkeypatch.setattr(checkpoint, "_write_file", slowly)
    trainer.train_step()
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    moments = [x.clone() for group in trainer.optimizer.groups for x in group.state.values()]
    trainer.save()
    trainer.train_step()  # changes the weights while they are written
    assert checkpoint.latest(trainer.stage.checkpoints) is None
    may_write.set()
    trainer.finish_save()
    found = checkpoint.latest(trainer.stage.checkpoints)
    assert found is not None and found.step == 1
    assert all(torch.equal(found.tensor(name), weight) for name, weight in before.items())
    checkpoint.restore_optimizer(found, trainer.optimizer)
    kept = [x for group in trainer.optimizer.groups for x in group.state.values()]
    assert trainer.optimizer.steps == 1 and all(map(torch.equal, kept, moments))


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "index", "optimizer"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_used(
    damage, tmp_path, random_model, cpu, capsys
):
    trainer = _saved(tmp_path, random_model, cpu)
    newest = trainer.stage.checkpoints / "step_00000004"
    _damage(newest, damage)
    found = checkpoint.latest(trainer.stage.checkpoints)
    assert found is not None and found.step == 2
    assert "step_00000004" in capsys.readouterr().err
    _damage(trainer.stage.checkpoints / "step_00000002", damage)
    with pytest.raises(ValueError, match=r"no usable checkpoint.*step_00000004.*step_00000002"):
        checkpoint.latest(trainer.stage.checkpoints)


def _damage(folder, kind):
    file = folder / "rank_0.safetensors"
    if kind == "optimizer":
        kind, file = "cut", folder / "rank_0.optimizer.safetensors"
    data = bytearray(file.read_bytes())
    if kind == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif kind == "cut":
        file.write_bytes(data[:-100])
    elif kind == "missing":
        file.unlink()
    else:
        (folder / "index.json").write_text('{"version": 1, "st')


def test_a_half_written_checkpoint_is_never_seen(tmp_path, random_model, cpu):
    trainer = _saved(tmp_path, random_model, cpu)
    whole = trainer.stage.checkpoints / "step_00000004"
    shutil.copytree(whole, trainer.stage.checkpoints / "step_00000006.partial")
    found = checkpoint.latest(trainer.stage.checkpoints)
    assert found is not None and found.path == whole


def test_what_a_killed_process_left_behind_goes_with_the_next_save(tmp_path, random_model, cpu):
    """Also of a step that is never saved again: the clock may have chosen it."""
    trainer = _saved(tmp_path, random_model, cpu)
    folder = trainer.stage.checkpoints
    for step in (3, 5):
        shutil.copytree(folder / "step_00000004", folder / f"step_{step:08d}.partial")
    _trainer(tmp_path, random_model(), cpu).fit()
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step_00000004", "step_00000006"]


def test_weights_are_read_without_the_optimizers_state(tmp_path, random_model, cpu, monkeypatch):
    """A chat reads and checks the files of weights alone; training goes on only from both."""
    trainer = _saved(tmp_path, random_model, cpu)
    opened = []
    path_open = Path.open
    monkeypatch.setattr(
        Path, "open", lambda p, *a, **k: opened.append(p.name) or path_open(p, *a, **k)
    )
    found = checkpoint.latest(trainer.stage.checkpoints, weights_only=True)
    assert found is not None and set(opened) == {"index.json", "rank_0.safetensors"}
    monkeypatch.undo()
    with safe_open(found.path / "rank_0.safetensors", "pt") as file:
        kept = {f"{name}@0" for name, _ in trainer.model.named_parameters()}
        assert set(file.keys()) == kept
    (found.path / "rank_0.optimizer.safetensors").unlink()
    model = random_model(seed=9)
    checkpoint.restore_model(found, model)
    for one, two in zip(trainer.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, two)
    before = checkpoint.latest(trainer.stage.checkpoints)
    assert before is not None and before.step == 2


def test_a_checkpoint_of_the_first_edition_is_read(tmp_path):
    """Weights and the optimizer's state were in one file; training goes on from it."""
    with zipfile.ZipFile(Path(__file__).with_name("first_edition.zip")) as kept:
        kept.extractall(tmp_path)
    folder = tmp_path / "run" / "base" / "checkpoints"
    found = checkpoint.latest(folder)
    assert found is not None and list(found.index["files"]) == ["rank_0.safetensors"]
    model = checkpoint.load_model(folder, torch.device("cpu"))
    runtime = Runtime(device=torch.device("cpu"), dtype=torch.float32)
    optimizer = MuonAdamW(model, OptimConfig(), runtime)
    checkpoint.restore_optimizer(found, optimizer)
    assert optimizer.steps == 8
    assert all(bool(x.any()) for group in optimizer.groups for x in group.state.values())


def test_another_runs_checkpoint_is_refused(tmp_path, random_model, cpu):
    trainer = _saved(tmp_path, random_model, cpu)
    index = trainer.stage.checkpoints / "step_00000004" / "index.json"
    content = json.loads(index.read_text())
    content["recipe"]["model.depth"] = 3
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"belongs to another run.*model\.depth 3 != 20"):
        _trainer(tmp_path, random_model(), cpu).fit()


def test_a_checkpoint_of_another_version_goes_on(tmp_path, random_model, cpu, capsys):
    """A setting that it lacks had the default; one that is unknown now is named and ignored."""
    trainer = _saved(tmp_path, random_model, cpu)
    index = trainer.stage.checkpoints / "step_00000004" / "index.json"
    content = json.loads(index.read_text())
    del content["recipe"]["optim.clip"], content["recipe"]["model.kv_heads"]
    content["recipe"]["optim.gone"] = 3
    index.write_text(json.dumps(content))
    again = _trainer(tmp_path, random_model(), cpu)
    again.fit()
    assert again.step == 6 and "left out: optim.gone" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["backout", "blocks.0.mlp.up.weight.squares"])
def test_a_checkpoint_with_a_removed_ingredient_is_refused(tmp_path, random_model, cpu, name):
    """Without its weight the model would be another; without its state the update."""
    trainer = _saved(tmp_path, random_model, cpu)
    index = trainer.stage.checkpoints / "step_00000004" / "index.json"
    content = json.loads(index.read_text())
    content["tensors"][name] = {"shape": [1], "parts": []}
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"00000004 has {name}, .*; commit \w{{7}} reads it"):
        checkpoint.load_model(trainer.stage.checkpoints, cpu.device)


def test_a_checkpoint_is_read_though_later_stages_could_not_follow(tmp_path, random_model, cpu):
    """Rows of 96 tokens do not share mid's default batch; base's checkpoint knows no mid."""
    trainer = _saved(tmp_path, random_model, cpu)
    for index in trainer.stage.checkpoints.glob("*/index.json"):
        content = json.loads(index.read_text())
        sizes = {"model.depth": 2, "model.aspect": 16, "model.head_dim": 16, "model.kv_heads": 1}
        content["recipe"] = sizes | {"model.sequence_len": 96}
        index.write_text(json.dumps(content))
    assert checkpoint.load_model(trainer.stage.checkpoints, cpu.device).config.sequence_len == 96


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, random_model, cpu, monkeypatch):
    trainer = _saved(tmp_path, random_model, cpu)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    trainer.step = 6
    trainer.save()
    with pytest.raises(ValueError, match="disk is full"):
        trainer.finish_save()
    monkeypatch.undo()
    found = checkpoint.latest(trainer.stage.checkpoints)
    assert found is not None and found.step == 4


def test_saves_by_steps_keep_their_distance(tmp_path, random_model, cpu):
    assert _saved_steps(_trainer(tmp_path, random_model(), cpu, save_apart=1e9)) == [6]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_recorded_passes_train_as_launched_ones(device, tmp_path, random_model, monkeypatch):
    """Small micro-batches replay a CUDA graph; two shapes share the gradients (3 rows and 1)."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    runtime, found = Runtime(device=torch.device(device), dtype=torch.float32), []

    def run_again(work, warm_ups):  # what a graph does, on the CPU
        for _ in range(warm_ups):
            work()
        return work

    if device == "cpu":
        monkeypatch.setattr(train, "record_graph", run_again)
    for recorded in (True, False):
        monkeypatch.setattr(Trainer, "_records", lambda self, batch, it=recorded: it)
        model = random_model().to(device)
        source = _text_source(device_batch=3)
        trainer = _trainer(tmp_path / str(recorded), model, runtime, source=source)
        rows = [trainer.train_step()[0] for _ in range(6)]
        assert len(trainer._recorded) == (2 if recorded else 0)
        # The norms too: an update does not depend on its gradient's scale.
        found.append(([(r["loss"], r["grad_norm"]) for r in rows], [*model.parameters()]))
    (scalars, weights), (other_scalars, other_weights) = found
    assert_close(torch.tensor(scalars), torch.tensor(other_scalars), rtol=1e-5, atol=0)
    assert_close(weights, other_weights, rtol=1e-3, atol=1e-5)
