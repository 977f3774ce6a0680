from __future__ import annotations

import pytest
import torch

from tests.diffusion_tools import MASK, random_ids
from unmask.masking.attention import dense_form
from unmask.masking.schedules import uniform_noise
from unmask.objectives.adaptation import (
    adaptation_loss,
    annealed_mask,
    annealing_probability,
    loss_shares,
    padding_weights,
)


def test_annealing_goes_from_causal_to_full() -> None:
    assert [annealing_probability(step, 200) for step in (0, 50, 200, 900)] == [0.0, 0.25, 1.0, 1.0]
    assert annealing_probability(0, 0) == 1.0
    generator = torch.Generator().manual_seed(0)
    columns = torch.arange(40).expand(3, -1)
    causal = torch.ones(40, 40, dtype=torch.bool).tril()
    for probability, expected in ((0.0, 0.0), (0.3, 0.3), (1.0, 1.0)):
        allowed = dense_form(annealed_mask((3, 40), probability, generator), columns, 40)[:, 0]
        assert allowed[:, causal].all()
        assert allowed[:, ~causal].float().mean().item() == pytest.approx(expected, abs=0.03)


def test_padding_weights_cap_the_share_of_padding() -> None:
    weights = padding_weights(torch.tensor([2, 1]), torch.tensor([5, 3]), 8, full=1, rest=0.05)
    assert weights[0].tolist() == pytest.approx([0, 0, 1, 1, 1, 1, 0.05, 0.05])
    assert weights[1].tolist() == pytest.approx([0, 1, 1, 1, 0.05, 0.05, 0.05, 0.05])
    shares = loss_shares(weights)
    assert shares.sum(1).tolist() == pytest.approx([0.5, 0.5])


def test_loss_is_the_weighted_cross_entropy_over_p() -> None:
    generator = torch.Generator().manual_seed(1)
    ids, prompt_lens, lengths = random_ids(3, 9), torch.tensor([2, 1, 3]), torch.tensor([9, 6, 9])
    noisy = uniform_noise(ids, prompt_lens, lengths, mask_id=MASK, generator=generator)
    logits = torch.randn(3, 9, 41, generator=generator)
    response = (torch.arange(9) >= prompt_lens[:, None]) & (torch.arange(9) < lengths[:, None])
    shares = loss_shares(response.float())
    at = noisy.masked_BT
    loss = adaptation_loss(logits[at], ids[at], noisy.noise_BT[at], shares[at])
    expected = 0.0
    for row in range(3):
        answer_len = int(lengths[row] - prompt_lens[row])
        for column in at[row].nonzero().flatten().tolist():
            cross_entropy = -logits[row, column].log_softmax(-1)[ids[row, column]].item()
            expected += cross_entropy / noisy.noise_BT[row, column].item() / answer_len / 3
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_loss_is_unbiased_in_the_noise() -> None:
    ids = random_ids(4000, 6)
    prompt_lens, lengths = torch.full((4000,), 2), torch.full((4000,), 6)
    generator = torch.Generator().manual_seed(0)
    noisy = uniform_noise(ids, prompt_lens, lengths, mask_id=MASK, generator=generator, epsilon=0.2)
    at = noisy.masked_BT
    shares = loss_shares((torch.arange(6) >= 2).float().expand(4000, -1))
    flat = torch.zeros(int(at.sum()), 41)
    loss = adaptation_loss(flat, ids[at], noisy.noise_BT[at], shares[at])
    assert loss.item() == pytest.approx(torch.tensor(41.0).log().item(), rel=0.03)


def test_nothing_masked_is_zero_with_a_graph() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = adaptation_loss(logits, torch.zeros(0, dtype=torch.long), torch.zeros(0), torch.zeros(0))
    loss.backward()
    assert loss.item() == 0.0
