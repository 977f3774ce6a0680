from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.objectives.certainty_forcing import certainty_entropy, certainty_forcing_loss


def logits_and_labels(seed: int, count: int = 6, vocab: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, vocab, generator=generator)
    return logits, torch.randint(0, vocab, (count,), generator=generator)


def entropy_reference(logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor, temperature: float) -> float:
    values = []
    for row, label, counts in zip(logits.double(), labels, valid, strict=True):
        if counts and int(row.argmax()) == int(label):
            p = torch.softmax(row / temperature, dim=0)
            values.append(-(p * (p + 1e-12).log()).sum().item())
    return sum(values) / len(values) if values else 0.0


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), temperature=st.sampled_from([0.5, 1.0, 2.0]))
def test_mean_entropy_of_right_positions(seed: int, temperature: float) -> None:
    logits, labels = logits_and_labels(seed)
    labels[::2] = logits[::2].argmax(-1)
    valid = torch.rand(6, generator=torch.Generator().manual_seed(seed)) < 0.7
    mean, count = certainty_entropy(logits, labels, valid, temperature)
    assert mean.item() == pytest.approx(entropy_reference(logits, labels, valid, temperature), abs=1e-5)
    assert count.item() == (valid & (logits.argmax(-1) == labels)).sum().item()
    assert mean.dtype == torch.float32


def test_any_leading_shape_and_low_precision() -> None:
    logits, labels = logits_and_labels(1, count=12)
    flat = certainty_entropy(logits, labels, torch.ones(12, dtype=torch.bool), 0.5)
    nested = certainty_entropy(logits.view(3, 4, 5), labels.view(3, 4), torch.ones(3, 4, dtype=torch.bool), 0.5)
    torch.testing.assert_close(nested, flat)
    mean, _ = certainty_entropy(logits.bfloat16(), labels, torch.ones(12, dtype=torch.bool), 0.5)
    assert mean.dtype == torch.float32


def test_gradient_reaches_right_positions_only_and_equals_finite_differences() -> None:
    logits, labels = logits_and_labels(3)
    labels[:3] = logits[:3].argmax(-1)
    labels[3:] = (logits[3:].argmax(-1) + 1) % 5
    valid = torch.tensor([True, True, False, True, True, True])
    variable = logits.clone().requires_grad_()
    mean, count = certainty_entropy(variable, labels, valid, 0.5)
    mean.backward()
    assert count.item() == 2
    assert (variable.grad[:2].abs().sum(-1) > 0).all()
    assert (variable.grad[2:] == 0).all()
    step = 1e-2
    for position in range(2):
        for token in range(5):
            up, down = logits.clone(), logits.clone()
            up[position, token] += step
            down[position, token] -= step
            above, below = (entropy_reference(z, labels, valid, 0.5) for z in (up, down))
            slope = variable.grad[position, token].item()
            assert slope == pytest.approx((above - below) / (2 * step), abs=1e-3)


def test_extreme_logits_keep_a_finite_gradient() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]], requires_grad=True)
    mean, _ = certainty_entropy(logits, torch.tensor([0, 0]), torch.ones(2, dtype=torch.bool), 0.5)
    mean.backward()
    assert mean.item() == pytest.approx(torch.tensor(3.0).log().item() / 2, abs=1e-6)
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("count", [0, 4])
def test_nothing_right_is_zero_with_a_graph(count: int) -> None:
    logits = torch.zeros(count, 5, requires_grad=True)
    mean, right = certainty_entropy(
        logits, torch.full((count,), 4), torch.ones(count, dtype=torch.bool), temperature=0.5
    )
    assert (mean.item(), right.item()) == (0.0, 0.0)
    mean.backward()
    assert torch.equal(logits.grad, torch.zeros(count, 5))


def test_loss_is_cross_entropy_plus_weighted_entropy() -> None:
    logits, labels = logits_and_labels(5)
    labels[:3] = logits[:3].argmax(-1)
    view = certainty_forcing_loss(logits, labels, beta=2.0, temperature=0.5)
    cross_entropy = -logits.log_softmax(-1)[torch.arange(6), labels].mean()
    entropy = entropy_reference(logits, labels, torch.ones(6, dtype=torch.bool), 0.5)
    assert view.loss.item() == pytest.approx(cross_entropy.item() + 2 * entropy, abs=1e-5)
    assert view.num_positions == 6


def test_an_empty_view_is_zero_with_a_graph() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    view = certainty_forcing_loss(logits, torch.zeros(0, dtype=torch.long))
    view.loss.backward()
    assert view.loss.item() == 0.0
    assert logits.grad.shape == (0, 5)
