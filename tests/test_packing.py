"""Rows against a naive walk over the tokens: every token a target exactly once."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanolib.data.packing import batch_of_rows, pack
from nanolib.data.sources import ConversationSource, TextSource

BOS = 0
SETTINGS = {"length": 8, "bos": BOS, "seed": 3}


def _shards(seed: int, count: int = 3) -> list[np.ndarray]:
    """Shards whose non-BOS ids are all different, so that a target can be recognised."""
    rng, shards, next_id = np.random.default_rng(seed), [], 1
    for _ in range(count):
        parts = []
        for size in rng.integers(0, 30, rng.integers(1, 6)):
            parts += [[BOS], range(next_id, next_id + size)]
            next_id += size
        shards.append(np.concatenate([np.array(list(p), dtype=np.uint16) for p in parts]))
    return shards


def _targets(source, steps) -> Counter:
    found = Counter()
    for step in steps:
        for batch in source.updates(step)[0]:
            found.update(t for t in batch.targets_BT.flatten().tolist() if t > 0)
    return found


@given(st.integers(0, 1000))
def test_text_every_token_is_a_target_once_an_epoch(seed):
    shards = _shards(seed)
    total = sum(int((shard != BOS).sum()) for shard in shards)
    if total == 0:
        return
    source = TextSource(shards, batch_rows=1, **SETTINGS)
    found = _targets(source, range(len(source)))
    assert len(found) == total and set(found.values()) == {1}
    again = _targets(source, range(len(source), 2 * len(source)))
    assert again == found


def test_text_rows_follow_the_document_and_overlap_by_one():
    source = TextSource([np.array([BOS, *range(1, 20)], dtype=np.uint16)], batch_rows=1, **SETTINGS)
    rows = [source.row(i)[0].tolist() for i in range(len(source))]
    assert rows == [[0, *range(1, 9)], [*range(8, 17)], [16, 17, 18, 19]]


def test_text_orders_differ_between_epochs_and_seeds():
    shards = [np.arange(1, 4000, dtype=np.uint16)]
    orders = []
    for seed, first in ((1, 0), (1, 1), (2, 0)):
        source = TextSource(shards, batch_rows=1, **SETTINGS | {"seed": seed})
        steps = range(first * len(source), (first + 1) * len(source))
        orders.append([source.row_numbers(step)[0] for step in steps])
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] and orders[0] != orders[2]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("device_batch", [None, 1, 3])
def test_ranks_and_micro_batches_share_the_same_rows(ranks, device_batch):
    shards = _shards(5)
    whole = TextSource(shards, batch_rows=4, **SETTINGS)
    parts = [
        TextSource(
            shards, batch_rows=4, rank=r, world_size=ranks, device_batch=device_batch, **SETTINGS
        )
        for r in range(ranks)
    ]
    for step in range(5):
        rows = Counter(tuple(row) for b in whole.updates(step)[0] for row in b.inputs_BT.tolist())
        shared = Counter()
        for part in parts:
            for batch in part.updates(step)[0]:
                assert device_batch is None or len(batch.inputs_BT) <= device_batch
                shared.update(tuple(row) for row in batch.inputs_BT.tolist())
        assert shared == rows


def test_empty_shards_are_an_error():
    with pytest.raises(ValueError, match="empty"):
        TextSource([np.zeros(0, np.uint16), np.array([BOS])], batch_rows=1, **SETTINGS)


def test_batch_masks_targets_not_inputs():
    batch = batch_of_rows(
        [np.array([BOS, 5, 6, 7])], [np.array([False, False, True, True])], length=5, bos=BOS
    )
    assert batch.inputs_BT.tolist() == [[BOS, 5, 6, 7, BOS]]
    assert batch.targets_BT.tolist() == [[-1, 6, 7, -1, -1]]


def test_a_row_too_long_is_refused():
    with pytest.raises(ValueError, match="7 ids does not fit"):
        batch_of_rows([np.arange(7)], [np.ones(7, bool)], length=5, bos=BOS)


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(1, 5))
def test_pack_splits_nothing_and_loses_nothing(lengths, open_rows):
    rows = pack(lengths, 20, range(len(lengths)), open_rows)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[item] for item in row) <= 20 for row in rows)


def test_pack_wastes_little():
    lengths = np.random.default_rng(0).integers(5, 60, 2000).tolist()
    rows = pack(lengths, 256, range(len(lengths)))
    assert sum(lengths) / (256 * len(rows)) > 0.97


def test_pack_refuses_what_is_longer_than_a_row():
    with pytest.raises(ValueError, match="item 1 has 9 ids, a row holds 8"):
        pack([3, 9], 8, [0, 1])


def test_conversations_train_on_what_the_assistant_says_once_an_epoch():
    rng, ids, masks, next_id = np.random.default_rng(0), [], [], 1
    for _ in range(20):
        size = int(rng.integers(2, 9))
        ids.append([BOS, *range(next_id, next_id + size - 1)])
        masks.append([False, *(rng.random(size - 1) < 0.5)])
        next_id += size
    wanted = [
        i for row, mask in zip(ids, masks, strict=True) for i, m in zip(row, mask, strict=True) if m
    ]
    source = ConversationSource(ids, masks, batch_rows=1, **SETTINGS)
    found = _targets(source, range(len(source)))
    assert found == Counter(wanted)
