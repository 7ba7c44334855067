"""The model against its definition, written out naively."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from nanolib import masks
from nanolib.config import INGREDIENTS, TRAINING, ModelConfig, OptimConfig
from nanolib.data.packing import Batch
from nanolib.model import GPT, KVCache, attend, norm, rotary_tables, rotate, rotation
from nanolib.optim import MuonAdamW
from nanolib.runtime import Runtime
from nanolib.tokenizer import SPECIAL_TOKENS

VOCAB = 61
CPU = torch.device("cpu")
ALL = tuple(sorted(INGREDIENTS.keys() - TRAINING))  # that change the forward pass, all together
BOS = VOCAB - len(SPECIAL_TOKENS)
EACH = [(), *((name,) for name in ALL), ALL]


def tiny(**changes) -> ModelConfig:
    return ModelConfig(**{"depth": 2, "aspect": 24, "head_dim": 8, "sequence_len": 32, **changes})


def random_model(config: ModelConfig, seed: int = 0) -> GPT:
    """Every weight drawn at random: the zeroes of `init_weights` would hide any bug."""
    model = GPT.build(config, VOCAB, CPU, seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw) * weight.shape[-1] ** -0.5)
    return model


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def documents(rows: int, length: int) -> torch.Tensor:
    """Random ids, with a document that ends after every 5 to 11 tokens."""
    ids = random_ids(rows, length)
    for b, row in enumerate(ids):
        row[3 + b :: 5 + b] = BOS
    return ids


# ---------------------------------------------------------------------------- attention


def naive_attend(query, key, value, sees):
    """One query of one head at a time."""
    out = torch.zeros_like(query)
    rows, queries, heads, size = query.shape
    group = heads // key.shape[2]
    for b in range(rows):
        for t in range(queries):
            for h in range(heads):
                slots = [s for s in range(key.shape[1]) if sees(b, t, s)]
                scores = [query[b, t, h] @ key[b, s, h // group] / math.sqrt(size) for s in slots]
                weights = torch.stack(scores).softmax(0)
                for weight, s in zip(weights, slots, strict=True):
                    out[b, t, h] += weight * value[b, s, h // group]
    return out


@pytest.mark.parametrize("kv_heads", [6, 3, 2, 1])
def test_causal_attention_equals_loops(kv_heads):
    torch.manual_seed(0)
    query = torch.randn(2, 5, 6, 4)
    key, value = torch.randn(2, 2, 5, kv_heads, 4)
    naive = naive_attend(query, key, value, lambda b, t, s: s <= t)
    assert_close(attend(query, key, value), naive)


def test_masked_attention_sees_what_the_mask_says():
    torch.manual_seed(0)
    query, (key, value) = torch.randn(2, 3, 4, 4), torch.randn(2, 2, 7, 2, 4)
    mask = torch.rand(2, 3, 7) < 0.5
    mask[..., 0] = True  # each query sees something
    naive = naive_attend(query, key, value, lambda b, t, s: bool(mask[b, t, s]))
    assert_close(attend(query, key, value, mask), naive)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_sees_what_the_dense_masks_say():
    config = tiny(depth=5, ingredients=("windows", "document_mask"), sequence_len=10)
    ids, positions = documents(2, 16), torch.arange(16)[None]
    torch.manual_seed(0)
    query, (key, value) = torch.randn(2, 16, 6, 8), torch.randn(2, 2, 16, 3, 8)
    dense, flex = (
        masks.by_layer(config, VOCAB, flex, None, ids, positions) for flex in (False, True)
    )
    pairs = [int(mask.sum()) for mask in dense]
    assert pairs == [pairs[0]] * 3 + [pairs[0] + 2] * 2, "two documents of 6, a window of 5"
    for one, two in zip(dense, flex, strict=True):
        assert_close(attend(query, key, value, two), attend(query, key, value, one))


# ---------------------------------------------------------------------------- the whole forward


def test_rotation_turns_pairs_by_minus_their_angle():
    """As complex numbers x[k] + i x[k + K/2], times e^(-i position base^(-2k/K))."""
    x = torch.randn(1, 5, 2, 8, generator=torch.Generator().manual_seed(0))
    pairs = torch.complex(x[..., :4], x[..., 4:])
    angles = torch.arange(5.0)[:, None] * 10_000 ** -(torch.arange(4.0) * 2 / 8)
    turned = pairs * torch.polar(torch.ones_like(angles), -angles)[None, :, None]
    want = torch.cat((turned.real, turned.imag), dim=-1)
    assert_close(rotate(x, rotation(torch.arange(5)[None], 8)), want)


def test_queries_and_keys_know_only_their_distance():
    x = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    y = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(1))

    def score(i, j):
        at = [rotation(torch.tensor([[position]]), 8) for position in (i, j)]
        return (norm(rotate(x, at[0])) * norm(rotate(y, at[1]))).sum()

    assert_close(score(9, 4), score(25, 20))
    assert not math.isclose(score(9, 4).item(), score(9, 5).item(), rel_tol=1e-3)


def seeing(window, own):
    return lambda b, t, s: t - window < s <= t and own[s] == own[t]


def naive_logits(model: GPT, ids: list[int]) -> torch.Tensor:
    """The Transformer for one row, from its weights and the definition."""
    weights = dict(model.named_parameters())
    config, uses = model.config, model.config.uses
    time, size = len(ids), config.head_dim

    def rms(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def heads(x, name):
        return (x @ weights[name].T).view(1, time, -1, size)

    def gate(weight, y):
        return torch.sigmoid(weight @ y[: len(weight)])

    x = rms(weights["embedding.weight"][ids])
    if "smear" in uses:
        share, *looks = weights["smear"]
        more = [share * gate(torch.stack(looks), x[t]) * x[t - 1] for t in range(1, time)]
        x = torch.cat((x[:1], x[1:] + torch.stack(more)))
    first = x
    for i in range(config.depth):
        if "x0" in uses:
            x = weights["x0"][i, 0] * x + weights["x0"][i, 1] * first
        block, y = f"blocks.{i}.", rms(x)
        turn = rotation(torch.arange(time)[None], size)
        query = rms(rotate(heads(y, block + "attention.query.weight"), turn))
        key = rms(rotate(heads(y, block + "attention.key.weight"), turn))
        value = heads(y, block + "attention.value.weight")
        if "value_embeddings" in uses and i % 2 == (config.depth - 1) % 2:
            own = weights[f"value_embeddings_{i}"][ids].view_as(value)
            for t in range(time):
                for g, looks in enumerate(weights["value_gates"][i // 2]):
                    value[0, t, g] += 2 * gate(looks, y[t]) * own[0, t, g]
        short = "windows" in uses and i % 4 != 3 and i < config.depth - 1
        window = config.sequence_len // 2 if short else time
        own = torch.tensor([id == BOS for id in ids]).cumsum(0) * ("document_mask" in uses)
        mixed = naive_attend(query, key, value, seeing(window, own)).reshape(time, -1)
        x = x + mixed @ weights[block + "attention.out.weight"].T
        up = (rms(x) @ weights[block + "mlp.up.weight"].T).clamp(min=0) ** 2
        x = x + up @ weights[block + "mlp.down.weight"].T
    return 15 * torch.tanh(rms(x) @ weights["head.weight"].T / 15)


@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("ingredients", EACH)
@pytest.mark.parametrize("depth", [2, 5])
def test_forward_equals_the_definition(kv_heads, ingredients, depth):
    config = tiny(kv_heads=kv_heads, ingredients=ingredients, depth=depth, aspect=48 // depth, sequence_len=8)  # fmt: skip
    model, ids = random_model(config), documents(2, 8)
    with torch.no_grad():
        for row, logits in zip(ids.tolist(), model(ids), strict=True):
            assert_close(logits, naive_logits(model, row), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ingredients", EACH)
def test_no_token_sees_a_later_one(ingredients):
    model, ids = random_model(tiny(ingredients=ingredients)), documents(1, 9).roll(-3, 1)
    other = ids.clone()
    other[0, 5] = (ids[0, 5] + 1) % VOCAB
    with torch.no_grad():
        one, two = model(ids)[0], model(other)[0]
    assert_close(one[:5], two[:5], rtol=0, atol=1e-6)
    assert all(not torch.allclose(one[t], two[t], atol=1e-3) for t in (5, 6))


def test_classic_trains_as_ever():
    """Losses and logits of the code before there were ingredients."""
    model = GPT.build(tiny(kv_heads=3), VOCAB, CPU, seed=7)
    optimizer = MuonAdamW(
        model, OptimConfig(weight_decay=0.1), Runtime(device=CPU, dtype=torch.float32)
    )
    batch, losses = Batch(inputs_BT=random_ids(4, 20, seed=1), targets_BT=random_ids(4, 20, seed=2)), []  # fmt: skip
    for _ in range(5):
        loss = model.nll(batch).mean()
        loss.backward()
        optimizer.step(1.0)
        optimizer.zero_grad()
        losses.append(loss.item())
    before = [4.110873699188232, 3.669497013092041, 2.959688663482666, 2.355623483657837]
    assert losses == pytest.approx([*before, 1.8777143955230713], abs=2e-5)
    logits = [-0.9515292644500732, -0.31707870960235596, -0.6194499135017395, 0.22208356857299805]
    assert model(batch.inputs_BT)[0, -1, :4].tolist() == pytest.approx(logits, abs=2e-4)
    names = [f"blocks.{i}.{part}.weight" for i in (0, 1) for part in ("attention.query", "attention.key", "attention.value", "attention.out", "mlp.up", "mlp.down")]  # fmt: skip
    assert [*model.state_dict()] == ["embedding.weight", *names, "head.weight"]


@pytest.mark.parametrize("ingredients", EACH)
def test_a_new_model_is_the_classic_one_but_for_its_size(ingredients):
    """Weights of the same names are drawn alike, and ingredients begin by changing little."""
    classic, model = (GPT.build(tiny(ingredients=its), VOCAB, CPU, 3) for its in ((), ingredients))
    common = dict(model.named_parameters())
    assert all(weight.equal(common[name]) for name, weight in classic.named_parameters())
    batch = Batch(inputs_BT=random_ids(2, 9), targets_BT=random_ids(2, 9, seed=1))
    hidden = [each.hidden(batch.inputs_BT) for each in (classic, model)]
    assert_close(*hidden, rtol=1e-4, atol=1e-4)
    for _ in range(3):  # the head, then the projections begin at 0 and stop gradients
        model.nll(batch).sum().backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.1 * weight.grad.sign()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.any(), f"{name} learns"


def test_nll_is_the_mean_of_nothing_where_ignored():
    model, ids, targets = random_model(tiny()), random_ids(2, 6), random_ids(2, 6, seed=1)
    targets[0, 2:] = -1
    with torch.no_grad():
        nll = model.nll(Batch(inputs_BT=ids, targets_BT=targets))
        log_probabilities = model(ids).log_softmax(-1)
    assert nll[0, 2:].eq(0).all()
    assert_close(nll[1], -log_probabilities[1].gather(1, targets[1][:, None]).squeeze(1))


@pytest.mark.parametrize("ingredients", [(), ALL])
def test_compiled_nll_equals_nll_and_has_its_gradients(ingredients):
    model, ids, targets = (
        random_model(tiny(ingredients=ingredients)),
        random_ids(2, 6),
        random_ids(2, 6, seed=1),
    )
    targets[0, 2:] = -1
    batch = Batch(inputs_BT=ids, targets_BT=targets)
    results = []
    for nll in (model.nll, model.compiled_nll(backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        nll_BT = nll(batch)
        nll_BT.square().sum().backward()  # no weight's gradient is a sum that hides another's
        results.append([nll_BT.detach(), *(weight.grad for weight in model.parameters())])
    for plain, compiled in zip(*results, strict=True):
        assert_close(compiled, plain)


@pytest.mark.parametrize(
    "ingredients, programs", [((), 1), (ALL, 2), (("x0", "value_embeddings"), 2)]
)
def test_blocks_share_a_program(ingredients, programs):
    """One for all blocks, or one for those with value embeddings and one for the others."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = random_model(tiny(depth=6, aspect=8, ingredients=ingredients))
    model.compiled_nll(backend=backend)(Batch(inputs_BT=random_ids(2, 6), targets_BT=random_ids(2, 6, seed=1)))  # fmt: skip
    assert len(compiled) == programs + 1  # the loss


def test_cudnns_attention_is_allowed_while_compiling_if_asked_for():
    """A program keeps the kernel that was allowed when it was compiled: later is too late."""
    allowed: list[tuple[bool, str]] = []

    def backend(graph, inputs):
        tag = torch.compiler.config.cache_key_tag  # the cache on disk does not know the flag
        allowed.append((torch.backends.cuda.cudnn_sdp_enabled(), tag))
        return graph.forward

    batch = Batch(inputs_BT=random_ids(2, 6), targets_BT=random_ids(2, 6, seed=1))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(False)  # as Runtime does
        for cudnn in (True, False):
            torch.compiler.reset()
            random_model(tiny()).compiled_nll(cudnn, backend=backend)(batch)
            block, _loss = allowed
            assert block == ((True, "cudnn") if cudnn else (False, "flash"))
            assert torch.backends.cuda.cudnn_sdp_enabled() is False
            allowed.clear()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("ingredients", [(), ALL])
def test_the_residual_stream_has_the_activations_precision(ingredients):
    model, ids = random_model(tiny(ingredients=ingredients)), random_ids(2, 6)
    seen: list[torch.dtype] = []

    def run(block, x_BTD, *rest, **more):
        seen.append(x_BTD.dtype)
        return block(x_BTD, *rest, **more)

    with torch.no_grad():
        plain = model.hidden(ids, run=run)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model.hidden(ids, run=run)
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert_close(rounded.float(), plain, atol=0.1, rtol=0.1)


def test_rotary_tables_made_while_generating_serve_training():
    model, ids = random_model(tiny()), random_ids(2, 6)
    rotary_tables.cache_clear()
    with torch.inference_mode():
        model(ids)
    model(ids).sum().backward()
    assert rotary_tables.cache_info().misses == 1


@pytest.mark.parametrize("ingredients", EACH)
def test_kernels_for_writing_serve_the_classic_model_alone(ingredients, monkeypatch):
    monkeypatch.setattr("nanolib.model._proven_kernels", lambda device, use: use)
    model = random_model(tiny(ingredients=ingredients))
    assert model.fast_kernels("training") == "training"
    assert model.fast_kernels("writing") == (None if ingredients else "writing")
    model = random_model(tiny(ingredients=("polar_express", "cautious_decay")))
    assert model.fast_kernels("writing") == "writing"


# ---------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("kv_heads", [None, 3])
@pytest.mark.parametrize("ingredients", EACH)
def test_cache_equals_no_cache_with_ragged_rows(kv_heads, ingredients):
    """Prompts of 3, 7 and 5 tokens, padded; then 10 more tokens, one at a time, a pair and four."""
    config = tiny(kv_heads=kv_heads, ingredients=ingredients, depth=3, aspect=16, sequence_len=20)
    model, lengths, ids = random_model(config), [3, 7, 5], documents(3, 20)
    cache = KVCache(model.config, 3, 20, CPU, torch.float32)
    with torch.no_grad():
        padded = torch.stack([torch.where(torch.arange(7) < n, row[:7], 0) for n, row in zip(lengths, ids, strict=True)])  # fmt: skip
        got = [list(row[:n]) for n, row in zip(lengths, model(padded, cache=cache), strict=True)]
        cache.advance(lengths)
        for count in (1, 1, 1, 2, 1, 4):
            at = cache.positions(count)
            logits = model(ids.gather(1, at), cache=cache)
            cache.advance(count)
            for row, new in zip(got, logits, strict=True):
                row.extend(new)
        for b, n in enumerate(lengths):
            assert len(got[b]) == n + 10
            assert_close(torch.stack(got[b]), model(ids[b : b + 1, : n + 10])[0])


@pytest.mark.parametrize("ingredients", [(), ALL])
def test_a_row_that_is_over_changes_nothing(ingredients):
    model, ids = random_model(tiny(ingredients=ingredients)), random_ids(2, 10)
    cache = KVCache(model.config, 2, 10, CPU, torch.float32)
    with torch.no_grad():
        model(ids[:, :4], cache=cache)
        cache.advance(4)
        for t in range(4, 10):
            logits = model(ids[:, t : t + 1], cache=cache)
            cache.advance([1, 0])
        assert cache.used_B.tolist() == cache.used == [10, 4]
        assert_close(logits[0, 0], model(ids[:1])[0, -1])


@pytest.mark.parametrize("ingredients", [(), ALL])
def test_copied_rows_go_on_as_the_originals(ingredients):
    model, ids = random_model(tiny(ingredients=ingredients)), random_ids(3, 12)
    ids[:, 3] = BOS
    with torch.no_grad():
        prompts = KVCache(model.config, 3, 6, CPU, torch.float32)
        model(ids[:, :6], cache=prompts)
        prompts.advance([6, 4, 6])
        cache = KVCache(model.config, 4, 12, CPU, torch.float32)
        rows = [2, 1, 1, 0]
        cache.copy_rows(prompts, rows)
        assert cache.used_B.tolist() == cache.used == [6, 4, 4, 6]
        logits = model(random_ids(4, 3, seed=5), cache=cache)
        for b, row in enumerate(rows):
            whole = torch.cat((ids[row, : 4 if row == 1 else 6], random_ids(4, 3, seed=5)[b]))
            assert_close(logits[b, -1], model(whole[None])[0, -1])


# ---------------------------------------------------------------------------- size and start


def test_meta_construction_allocates_nothing():
    config = ModelConfig(depth=20)
    with torch.device("meta"):
        model = GPT(config, 65_536)
    assert all(weight.is_meta for weight in model.parameters())
    counted = sum(weight.numel() for weight in model.parameters())
    assert counted == config.parameters(65_536) == 560_988_160


def test_parameter_count_with_grouped_heads():
    config = tiny(kv_heads=2)
    model = GPT.build(config, VOCAB, CPU, 0)
    assert sum(w.numel() for w in model.parameters()) == config.parameters(VOCAB)


def test_initial_weights():
    """N(0, min(1, √(out/in)) / √in), embedding N(0, 1), zeroes; the same from the same seed."""
    config = ModelConfig(depth=2, aspect=64, head_dim=32, sequence_len=32)
    weights = dict(GPT.build(config, 500, CPU, seed=3).named_parameters())
    zero = {"head.weight"} | {f"blocks.{i}.{n}.weight" for i in (0, 1) for n in ("attention.out", "mlp.down")}  # fmt: skip
    for name, weight in weights.items():
        fan_out, fan_in = weight.shape
        std = 1.0 if name == "embedding.weight" else min(1, (fan_out / fan_in) ** 0.5) / fan_in**0.5
        if name in zero:
            assert not weight.any(), name
        else:
            assert abs(weight.mean()) < 5 * std / weight.numel() ** 0.5, name
            assert weight.std().item() == pytest.approx(std, rel=0.03), name
    again = dict(GPT.build(config, 500, CPU, seed=3).named_parameters())
    assert all(weights[name].equal(again[name]) for name in weights)
    other = GPT.build(config, 500, CPU, seed=4).embedding.weight
    assert not weights["embedding.weight"].equal(other)
