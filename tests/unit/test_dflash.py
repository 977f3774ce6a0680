"""The draft network: train-time and serving-time paths agree, and nothing at or after an anchor leaks into a block."""

import pytest
import torch

from tests.draft_tools import MASK, VOCAB, tiny_pair
from unmask.decoding.speculative import DraftState
from unmask.errors import CheckpointError
from unmask.masking.anchored import anchored_block, dense_mask
from unmask.models.dflash import DFlashConfig, spread_layer_ids
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
