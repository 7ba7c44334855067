"""What fits and how long it takes: against the original's own figures, and on devices that lie."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_model import CPU, VOCAB, tiny

from nanolib import accounting, config, hub, planning, tasks
from nanolib.accounting import Machine, TrainingMemory
from nanolib.config import ModelConfig
from nanolib.data.packing import batch_of_rows
from nanolib.model import GPT

H100 = {"cuda": True, "bytes_per_number": 2}
ROOM = 80e9 * planning.MARGIN


def test_sizes_in_words():
    assert [*map(planning.size, (12_300_000, 71.54e9))] == ["12.3 MB", "71.5 GB"]


# ---------------------------------------------------------------------------- the estimate


PEAKS = [  # depth, vocabulary, rows, bytes: measured on an H100, runs/bench/device.md
    (12, 32_768, 32, 23.8e9),
    (20, 32_768, 16, 33.1e9),
    (20, 32_768, 32, 59.1e9),
    (32, 32_768, 8, 56.5e9),
]


@pytest.mark.parametrize("depth, vocab, rows, peak", PEAKS)
def test_the_estimate_is_near_the_peaks_that_were_measured(depth, vocab, rows, peak):
    estimate = TrainingMemory(ModelConfig(depth=depth), vocab, **H100).total(rows)
    assert estimate == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("share", [1, 2, 7, 12, 32])
def test_the_estimate_is_the_largest_that_fits(share):
    memory = TrainingMemory(tiny(), VOCAB, ranks=2)
    sizes = [memory.total(rows) for rows in range(share + 1)]
    allowed = {share, *(2**power for power in range(6) if 2**power < share)}
    for room in {*sizes[1:], sizes[share] - 1, 10 * sizes[share]} - {sizes[1] - 1}:
        best = max(rows for rows in allowed if sizes[rows] <= room)
        assert planning.estimated_rows(memory, share, room) == best


def test_more_tokens_than_enough_are_not_tried():
    small = TrainingMemory(ModelConfig(depth=8), 16_384, **H100)
    assert planning.estimated_rows(small, 256, ROOM) == 32
    longer = TrainingMemory(ModelConfig(depth=2, sequence_len=2 * planning.ENOUGH), 512, **H100)
    assert planning.estimated_rows(longer, 4, ROOM) == 1


def test_a_device_too_small_names_what_to_lower():
    with pytest.raises(
        ValueError, match=r"too small.*lower model.sequence_len or model.depth.*rank"
    ):
        planning.estimated_rows(TrainingMemory(ModelConfig(depth=32), 65_536, 8, **H100), 4, 22e9)


def test_an_update_needs_its_room_too():
    memory = TrainingMemory(ModelConfig(depth=32), 65_536, 8, **H100)
    assert memory.update > memory.activations(1)
    assert memory.total(1) == 2 * memory.weights + memory.optimizer + memory.update


# ---------------------------------------------------------------------------- trying it


class Liar:
    """An nll that runs out of memory above so many rows; counts what it was called with."""

    def __init__(self, model: GPT, most: int):
        self.model, self.most, self.rows, self.gradients = model, most, [], []

    def __call__(self, batch):
        rows = len(batch.inputs_BT)
        self.rows.append(rows)
        self.gradients.append(all(w.grad is not None for w in self.model.parameters()))
        if rows > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.model.nll(batch)


@pytest.mark.parametrize(
    "most, start, found", [(16, 8, 8), (8, 8, 8), (3, 16, 2), (5, 12, 4), (0, 4, 0)]
)
def test_halved_until_it_fits(cpu, most, start, found):
    model = GPT.build(tiny(), VOCAB, CPU, 0)
    nll = Liar(model, most)
    fits = lambda rows: planning._fits(rows, model, nll, 1e9, cpu)  # noqa: E731
    assert planning._largest(fits, start) == found
    assert nll.rows == sorted(nll.rows, reverse=True)
    if found:
        assert nll.rows[-2:] == [found, found] and nll.gradients[-2:] == [False, True]
    assert all(weight.grad is None for weight in model.parameters())


def test_other_errors_are_not_taken_for_a_lack_of_memory(cpu):
    def broken(batch):
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        planning._fits(2, GPT.build(tiny(), VOCAB, CPU, 0), broken, 1e9, cpu)


def test_what_the_trial_compiles_training_uses(cpu):
    """One program for all blocks and one for the loss, also with what GRPO adds to a batch.

    Its other shapes are one more of each.
    """
    torch.compiler.reset()  # another test may have compiled blocks
    model, compiled = GPT.build(tiny(), VOCAB, CPU, 0), []

    def backend(graph, example):
        compiled.append(graph)
        return graph.forward

    nll = model.compiled_nll(backend=backend)
    assert model.config.depth > 1
    length, bfloat16 = model.config.sequence_len, replace(cpu, dtype=torch.bfloat16)
    planning._try(model, nll, 4, bfloat16)
    for weight in model.parameters():
        weight.grad = None
    for rows, columns, programs in ((4, length, 2), (4, length, 2), (6, 16, 4), (5, 24, 4)):
        ids = [np.arange(columns + 1)] * rows
        batch = batch_of_rows(ids, [ids[0] > 0] * rows, columns, bos=0)
        batch.fields["advantage"] = torch.ones(rows, columns)
        with bfloat16.autocast():
            nll(batch.to(CPU)).sum().backward()
        assert len(compiled) == programs


def test_all_ranks_take_the_smallest_that_fits_on_every_one(monkeypatch):
    """Rank 1 holds 4 rows, rank 0 any number: rank 0 follows."""
    tried = []

    def fits(rows: int, *_) -> bool:
        tried.append(rows)
        return True

    monkeypatch.setattr(planning, "_fits", fits)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (80e9, 80e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    runtime = SimpleNamespace(
        gather=lambda mine: [mine, tried[-1] <= 4] if tried else [mine],
        sum=lambda _: None,
        device=SimpleNamespace(type="cuda"),
        world_size=2,
        dtype=torch.bfloat16,
    )
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    model = SimpleNamespace(config=tiny(), vocab_size=VOCAB)
    assert planning.fitting_rows(model, None, 16, runtime) == 4
    assert tried == [16, 8, 4]


def test_on_a_cpu_the_estimate_stands(cpu, monkeypatch):
    model = GPT.build(tiny(), VOCAB, CPU, 0)
    nll = Liar(model, 0)
    assert planning.fitting_rows(model, nll, 12, cpu) == 12
    size = [TrainingMemory(tiny(), VOCAB).total(rows) for rows in range(13)]
    monkeypatch.setattr(planning, "main_memory", lambda ranks: size[8])
    assert planning.fitting_rows(model, nll, 12, cpu) == 8
    monkeypatch.setattr(planning, "main_memory", lambda ranks: size[1] - 1)
    with pytest.raises(ValueError, match="too small"):
        planning.fitting_rows(model, nll, 12, cpu)
    assert not nll.rows


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_device_runs_out_of_memory():
    from nanolib.runtime import Runtime

    device = torch.device("cuda", 0)
    runtime = Runtime(device=device, dtype=torch.bfloat16)
    model = GPT.build(ModelConfig(depth=4, sequence_len=1024), 4096, device, 0)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(4e9 / total, device)
    try:
        rows = planning.fitting_rows(model, model.nll, 1024, runtime)
        assert 1 < rows < 256
        assert planning.fitting_rows(model, model.nll, 1, runtime) == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


# ---------------------------------------------------------------------------- the plan


COUNTED = {"text": 9e10, "mid": 300e6, "sft": 9e6, "grpo": 7473, "problems": 30_000}  # some mirror


def plan(profile: str, machine: str, counted=(), **overrides) -> str:
    resolved = config.resolve(profile, overrides)
    return "\n".join(planning.plan(resolved, Machine.parse(machine), dict(counted)))


def costs(text: str) -> dict[str, tuple[float, float]]:
    """The plan's lines: stage -> its seconds and dollars."""
    found = re.findall(r"(?m)^(\w+) .*: ([\d:]+), \$([\d.]+) \(projected\)", text)
    clocks = {name: [*map(int, clock.split(":"))] for name, clock, _ in found}
    seconds = {name: sum(60**i * n for i, n in enumerate(it[::-1])) for name, it in clocks.items()}
    return {name: (seconds[name], float(dollars)) for name, _, dollars in found}


def test_the_plan_of_the_originals_d20():
    text = plan("speedrun", "8xH100")
    assert "560,988,160" in text and "21,400 steps x 524,288 tokens = 11,220 M tokens" in text
    assert "(20.0 a parameter), 3.92e+19 FLOPs" in text and "base         32 of 32 rows" in text
    assert re.search(r"2:28:\d\d, \$59.\d\d \(projected\)", text)
    assert text.count("1 epochs, not counted before the data is there") == 3  # mid, sft, grpo
    assert "all          without mid, sft, grpo, evaluations: " in text
    assert costs(text)["data"][0] == pytest.approx(21.9e9 / 50e6 + 56.1e9 / 60e6, abs=3)


def test_every_stage_is_planned_from_what_was_counted_and_measured():
    found = costs(text := plan("speedrun", "8xH100", COUNTED))
    flops = accounting.training_flops(ModelConfig(depth=20), 65_536)
    speed = 8 * accounting.MEASURED_MFU[20] * 989e12 / flops  # tokens/s of training
    assert found["tokenizer"][0] == pytest.approx(2e9 / 27e6, abs=1)
    assert found["shards"][0] == pytest.approx(9e10 / 25e6, abs=1)
    assert found["mid"][0] == pytest.approx(573 * 524_288 / speed, abs=1)  # 300 M tokens
    assert found["sft"][0] == pytest.approx(550 * 0.009 / 8 * 20, abs=1)  # small steps: launches
    answers = 468 * 256 + 11 * 400 * 9  # in steps and, eleven times, in evaluations
    rate = 8 * (10_301 + (32 - 16) / (128 - 16) * (44_569 - 10_301))  # 32 rows on each device
    trained = max(468 * 256 * 256 / speed, 468 * 0.009 / 8 * 20)
    assert found["grpo"][0] == pytest.approx(256 * answers / rate + trained, abs=1)
    assert found["starting"][0] == 8 * 28
    assert found["data"][0] == pytest.approx(9e10 * (0.39 / 50e6 + 1 / 60e6), abs=1)
    scored = 4 * 30_000 * accounting.SCORED  # as so many tokens at the peak
    assert found["evaluations"][0] == pytest.approx(scored * flops / (8 * 989e12), abs=1)
    parts = [cost for name, cost in found.items() if name != "all"]
    assert found["all"][0] == pytest.approx(sum(seconds for seconds, _ in parts), abs=8)
    for seconds, dollars in found.values():
        assert dollars == pytest.approx(24 * seconds / 3600, abs=0.01)
    assert "all          stages: " in text
    assert re.search(r"measured +training 55.4% of the peak, .* one H100, .*2026-11-28", text)


def test_what_was_never_measured_is_told():
    for machine in ("8xA100", "8xH100"):
        text = plan("d26", machine, COUNTED)  # answers were timed at depths 12 to 20
        assert re.search(r"(?m)^grpo .*tokens at most: not measured, ", text)
    text = plan("speedrun", "8xA100", COUNTED)
    assert "answers at once" not in text and re.search(r"(?m)^grpo .*: not measured, ", text)
    assert re.search(r"(?m)^assumed +a download of 50 MB/s$", text)
    assert re.search(r"(?m)^not measured more than two GPUs", text)


def test_disk_is_that_of_a_run(finished_run):
    """Checkpoints and shards, as the smoke run left them."""
    machine = Machine(name="CPU process", count=1, peak=None, memory=8, cuda=False)
    counted = finished_run.stage("data").result()["counted"]
    text = "\n".join(planning.plan(finished_run.config, machine, counted))
    for name, rough in (("base", 0.1), ("mid", 0.1), ("grpo", 0.1), ("shards", 0.3)):
        told = float(re.search(rf"(?m)^{name} .*, ([\d.]+) MB on disk$", text)[1])
        place = finished_run.stage(name)
        files = (place.checkpoints if place.checkpoints.exists() else place.path).rglob("*")
        size = sum(it.stat().st_size for it in files if it.suffix in (".safetensors", ".npy"))
        assert 1e6 * told == pytest.approx(size, rel=rough, abs=6e4), name


def test_what_the_data_stage_counts(finished_run):
    counted = finished_run.stage("data").result()["counted"]
    for stage in ("mid", "sft"):
        (ids,) = finished_run.stage(stage).path.glob("conversations-*/train/ids.npy")
        assert counted[stage] == pytest.approx(len(np.load(ids)), rel=0.3)
    files = hub.text_files(finished_run.config, finished_run.mirror())
    size = sum(
        len(it.encode()) for path in (*files.train, files.validation) for it in hub.documents(path)
    )
    assert counted["text"] == pytest.approx(size, rel=0.05)
    assert counted["grpo"] == len(tasks.load("gsm8k", "train", finished_run.mirror()))
    limits = finished_run.config.recipe.eval
    core = 3 * limits.core_problems
    assert counted["problems"] == core + len(limits.tasks) * limits.max_problems


def test_the_projection_of_the_originals_d32():
    """Its own note: 71,680 steps of 1.574 s on eight, at 50.9 %."""
    seconds = 71_680 * 1.574 * 0.509 / accounting.MEASURED_MFU[32]
    found = re.search(r"71,680 steps .*: (\d+):(\d+):(\d+), ", plan("d32", "8xH100"))
    assert found is not None
    hours, minutes, rest = map(int, found.groups())
    assert 3600 * hours + 60 * minutes + rest == pytest.approx(seconds, rel=1e-3)


def test_base_is_not_set_beside_all_stages_of_the_original():
    """Its report tells no split of its 3 h 51 min, so there is nothing to compare base with."""
    assert "3:51" not in plan("speedrun", "8xH100")


def test_the_plan_for_some_of_a_machines_devices():
    text = plan("speedrun", "8xH100", **{"machine.ranks": 4})
    assert "on 4 x H100" in text and re.search(r"4:57:\d\d", text)
    with pytest.raises(ValueError, match=r"machine.ranks = 4 needs as many devices, .* are 2"):
        plan("speedrun", "2xH100", **{"machine.ranks": 4})


def test_a_machine_without_a_known_peak_is_promised_no_time():
    machine = Machine(name="CPU process", count=1, peak=None, memory=8, cuda=False)
    text = "\n".join(planning.plan(config.resolve("smoke"), machine, {}))
    assert "projected at" not in text and "$" not in text and "20 steps x 1,024 tokens" in text
    with pytest.raises(ValueError, match="too small"):
        list(planning.plan(config.resolve("smoke"), replace(machine, memory=1e-4), {}))


def test_a_stage_of_given_steps_is_projected():
    text = plan("speedrun", "H100", **{"mid.steps": 100, "grpo.enabled": False})
    assert re.search(r"(?m)^mid .*100 steps .*\(projected\)", text) and "grpo" not in text


@pytest.mark.parametrize("ranks", [1, 8])
def test_the_share_of_a_rank(ranks):
    recipe = config.resolve("speedrun").recipe
    assert planning.share_of(recipe, "base", ranks) == 256 // ranks
    assert planning.share_of(recipe, "sft", ranks) == 8 // ranks
    assert planning.share_of(recipe, "grpo", ranks) == 256 // ranks


def test_readme_says_what_the_profiles_are():
    readme = (config.REPOSITORY / "README.md").read_text()
    table = re.findall(r"^\| `(\w+)` \| depth (\d+), ([\d,.]+) M parameters \|", readme, re.M)
    assert sorted(name for name, *_ in table) == config.profiles()
    for name, depth, millions in table:
        recipe = config.resolve(name).recipe
        count = recipe.model.parameters(recipe.tokenizer.vocab_size)
        digits = len(millions.partition(".")[2])
        assert (int(depth), millions) == (recipe.model.depth, f"{count / 1e6:,.{digits}f}")
