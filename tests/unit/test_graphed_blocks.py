"""The graph's sequence of kernels, run eagerly, against the gathering reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.pairing_tools import BLOCK_SIZE, HIDDEN, tiny_draft, tiny_vocabulary
from unmask.pairing.block_drafter import BlockDrafter
from unmask.pairing.context_cache import ContextCache
from unmask.pairing.graphed_blocks import GraphedBlocks, halvings

K = BLOCK_SIZE - 1


def filled(drafter_type: type[BlockDrafter], draft, lengths: list[int], gap: int = 0, **options) -> tuple:
    """A drafter whose cache holds requests 0, 1, ... of the given lengths; those of odd number begin after a gap."""
    config, vocabulary = draft.config, tiny_vocabulary()
    cache = ContextCache(
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype=torch.float32,
        device=torch.device("cpu"),
        memory_mb=2,
        page_size=4,
    )
    drafter = drafter_type(draft, vocabulary, vocabulary, cache, **options)
    keys = [(0, i) for i in range(len(lengths))]
    starts = np.array([gap * (i % 2) for i in range(len(lengths))])
    reserved = cache.reserve(keys, starts, np.array(lengths))
    context = torch.randn(sum(lengths), HIDDEN, generator=torch.Generator().manual_seed(2))
    drafter.append(context, reserved.positions, reserved.slots)
    return drafter, cache.tables.table(keys), starts + np.array(lengths)


@pytest.mark.parametrize("lengths", [[1], [3, 9, 1], [5, 6, 7, 8, 9, 10, 11]])
@pytest.mark.parametrize("k", [1, K])
def test_passes_equal_the_reference(lengths: list[int], k: int) -> None:
    tokens = np.arange(1, len(lengths) + 1, dtype=np.int32)
    proposed = []
    for drafter_type, options in ((BlockDrafter, {}), (GraphedBlocks, {"ladder": (1, 2, 4)})):
        drafter, table, anchors = filled(drafter_type, tiny_draft(), lengths, gap=3, **options)
        proposed.append(drafter.draft(tokens, anchors, table, k).tolist())
    assert proposed[0] == proposed[1]
    assert len(proposed[0]) == len(lengths)


def test_one_gemm_makes_the_keys_and_values_of_all_layers() -> None:
    pools = []
    for drafter_type in (BlockDrafter, GraphedBlocks):
        drafter, _, _ = filled(drafter_type, tiny_draft(), [500, 400, 300])
        held = slice(0, drafter._cache.spare_slot)
        pools.append((drafter._cache.keys[:, held], drafter._cache.values[:, held]))
    torch.testing.assert_close(pools[0], pools[1], atol=1e-5, rtol=1e-5)


def test_rows_beyond_the_last_position_harm_nobody() -> None:
    proposed = []
    for drafter_type in (BlockDrafter, GraphedBlocks):
        drafter, _, anchors = filled(drafter_type, tiny_draft(max_position_embeddings=64), [9, 70])
        table = drafter._cache.tables.table([(0, 0)])
        proposed.append(drafter.draft(np.array([5]), anchors[:1], table, K).tolist())
    assert proposed[0] == proposed[1]


def test_adopted_weights_are_used_throughout() -> None:
    lengths, tokens = [9, 4], np.array([5, 6], dtype=np.int32)
    own = tiny_draft()
    drafter, _, _ = filled(GraphedBlocks, own, lengths)
    drafter.adopt(tiny_draft(seed=3))
    fresh, fresh_table, anchors = filled(GraphedBlocks, tiny_draft(seed=3), lengths)
    _, table, _ = filled(GraphedBlocks, tiny_draft(seed=3), lengths)
    drafter._cache.keys.copy_(fresh._cache.keys)
    drafter._cache.values.copy_(fresh._cache.values)
    assert drafter.draft(tokens, anchors, table, K).tolist() == fresh.draft(tokens, anchors, fresh_table, K).tolist()
    assert torch.equal(drafter._kv_weight, fresh._kv_weight)


def test_halvings_end_at_one() -> None:
    assert halvings(15) == [15, 7, 3, 1]
    assert halvings(1) == [1]
