"""The head that a training step is scored against: its labels, and what it draws."""

import pytest
import torch

from tests.draft_tools import VOCAB
from unmask.training.head import TrainingHead


def test_sampled_head_keeps_labels_and_rows_together():
    weights = torch.randn(VOCAB, 8)
    head = TrainingHead(weights, [4, 9, 30], 6)
    rows = head.rows(0)
    assert rows.shape == (9, 8)
    labels = head.labels(torch.tensor([30, 4, 9]))
    assert torch.equal(rows[labels], weights[[30, 4, 9]])
    negatives = rows[3:]
    assert not any(torch.equal(row, weights[i]) for row in negatives for i in (4, 9, 30))


def test_negatives_are_drawn_once_each_and_by_the_seed_alone():
    weights = torch.arange(VOCAB).float()[:, None]
    occurring = [4, 9, 30]
    head = TrainingHead(weights, occurring, VOCAB - 5)
    drawn = head.rows(7)[3:, 0].tolist()
    assert len(drawn) == len(set(drawn)) == VOCAB - 5
    assert not set(drawn) & set(occurring)
    head.rows(8)
    assert not torch.equal(head.rows(8), head.rows(7))
    assert torch.equal(TrainingHead(weights, occurring, VOCAB - 5).rows(7), head.rows(7))
    few = TrainingHead(weights, occurring, 8)
    counts = torch.stack([few.rows(seed)[3:, 0].long() for seed in range(400)]).flatten().bincount(minlength=VOCAB)
    assert counts[occurring].tolist() == [0, 0, 0]
    of_others = counts[[i for i in range(VOCAB) if i not in occurring]]
    # 400 draws of 8 of 45: 71 of each, by 7.6.
    assert (of_others - 71).abs().max() < 35


@pytest.mark.parametrize(
    ("occurring", "negatives", "expected"),
    [(range(VOCAB), 6, VOCAB), (range(VOCAB - 2), 6, VOCAB), ([4, 9], 0, 2), ([], 5, 5)],
)
def test_a_head_draws_what_there_is(occurring, negatives, expected):
    weights = torch.randn(VOCAB, 8)
    rows = TrainingHead(weights, occurring, negatives).rows(3)
    assert rows.shape == (expected, 8)
    if expected == VOCAB:
        assert torch.equal(rows.sort(0).values, weights.sort(0).values)
    if len(occurring) == VOCAB:
        assert torch.equal(rows, weights)
