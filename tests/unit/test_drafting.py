"""The drafting objective against slow references."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.draft_tools import MASK
from unmask.objectives.drafting import choose_anchors, cut_blocks, decay_weights, drafting_loss


@given(
    spans=st.lists(st.tuples(st.integers(0, 10), st.integers(0, 12)), min_size=1, max_size=4),
    num_anchors=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_anchors_are_distinct_valid_and_as_many_as_there_are(spans, num_anchors, seed):
    response = torch.zeros(len(spans), 24, dtype=torch.bool)
    for row, (start, length) in enumerate(spans):
        response[row, start : start + length] = True
    anchors = choose_anchors(response, num_anchors, torch.Generator().manual_seed(seed))
    assert anchors.shape == (len(spans), num_anchors)
    for row, (start, length) in enumerate(spans):
        valid = set(range(start, start + length - 1))
        alive = [a for a in anchors[row].tolist() if a >= 0]
        assert len(alive) == len(set(alive)) == min(num_anchors, len(valid))
        assert set(alive) <= valid
        assert alive == sorted(alive)


@given(start=st.integers(0, 6), length=st.integers(2, 10), block_size=st.integers(2, 6), seed=st.integers(0, 20))
def test_blocks_match_a_plain_loop(start, length, block_size, seed):
    total = 18
    ids = torch.randint(2, 40, (1, total), generator=torch.Generator().manual_seed(seed))
    response = torch.zeros(1, total, dtype=torch.bool)
    response[0, start : start + length] = True
    anchors = choose_anchors(response, 4, torch.Generator().manual_seed(seed))
    blocks = cut_blocks(ids, response, anchors, block_size, MASK)
    for m, anchor in enumerate(anchors[0].tolist()):
        for k in range(1, block_size):
            position = anchor + k
            expected = anchor >= 0 and position < start + length
            assert bool(blocks.valid_BMK[0, m, k - 1]) == expected
            if expected:
                assert int(blocks.labels_BMK[0, m, k - 1]) == int(ids[0, position])
                assert int(blocks.positions_BMQ[0, m, k]) == position
            assert int(blocks.ids_BMQ[0, m, k]) == MASK
        if anchor >= 0:
            assert int(blocks.ids_BMQ[0, m, 0]) == int(ids[0, anchor])


def test_decay_is_the_papers():
    assert torch.allclose(decay_weights(16), torch.tensor([math.exp(-(k - 1) / 7) for k in range(1, 16)]))
    assert torch.allclose(decay_weights(8), torch.tensor([math.exp(-(k - 1) / 4) for k in range(1, 8)]))
    assert torch.allclose(decay_weights(4, gamma=1.0), torch.tensor([1.0, math.exp(-1), math.exp(-2)]))


def reference_loss(logits, labels, valid, weights, beta, temperature):
    """Equation by equation, one row at a time."""
    cross_entropy = weight = entropy = right = 0.0
    for n in range(labels.shape[0]):
        for k in range(labels.shape[1]):
            if not valid[n, k]:
                continue
            z = logits[n, k].double()
            cross_entropy += float(weights[k] * (z.logsumexp(0) - z[labels[n, k]]))
            weight += float(weights[k])
            if int(z.argmax()) == int(labels[n, k]):
                p = (z / temperature).softmax(0)
                entropy += float(-(p * p.log()).sum())
                right += 1
    return cross_entropy / weight + beta * (entropy / right if right else 0.0)


@given(seed=st.integers(0, 200), beta=st.sampled_from([0.0, 0.5, 2.0]))
def test_loss_matches_the_reference_and_splits_over_ranks(seed, beta):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(6, 3, 11, generator=generator)
    labels = torch.randint(0, 11, (6, 3), generator=generator)
    logits.scatter_add_(2, labels[..., None], 3 * torch.rand(6, 3, 1, generator=generator))
    valid = torch.rand(6, 3, generator=generator) < 0.7
    valid[0, 0] = True
    weights = decay_weights(4)
    whole = drafting_loss(logits, labels, valid, weights, 0.5)
    expected = reference_loss(logits, labels, valid, weights, beta, 0.5)
    assert math.isclose(float(whole.loss(whole.totals(), beta)), expected, rel_tol=1e-4)
    assert math.isclose(whole.report(whole.totals(), beta)["loss"], expected, rel_tol=1e-4)
    # Two ranks with very different numbers of valid rows add up to the same loss.
    parts = [drafting_loss(logits[s], labels[s], valid[s], weights, 0.5) for s in (slice(0, 1), slice(1, 6))]
    totals = parts[0].totals() + parts[1].totals()
    assert math.isclose(sum(float(p.loss(totals, beta)) for p in parts), expected, rel_tol=1e-4)


def test_a_rank_without_valid_rows_still_has_a_graph():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    labels, valid = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bool)
    loss = drafting_loss(logits, labels, valid, decay_weights(4), 0.5)
    loss.loss(loss.totals(), 1.0).backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))
