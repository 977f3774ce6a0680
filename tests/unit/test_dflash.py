"""The draft network: train-time and serving-time paths agree, and nothing at or after an anchor leaks into a block."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.draft_tools import MASK, VOCAB, tiny_pair
from unmask.decoding.speculative import DraftState
from unmask.errors import CheckpointError
from unmask.masking.anchored import anchored_block, block_sparse_mask, dense_mask
from unmask.models.dflash import DFlashConfig, spread_layer_ids
from unmask.models.draft_start import new_draft
from unmask.training.drafting_forward import DraftingForward, training_blocks
from unmask.training.sequences import Batch

TOLERANCE = 1e-5


def train_logits(target, draft, ids_BT, response_BT, anchors_BM, features=None):
    batch = Batch((), ids_BT, response_BT, torch.zeros_like(ids_BT), ())
    blocks = training_blocks(batch, anchors_BM, draft.config.block_size, MASK)
    features = target.features(ids_BT) if features is None else features
    with torch.no_grad():
        hidden, _ = DraftingForward(draft)(blocks, features, target.embedding, packed=False)
    return hidden @ target.lm_head.T


def test_training_and_serving_give_the_same_logits():
    target, draft = tiny_pair()
    ids = torch.randint(2, VOCAB, (2, 20), generator=torch.Generator().manual_seed(3))
    response = torch.ones_like(ids, dtype=torch.bool)
    anchors = torch.tensor([[1, 6, 13], [2, 9, 16]])
    features = target.features(ids)
    trained = train_logits(target, draft, ids, response, anchors)
    for row in range(2):
        for block, anchor in enumerate(anchors[row].tolist()):
            state = DraftState(draft, target.embedding, target.lm_head)
            with torch.no_grad():
                # In two pieces, as a prompt and a later verification would bring them.
                state.append(features[row, : anchor // 2])
                state.append(features[row, anchor // 2 : anchor])
                served = state.block_logits(int(ids[row, anchor]), draft.config.block_size - 1)
            torch.testing.assert_close(trained[row, block], served, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("anchor", [1, 5, 11])
def test_features_at_or_after_the_anchor_change_nothing(anchor):
    target, draft = tiny_pair()
    ids = torch.randint(2, VOCAB, (1, 16), generator=torch.Generator().manual_seed(4))
    response, anchors = torch.ones_like(ids, dtype=torch.bool), torch.tensor([[anchor]])
    features = target.features(ids)
    before = train_logits(target, draft, ids, response, anchors, features)
    later = features.clone()
    later[:, anchor:] += 10 * torch.randn(later[:, anchor:].shape, generator=torch.Generator().manual_seed(5))
    assert torch.equal(before, train_logits(target, draft, ids, response, anchors, later))
    earlier = features.clone()
    earlier[:, anchor - 1] += 1
    assert not torch.allclose(before, train_logits(target, draft, ids, response, anchors, earlier), atol=1e-3)


def test_blocks_do_not_see_one_another():
    target, draft = tiny_pair()
    ids = torch.randint(2, VOCAB, (1, 18), generator=torch.Generator().manual_seed(6))
    response = torch.ones_like(ids, dtype=torch.bool)
    together = train_logits(target, draft, ids, response, torch.tensor([[3, 8, 12]]))
    permuted = train_logits(target, draft, ids, response, torch.tensor([[12, 3, 8]]))
    alone = train_logits(target, draft, ids, response, torch.tensor([[8]]))
    torch.testing.assert_close(together[0, [2, 0, 1]], permuted[0], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(together[0, 1], alone[0, 0], atol=TOLERANCE, rtol=0)


def test_dense_mask_follows_the_rule():
    anchors, block_size, context = torch.tensor([[2, 5, -1]]), 3, 7
    mask = dense_mask(anchors, block_size, context)[0, 0]
    for query in range(mask.shape[0]):
        for key in range(mask.shape[1]):
            block = query // block_size
            in_context = key < context
            allowed = key < int(anchors[0, block]) if in_context else (key - context) // block_size == block
            assert bool(mask[query, key]) == allowed, (query, key)


def test_predicate_runs_under_flex_attention():
    from torch.nn.attention.flex_attention import create_block_mask, create_mask

    anchors = torch.tensor([[2, 6], [0, 3]])
    allow = anchored_block(anchors, 4, 8)
    dense = create_mask(allow, B=2, H=1, Q_LEN=8, KV_LEN=16, device="cpu")
    assert torch.equal(dense, dense_mask(anchors, 4, 8))
    assert create_block_mask(allow, B=2, H=1, Q_LEN=8, KV_LEN=16, device="cpu").shape == (2, 1, 8, 16)


def packed_anchors(live, num_blocks, num_context, seed):
    """Ascending anchors of sequences packed into a row, dead ones in front, and the columns where theirs begin."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randperm(num_context - 1, generator=generator)[: int(torch.randint(0, 6, (), generator=generator))]
    firsts = torch.cat([torch.zeros(1, dtype=torch.long), cuts.sort().values + 1])
    anchors = torch.full((num_blocks,), -1)
    anchors[num_blocks - live :] = torch.randperm(num_context, generator=generator)[:live].sort().values
    starts = firsts[torch.searchsorted(firsts, anchors.clamp(min=0), right=True) - 1]
    return anchors, starts


def tiles_of(counts_BQ, indices_BQK):
    """Bool [B, Q, K] of the key tiles that each query tile lists."""
    listed = torch.arange(indices_BQK.shape[-1]) < counts_BQ[..., None]
    return torch.zeros_like(listed).scatter(-1, indices_BQK.long(), listed)


@settings(deadline=None, max_examples=24)
@given(
    block_size=st.sampled_from([4, 7, 10, 16]),
    live=st.tuples(st.integers(0, 128), st.integers(0, 128)),
    context_tiles=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_block_sparse_mask_is_the_dense_one(block_size, live, context_tiles, seed):
    """Full tiles whole, partial ones by the predicate, others not at all; a tile in both would count twice."""
    tile, num_context = 128, 128 * context_tiles
    both = [packed_anchors(count, 128, num_context, seed + i) for i, count in enumerate(live)]
    anchors, starts = (torch.stack(parts) for parts in zip(*both, strict=True))
    sparse = block_sparse_mask(anchors, block_size, num_context, starts, tile)
    dense = dense_mask(anchors, block_size, num_context, starts)[:, 0]
    partial = tiles_of(sparse.kv_num_blocks[:, 0], sparse.kv_indices[:, 0])
    full = tiles_of(sparse.full_kv_num_blocks[:, 0], sparse.full_kv_indices[:, 0])
    assert sparse.seq_lengths == tuple(dense.shape[1:])
    assert not (partial & full).any()
    tiled = dense.unflatten(2, (-1, tile)).unflatten(1, (-1, tile))
    assert torch.equal(tiled.all(4).all(2) & full, full)
    assert torch.equal(tiled.any(4).any(2) & ~(partial | full), torch.zeros_like(full))


@pytest.mark.parametrize("seed", [0, 1])
def test_random_weights_are_those_of_a_transformer(seed):
    target, draft = tiny_pair(num_layers=4)
    before = torch.get_rng_state()
    drawn = new_draft(draft.config, target.model, "random", seed)
    assert torch.equal(torch.get_rng_state(), before)
    again, other = (new_draft(draft.config, target.model, "random", s) for s in (seed, seed + 1))
    assert all(torch.equal(a, b) for a, b in zip(drawn.parameters(), again.parameters(), strict=True))
    linear = [module for module in drawn.modules() if isinstance(module, nn.Linear)]
    weights = torch.cat([module.weight.flatten() for module in linear]).detach()
    assert weights.std() == pytest.approx(0.02, rel=0.02)
    assert weights.mean().abs() < 5e-4
    # Of a normal distribution, and not of a uniform one of that width.
    assert (weights.abs() > 0.05).float().mean() == pytest.approx(0.0124, rel=0.25)
    assert all(module.bias is None or not module.bias.any() for module in linear)
    assert all((p == 1).all() for p in drawn.parameters() if p.ndim == 1)
    assert not torch.equal(linear[0].weight, next(m for m in other.modules() if isinstance(m, nn.Linear)).weight)


@pytest.mark.parametrize(
    ("layers", "features", "ids"),
    [(28, 5, (1, 7, 13, 19, 25)), (30, 5, (1, 8, 14, 20, 27)), (36, 5, (1, 9, 17, 25, 33)),
     (64, 5, (1, 16, 31, 46, 61)), (30, 3, (1, 14, 27)), (30, 1, (15,))],
)  # fmt: skip
def test_sampled_layers_are_those_of_the_published_drafts(layers, features, ids):
    assert spread_layer_ids(layers, features) == ids


def test_the_last_block_cannot_be_sampled():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
             "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 9, "max_position_embeddings": 8, "block_size": 2,
             "mask_token_id": 1, "num_target_layers": 6}  # fmt: skip
    DFlashConfig(**sizes, target_layer_ids=(4,))
    with pytest.raises(CheckpointError, match="target_layer_ids"):
        DFlashConfig(**sizes, target_layer_ids=(5,))


def test_features_are_the_residual_stream_after_a_block():
    target, _ = tiny_pair()
    ids = torch.tensor([[3, 9, 4, 7]])
    states = target.model(ids, output_hidden_states=True).hidden_states
    expected = torch.cat([states[i + 1] for i in target.layer_ids], dim=-1)
    assert torch.equal(target.features(ids), expected)
    assert torch.equal(target.forward(ids)[1], expected)
