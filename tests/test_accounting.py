"""Accounting against counting: real parameters, torch's FLOP counter, tensors kept by autograd."""

from __future__ import annotations

import pytest
import torch
from test_model import ALL, CPU, EACH, VOCAB, random_ids, tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanolib import accounting
from nanolib.accounting import Machine, TrainingMemory
from nanolib.config import ModelConfig, OptimConfig
from nanolib.data.packing import Batch
from nanolib.model import GPT
from nanolib.optim import MuonAdamW

D20 = ModelConfig(depth=20)


def batch(config: ModelConfig, rows: int) -> Batch:
    ids = random_ids(rows, config.sequence_len)
    return Batch(inputs_BT=ids, targets_BT=ids)


def test_parameters_of_the_original():
    counts = D20.parts(65_536)
    assert sum(counts.values()) == D20.parameters(65_536) == 560_988_160
    assert counts["embedding"] == counts["head"] == 65_536 * 1280


@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("ingredients", EACH)
def test_parameters_by_part_are_the_models(kv_heads, ingredients):
    config = tiny(kv_heads=kv_heads, depth=3, aspect=16, ingredients=ingredients)
    counts = dict.fromkeys(config.parts(VOCAB), 0)
    for name, weight in GPT.build(config, VOCAB, CPU, 0).named_parameters():
        part = next((part for part in counts if name.startswith(part)), None)
        part = part or next((part for part in counts if part in name), "scalars")
        counts[part] += weight.numel()
    assert counts == config.parts(VOCAB)


@pytest.mark.parametrize("kv_heads, ingredients", [(None, ()), (2, ()), (2, ("x0", "smear"))])
def test_flops_equal_torchs_counter(kv_heads, ingredients):
    config = tiny(kv_heads=kv_heads, ingredients=ingredients)
    model, rows = GPT.build(config, VOCAB, CPU, 0), 3
    tokens = rows * config.sequence_len
    # torch counts the plain products of the MATH backend; its CPU flash kernel it does not know
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model.nll(batch(config, rows)).sum()
        assert counter.get_total_flops() == tokens * accounting.forward_flops(config, VOCAB)
        loss.backward()
    assert counter.get_total_flops() == tokens * accounting.training_flops(config, VOCAB)


def test_short_layers_cost_half_of_the_attention():
    """Of eight, layers 0, 1, 2, 4, 5 and 6."""
    whole, windows = (tiny(depth=8, ingredients=its) for its in ((), ("windows",)))
    saved = accounting.forward_flops(whole, VOCAB) - accounting.forward_flops(windows, VOCAB)
    assert saved == 6 * 4 * whole.width * whole.sequence_len // 2


def test_flops_of_the_original():
    """Six a weight that multiplies, and 12 L H K T of attention."""
    by_hand = 6 * (560_988_160 - 65_536 * 1280) + 12 * 20 * 10 * 128 * 2048
    assert accounting.training_flops(D20, 65_536) == by_hand


@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("depth, preset", [(1, "classic"), (4, "classic"), (4, "modern")])
def test_activations_are_about_what_autograd_keeps(kv_heads, depth, preset):
    config = tiny(depth=depth, aspect=96 // depth, kv_heads=kv_heads, preset=preset)
    model, kept = GPT.build(config, VOCAB, CPU, 0), {}
    weights = {w.untyped_storage().data_ptr() for w in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.nll(batch(config, 4)).sum()
    counted = sum(size for size, _ in kept.values())
    assert TrainingMemory(config, VOCAB).activations(4) == pytest.approx(counted, rel=0.05)
    loss.backward()


@pytest.mark.parametrize("ingredients", [(), ALL])
def test_training_memory(cpu, ingredients):
    config = tiny(kv_heads=2, ingredients=ingredients)
    model = GPT.build(config, VOCAB, CPU, 0)
    memory = TrainingMemory(config, VOCAB)
    assert memory.weights == 4 * sum(w.numel() for w in model.parameters())
    optimizer = MuonAdamW(model, OptimConfig(), cpu)
    state = [slot for group in optimizer.groups for slot in group.state.values()]
    assert memory.optimizer == sum(4 * tensor.numel() for tensor in state)
    resident = 2 * memory.weights + memory.optimizer
    assert memory.total(0) == resident + memory.update
    assert memory.total(99) == resident + memory.activations(99) > memory.total(0)
    shared = TrainingMemory(config, VOCAB, ranks=4)
    assert (shared.optimizer, shared.weights) == (4 * -(-memory.optimizer // 16), memory.weights)


def test_mfu():
    """The original's run: 11.2 billion tokens on eight H100 in about three hours."""
    rate = {"tokens_per_second": 11.2e9 / (3 * 3600), "ranks": 8}
    share = accounting.mfu(D20, 65_536, device="NVIDIA H100 80GB HBM3", **rate)
    assert share == pytest.approx(0.46, abs=0.02)
    assert accounting.mfu(D20, 65_536, device="cpu", **rate) is None
    assert accounting.peak_flops("NVIDIA H100 PCIe") == 756e12


@pytest.mark.parametrize(
    "text, name, count, rate",
    [
        ("8xH100", "H100", 8, 24),
        ("h100", "H100", 1, 3),
        ("2 × RTX4090", "RTX 4090", 2, 6),
        ("4x H100 PCIe", "H100 PCIe", 4, 12),
    ],
)
def test_machines(text, name, count, rate):
    machine = Machine.parse(text)
    assert (machine.name, machine.count, machine.dollars_per_hour) == (name, count, rate)


@pytest.mark.parametrize("text", ["8xToaster", "", "0xH100", "x", "H100x8"])
def test_an_unknown_machine_is_told_the_known_ones(text):
    with pytest.raises(ValueError, match=r"such as 8xH100, got .* H100 PCIe"):
        Machine.parse(text)


def test_the_assumed_utilisation():
    for depth, share in accounting.MEASURED_MFU.items():
        assert accounting.assumed_mfu(depth) == share
    assert accounting.assumed_mfu(16) == pytest.approx((0.522 + 0.554) / 2)
    assert accounting.assumed_mfu(1) == 0.441 and accounting.assumed_mfu(64) == 0.578


def test_flops_and_mfu_of_the_originals_d32():
    """Its own note: 1.207960e10 FLOPs a token, steps of 1.574 s on eight, 50.9 %."""
    d32 = ModelConfig(depth=32)
    assert accounting.training_flops(d32, 65_536) == pytest.approx(1.207960e10, rel=1e-6)
    told = accounting.mfu(
        d32, 65_536, tokens_per_second=524_288 / 1.574, device="NVIDIA H100 80GB HBM3", ranks=8
    )
    assert told == pytest.approx(0.509, abs=5e-4)
