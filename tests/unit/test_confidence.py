"""The confidence head: calibrated on a case whose probabilities are known, and without a path into the draft."""

from __future__ import annotations

import torch

from unmask.objectives.confidence import ConfidenceHead, calibration_error, confidence_loss, judged_rows
from unmask.objectives.row_losses import Rows

HIDDEN, K = 16, 3


def seen_rows(right: torch.Tensor) -> Rows:
    """Rows of which it is known whether they are right."""
    nothing = torch.zeros(right.shape)
    return Rows(nothing, nothing, right, nothing, right, right.float())


def synthetic(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, Rows]:
    """States whose direction decides, through a logistic law, how likely each row is right."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(count, K, HIDDEN, generator=generator)
    law = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(99))
    units = states / states.norm(dim=-1, keepdim=True)
    probability = (3 * units @ law + torch.tensor([1.0, 0.0, -1.0])).sigmoid()
    right = torch.rand(count, K, generator=generator) < probability
    return states, probability, seen_rows(right)


def test_it_learns_the_acceptance_probability() -> None:
    states, _, rows = synthetic(8000, 0)
    valid = torch.ones(8000, K, dtype=torch.bool)
    head = ConfidenceHead(HIDDEN, K)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        total, count = confidence_loss(head(states), rows, valid)
        loss = total / count
        loss.backward()
        return loss

    optimizer.step(closure)
    held_out, probability, seen = synthetic(8000, 1)
    with torch.no_grad():
        told = head(held_out).sigmoid()
        expected = head.chances(held_out).cumsum(-1)
    assert (told - probability).abs().mean() < 0.03
    assert calibration_error(told.flatten(), seen.right.flatten()) < 0.02
    assert calibration_error(torch.full_like(told, 0.9).flatten(), seen.right.flatten()) > 0.2
    accepted = seen.right.float().cumprod(-1).sum(-1).mean()
    torch.testing.assert_close(expected[:, -1].mean(), accepted, atol=0.05, rtol=0)


def test_rows_that_no_verification_reaches_do_not_count() -> None:
    right = torch.tensor([[True, False, True], [True, True, False]])
    rows = seen_rows(right)
    valid = torch.tensor([[True, True, True], [True, False, False]])
    logits = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    logistic = torch.nn.functional.softplus
    expected = (logistic(-logits[0, 0]) + logistic(logits[0, 1]) + logistic(-logits[1, 0])) / 3
    total, count = confidence_loss(logits, rows, valid)
    torch.testing.assert_close(total / count, expected)


def test_chances_are_float32_under_autocast() -> None:
    """Half precision would move them by more than the smallest chance that is asked for."""
    head = ConfidenceHead(HIDDEN, K)
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(3))
    states = synthetic(50, 2)[0].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        told = head(states)
    assert told.dtype == torch.float32
    assert torch.equal(told, head(states))


def test_no_gradient_reaches_the_draft() -> None:
    states = torch.randn(2, K, HIDDEN, requires_grad=True)
    ConfidenceHead(HIDDEN, K)(states).sum().backward()
    assert states.grad is None


def test_only_rows_that_a_verification_judges_count() -> None:
    chances = [0.9, 0.8, 0.7]
    assert judged_rows(chances, 0, 1) == [(0.9, False)]
    assert judged_rows(chances, 1, 2) == [(0.9, True), (0.8, False)]
    assert judged_rows(chances, 3, 4) == [(0.9, True), (0.8, True), (0.7, True)]
    # A response that ends within the block: what would have come after it is nobody's text.
    assert judged_rows(chances, 3, 2) == [(0.9, True), (0.8, True)]
    assert judged_rows([], 3, 4) == []
