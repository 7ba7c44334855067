"""The update rules against torch.optim, and sharding against one rank."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import TINY
from torch.testing import assert_close

from nanolib import optim
from nanolib.config import ModelConfig, OptimConfig
from nanolib.model import GPT
from nanolib.optim import MuonAdamW, adamw_step, muon_step, orthogonalise
from nanolib.runtime import Runtime


def test_adamw_equals_torch():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 5, generator=generator)
    reference = torch.nn.Parameter(weight.clone())
    settings = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.1}
    theirs = torch.optim.AdamW([reference], **settings)
    moments = torch.zeros(7, 5), torch.zeros(7, 5)
    for step in range(1, 6):
        grad = torch.randn(7, 5, generator=generator)
        reference.grad = grad.clone()
        theirs.step()
        adamw_step(weight, grad, *moments, step=step, **settings)
    assert_close(weight, reference.data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24)])
def test_muon_equals_torch(shape, monkeypatch):
    """torch.optim.Muon iterates in bfloat16; so does ours here, by the same cast."""
    monkeypatch.setattr(optim, "orthogonalise", _in_bfloat16)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, *shape, generator=generator)
    reference = torch.nn.Parameter(weight[0].clone())
    theirs = torch.optim.Muon([reference], lr=0.02, momentum=0.95, weight_decay=0.0)
    momentum = torch.zeros_like(weight)
    for _ in range(5):
        grad = torch.randn(1, *shape, generator=generator)
        reference.grad = grad[0].clone()
        theirs.step()
        muon_step(weight, grad, momentum, lr=0.02, momentum=0.95)
    # Five steps of 0.02: one bfloat16 rounding apart is 1e-4, a wrong rule is 1e-2.
    assert_close(weight[0], reference.data, rtol=0, atol=5e-4)


def _in_bfloat16(matrices, *rest):
    return orthogonalise(matrices.bfloat16(), *rest).float()


def test_orthogonalise_equals_the_singular_value_polynomial():
    """Newton–Schulz acts on singular values alone: a naive twin through the SVD."""
    matrix = torch.randn(12, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    a, b, c = optim.NEWTON_SCHULZ
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    assert_close(orthogonalise(matrix[None])[0], u @ s.diag() @ vt, rtol=1e-5, atol=1e-5)
    assert s.min() > 0.6 and s.max() < 1.3


def test_polar_express_equals_the_singular_value_polynomials_and_ends_nearer_to_one():
    matrix = torch.randn(20, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    for a, b, c in optim.POLAR_EXPRESS[:5]:
        s = a * s + b * s**3 + c * s**5
    ours = orthogonalise(matrix[None], 5, polar_express=True)[0]
    assert_close(ours, u @ s.diag() @ vt, rtol=1e-5, atol=1e-5)
    for steps, near in ((5, 0.13), (8, 0.02)):
        values = torch.linalg.svdvals(orthogonalise(matrix[None], steps, polar_express=True)[0])
        assert (values - 1).abs().max() < near, "Newton–Schulz's end at 0.68 to 1.12"


def naive_muon(weight, grads, lr, decay, cautious):
    """One matrix, weight by weight; updates orthogonalised as ever."""
    momentum = torch.zeros_like(weight)
    for grad in grads:
        momentum = 0.95 * momentum + 0.05 * grad
        update = orthogonalise((0.05 * grad + 0.95 * momentum)[None])[0]
        for i, j in itertools.product(*map(range, weight.shape)):
            if not cautious or (update[i, j] > 0) == (weight[i, j] > 0):
                weight[i, j] *= 1 - lr * decay
        weight = weight - lr * max(1, weight.shape[0] / weight.shape[1]) ** 0.5 * update
    return weight


@pytest.mark.parametrize("uses", [frozenset(), {"cautious_decay"}])
def test_decay_equals_loops(uses):
    generator = torch.Generator().manual_seed(0)
    weight, grads = (
        torch.randn(7, 4, generator=generator),
        torch.randn(4, 7, 4, generator=generator),
    )
    naive = naive_muon(weight.clone(), grads, 0.1, 0.5, bool(uses))
    stack, momenta = weight[None].clone(), torch.zeros(1, 7, 4)
    for grad in grads:
        muon_step(stack, grad[None].clone(), momenta, lr=0.1, momentum=0.95, decay=0.5, uses=uses)  # fmt: skip
    assert_close(stack[0], naive, rtol=1e-4, atol=1e-5)


def test_each_ingredient_changes_the_update_and_classic_decays_nothing(random_model, cpu):
    def updated(*ingredients: str, **settings) -> dict[str, torch.Tensor]:
        model = random_model(replace(TINY, ingredients=ingredients))
        optimizer = MuonAdamW(model, OptimConfig(**settings), cpu)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            for weight in model.parameters():
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step(1.0)
        return {name: weight.detach() for name, weight in model.named_parameters()}

    name, classic = "blocks.0.mlp.up.weight", updated()
    assert classic[name].equal(updated(matrix_decay=0.0)[name])
    strong = {"matrix_decay": 1.0}
    ways = [updated("polar_express"), updated("cautious_decay")]
    ways += [updated(**strong), updated("cautious_decay", **strong), updated("cautious_decay", matrix_decay=0.0)]  # fmt: skip
    *distinct, off = ways
    assert off[name].equal(classic[name])
    for one, two in itertools.combinations([classic, *distinct], 2):
        assert not one[name].allclose(two[name], rtol=1e-6, atol=1e-7)
        assert one["head.weight"].equal(two["head.weight"]), "AdamW's are another matter"


def test_rates_of_ingredients(random_model, cpu):
    model = random_model(replace(TINY, preset="modern"))
    groups = {name: g for g in MuonAdamW(model, OptimConfig(), cpu).groups for name in g.names}
    scale = (TINY.width / 768) ** -0.5
    assert groups["value_embeddings_1"].lr == pytest.approx(0.1 * scale)
    assert groups["x0"].lr == 0.02 and groups["smear"].lr == 0.2
    rules = {name: group.rule for name, group in groups.items()}
    matrices = {name for name in rules if name.startswith("blocks.")}
    assert {name for name, rule in rules.items() if rule == "muon"} == matrices


def test_momentum_warms_up_and_stays(tiny_config, random_model, cpu):
    optimizer = MuonAdamW(random_model(), OptimConfig(momentum_warmup=10), cpu)
    assert optimizer.momentum() == 0.85
    optimizer.steps = 5
    assert math.isclose(optimizer.momentum(), 0.90)
    optimizer.steps = 99
    assert optimizer.momentum() == 0.95


def test_clips_by_the_global_norm_after_summing(random_model, cpu):
    """A clipped step from gradients 1000 g equals a clipped one from 10 g."""
    models = [random_model(), random_model()]
    for model, size in zip(models, (1000.0, 10.0), strict=True):
        generator = torch.Generator().manual_seed(1)
        for weight in model.parameters():
            weight.grad = size * torch.randn(weight.shape, generator=generator)
        norm = math.sqrt(sum(float(w.grad.square().sum()) for w in model.parameters()))
        optimizer = MuonAdamW(model, OptimConfig(clip=1.0), cpu)
        assert math.isclose(optimizer.step(1.0), norm, rel_tol=1e-5)
        assert math.isclose(_norm_of_moments(optimizer), 1.0, rel_tol=1e-5)
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_close(one, two, rtol=1e-4, atol=1e-5)


def _norm_of_moments(optimizer) -> float:
    """The gradient's norm as the first moments after one step remember it."""
    config, total = optimizer.config, 0.0
    for group in optimizer.groups:
        adam = group.rule == "adamw"
        moment = group.state["moment1" if adam else "momentum"]
        kept = 1 - (config.adam_beta1 if adam else config.momentum_start)
        total += float((moment / kept).square().sum())
    return math.sqrt(total)


def test_a_gradient_that_is_not_finite_changes_nothing(random_model, cpu):
    model = random_model()
    before = [weight.clone() for weight in model.parameters()]
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, float("nan"))
    with pytest.raises(FloatingPointError, match="nan at update 1"):
        MuonAdamW(model, OptimConfig(), cpu).step(1.0)
    for weight, kept in zip(model.parameters(), before, strict=True):
        assert torch.equal(weight, kept)


def _model(config: ModelConfig) -> GPT:
    model = GPT(config, 301)  # 301 rows do not divide by the ranks: the last share is padded
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model


def _train(config: ModelConfig, runtime: Runtime) -> GPT:
    """Three updates; rank r of n holds the r-th part of the gradient sum."""
    model = _model(config)
    optimizer = MuonAdamW(model, OptimConfig(), runtime)
    for step in range(3):
        parts = torch.Generator().manual_seed(step)
        for weight in model.parameters():
            grads = torch.randn(4, *weight.shape, generator=parts)
            weight.grad = grads[runtime.rank :: runtime.world_size].sum(0)
        optimizer.step(0.5)
        optimizer.zero_grad()
    return model


def _rank(rank: int, ranks: int, config: ModelConfig, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    cpu = torch.device("cpu")
    runtime = Runtime(device=cpu, dtype=torch.float32, rank=rank, world_size=ranks)
    torch.save(_train(config, runtime).state_dict(), f"{folder}/rank_{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks, preset", [(2, "classic"), (4, "classic"), (4, "modern")])
def test_sharded_equals_one_rank(ranks, preset, tiny_config, cpu, tmp_path):
    config = replace(tiny_config, preset=preset)
    mp.spawn(_rank, (ranks, config, str(tmp_path)), nprocs=ranks)
    alone = _train(config, cpu).state_dict()
    for rank in range(ranks):
        together = torch.load(tmp_path / f"rank_{rank}.pt")
        for name, weight in alone.items():
            assert_close(together[name], weight, rtol=1e-4, atol=1e-5, msg=f"{name} on {rank}")
