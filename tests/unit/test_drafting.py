"""The drafting objective against slow references."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.draft_tools import MASK
from unmask.config import DistillConfig
from unmask.errors import ConfigError
from unmask.objectives.drafting import (
    certainty_gates,
    choose_anchors,
    cut_blocks,
    decay_weights,
    drafting_loss,
    position_weights,
    report,
)
from unmask.objectives.row_losses import RowObjective, Rows, row_losses
from unmask.training.chunked_head import chunked_rows, eager_rows
from unmask.training.rates import certainty_weight


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


def random_rows(seed, blocks=6, size=3, vocabulary=11):
    """Logits that are often right, labels, target logits, validity that only ever ends (as blocks do)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(blocks, size, vocabulary, generator=generator)
    labels = torch.randint(0, vocabulary, (blocks, size), generator=generator)
    logits.scatter_add_(2, labels[..., None], 5 * torch.rand(blocks, size, 1, generator=generator))
    target = logits + torch.randn(blocks, size, vocabulary, generator=generator)
    lengths = torch.randint(0, size + 1, (blocks, 1), generator=generator)
    lengths[0] = size
    return logits, labels, target, torch.arange(size) < lengths


def entropy(z, temperature):
    p = (z.double() / temperature).softmax(0)
    return float(-(p * p.log()).sum())


def reference_row(z, label, t, loss, target_temperature):
    """The definitions, one row at a time in float64."""
    q, p = z.double().softmax(0), (t.double() / target_temperature).softmax(0)
    overlap = float(torch.minimum(p, q).sum())
    kl = float((p * (p / q).log()).sum())
    share = math.exp(-3 * overlap)
    return {
        "ce": -math.log(float(q[label])),
        "kl": kl,
        "tv": 0.5 * float((p - q).abs().sum()),
        "lk_hybrid": share * kl + (1 - share) * (1 - overlap),
    }[loss]


def reference_weight(kind, block, k, right, confidence, valid, decay, smoothing):
    if not valid[block][k]:
        return 0.0
    if kind == "decay":
        return decay[k]
    if kind == "first_miss":
        return float(all(right[block][j] for j in range(k)))
    smooth = [(1 - smoothing) * c + smoothing for c in confidence[block]]
    if kind == "d_pace_first_miss":
        smooth[:k] = [float(r) for r in right[block][:k]]
    return sum(math.prod(smooth[: end + 1]) for end in range(k, len(smooth)) if valid[block][end])


def reference_gate(kind, k, z_KV, t_KV, labels_K, valid_K, temperature):
    """Of row k of a block, from its logits, the target's and the text."""
    drafted = z_KV.argmax(-1).tolist()
    if not valid_K[k]:
        return 0.0
    if kind != "target_relative":
        needed = range(k + 1) if kind == "prefix_right" else [k]
        return float(all(drafted[j] == int(labels_K[j]) for j in needed))
    likeliest = t_KV.argmax(-1).tolist()
    if drafted[k] != likeliest[k]:
        return 0.0
    if temperature == 0:
        return float(drafted[:k] == likeliest[:k])
    return math.prod(float((t_KV[j].double() / temperature).softmax(0)[drafted[j]]) for j in range(k))


@settings(deadline=None)
@given(
    seed=st.integers(0, 200),
    loss=st.sampled_from(["ce", "kl", "tv", "lk_hybrid"]),
    weighting=st.sampled_from(["decay", "d_pace", "first_miss", "d_pace_first_miss"]),
    smoothing=st.sampled_from([0.0, 0.5, 0.8]),
    gate=st.sampled_from(["right", "prefix_right", "target_relative"]),
    beta=st.sampled_from([0.0, 0.5, 2.0]),
    verified_at=st.sampled_from([0.0, 0.7, 1.0]),
    compared_at=st.sampled_from([0.3, 1.0]),
)
def test_every_objective_matches_its_definition_and_splits_over_ranks(
    seed, loss, weighting, smoothing, gate, beta, verified_at, compared_at
):
    logits, labels, target, valid = random_rows(seed)
    objective = RowObjective(
        loss, entropy=True, temperature=0.5, relative=gate == "target_relative", verified_at=verified_at,
        target_temperature=compared_at,
    )  # fmt: skip
    rows = row_losses(logits.flatten(0, 1), labels.flatten(), target.flatten(0, 1), objective).view(*labels.shape)
    decay = decay_weights(4)

    def sums(part):
        chosen = Rows(*(figures[part] for figures in rows.parts()))
        weights = position_weights(weighting, chosen, valid[part], decay, smoothing)
        return drafting_loss(chosen, valid[part], weights, certainty_gates(gate, chosen, valid[part]))

    right = (logits.argmax(-1) == labels).tolist()
    confidence = logits.double().softmax(-1).gather(-1, labels[..., None])[..., 0].tolist()
    row_sum = weight_sum = entropy_sum = gate_sum = 0.0
    for block, k in itertools.product(range(6), range(3)):
        z, t = logits[block, k], target[block, k]
        weight = reference_weight(weighting, block, k, right, confidence, valid.tolist(), decay.tolist(), smoothing)
        row_sum += weight * reference_row(z, int(labels[block, k]), t, loss, compared_at)
        weight_sum += weight
        term = entropy(z, 0.5) - (entropy(t, 0.5) if gate == "target_relative" else 0.0)
        of_gate = reference_gate(gate, k, logits[block], target[block], labels[block], valid[block], verified_at)
        entropy_sum += of_gate * max(term, 0.0)
        gate_sum += of_gate
    expected = row_sum / weight_sum + beta * (entropy_sum / gate_sum if gate_sum else 0.0)
    whole = sums(slice(0, 6))
    assert math.isclose(float(whole.loss(whole.totals(), beta)), expected, rel_tol=1e-4, abs_tol=1e-6)
    assert math.isclose(float(report(whole.totals(), beta)["loss"]), expected, rel_tol=1e-4, abs_tol=1e-6)
    # Two ranks with very different numbers of valid rows add up to the same loss.
    parts = [sums(slice(0, 1)), sums(slice(1, 6))]
    totals = parts[0].totals() + parts[1].totals()
    assert math.isclose(sum(float(p.loss(totals, beta)) for p in parts), expected, rel_tol=1e-4, abs_tol=1e-6)


@settings(deadline=None)
@given(
    seed=st.integers(0, 200),
    loss=st.sampled_from(["ce", "kl", "tv", "lk_hybrid"]),
    relative=st.booleans(),
    known=st.booleans(),
    verified_at=st.sampled_from([0.0, 0.7, 1.0]),
    compared_at=st.sampled_from([0.3, 1.0]),
    chunk=st.sampled_from([1, 40, 100, 10**6]),
)
def test_chunks_give_the_terms_and_gradients_of_all_logits_at_once(
    seed, loss, relative, known, verified_at, compared_at, chunk
):
    generator = torch.Generator().manual_seed(seed)
    hidden, target = torch.randn(2, 9, 6, generator=generator, dtype=torch.float64).unbind()
    head = torch.randn(13, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 13, (9,), generator=generator)
    upstream = torch.rand(2, 9, generator=generator)
    objective = RowObjective(
        loss, entropy=True, temperature=0.5, relative=relative, verified_at=verified_at, target_temperature=compared_at
    )
    if not (known or objective.needs_target):
        target = None
    results = []
    for rows_of in (lambda *a: chunked_rows(*a, chunk_elements=chunk), eager_rows):
        leaf = hidden.clone().requires_grad_()
        rows = rows_of(leaf, head, labels, target, objective)
        ((rows.loss * upstream[0]).sum() + (rows.entropy * upstream[1]).sum()).backward()
        results.append((*(part.detach() for part in rows.parts()), leaf.grad))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_the_relative_gate_asks_the_targets_distribution_and_not_the_text():
    """Three rows whose drafted token is the target's likeliest and not the text's, then one the other way round."""
    drafted = torch.tensor([1, 2, 3, 0])
    text = torch.tensor([0, 0, 0, 0])
    p = torch.tensor([[0.4, 0.6, 0, 0], [0.1, 0.2, 0.5, 0.2], [0.1, 0.1, 0.1, 0.7], [0.3, 0.4, 0.2, 0.1]])
    logits = 3 * torch.nn.functional.one_hot(drafted, 4).float()
    valid = torch.ones(1, 4, dtype=torch.bool)
    for verified_at, expected in ((1.0, [1, 0.6, 0.6 * 0.5, 0]), (0.0, [1, 1, 1, 0])):
        objective = RowObjective(entropy=True, relative=True, verified_at=verified_at)
        rows = row_losses(logits, text, p.log(), objective).view(1, 4)
        assert certainty_gates("target_relative", rows, valid)[0].tolist() == pytest.approx(expected)
        assert certainty_gates("right", rows, valid)[0].tolist() == [0, 0, 0, 1]
        assert rows.right[0].tolist() == [False, False, False, True]
    # Reach ends where a drafted token that the target does not have is verified at 0.
    behind = row_losses(logits.roll(1, 0), text, p.roll(1, 0).log(), objective).view(1, 4)
    assert certainty_gates("target_relative", behind, valid)[0].tolist() == [0, 0, 0, 0]


def test_a_cold_targets_divergence_is_cross_entropy_with_its_likeliest_token():
    logits, labels, target, _ = (part.flatten(0, 1) for part in random_rows(0))
    cold = row_losses(logits, labels, target, RowObjective("kl", target_temperature=1e-3))
    hard = row_losses(logits, target.argmax(-1), None, RowObjective("ce"))
    torch.testing.assert_close(cold.loss, hard.loss)


def test_without_the_targets_logits_its_token_is_all_of_its_distribution():
    logits, labels, _, _ = random_rows(0)
    # With cross-entropy alone a relative objective has no term that needs them.
    rows = row_losses(logits.flatten(0, 1), labels.flatten(), None, RowObjective(relative=True))
    assert torch.equal(rows.agrees, rows.right)
    assert torch.equal(rows.acceptance, rows.right.float())


def test_a_rank_without_valid_rows_still_has_a_graph():
    logits = torch.randn(6, 5, requires_grad=True)
    labels, valid = torch.zeros(6, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bool)
    rows = row_losses(logits, labels, None, RowObjective(entropy=True)).view(2, 3)
    weights = position_weights("decay", rows, valid, decay_weights(4))
    loss = drafting_loss(rows, valid, weights, certainty_gates("right", rows, valid))
    loss.loss(loss.totals(), 1.0).backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_beta_rises_when_the_schedule_says():
    config = DistillConfig(beta=2.0, certainty_start=0.3, certainty_ramp=0.2)
    weights = [certainty_weight(config, progress) for progress in (0.0, 0.29, 0.3, 0.4, 0.5, 1.0)]
    assert weights == pytest.approx([0, 0, 0, 1, 2, 2])
    assert certainty_weight(DistillConfig(beta=2.0, certainty_start=0.0), 0.0) == 2.0
    last = DistillConfig(beta=2.0, certainty_start=0.6, certainty_ramp=0.4)
    assert certainty_weight(last, 1.0) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("start", "ramp", "field"),
    [(1.0, 0.0, "certainty_start"), (0.7, 0.4, "certainty_ramp"), (0.01, 1.0, "certainty_ramp")],
)
def test_a_schedule_that_never_reaches_beta_is_refused(start, ramp, field):
    with pytest.raises(ConfigError, match=rf"^distill\.{field}: .*lower"):
        DistillConfig(beta=1.0, certainty_start=start, certainty_ramp=ramp)
