from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.diffusion_tools import MASK, random_ids, tiny
from unmask.denoiser import MaskSpec
from unmask.masking.attention import Full
from unmask.masking.block_causal import BlockCausal
from unmask.masking.schedules import monotone_block_noise
from unmask.objectives.discrete_forcing import discrete_forcing_loss


def draw(seed: int, count: int = 7, vocab: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(count, vocab, generator=generator) for _ in range(2))
    return student, teacher, 0.2 + 0.5 * torch.rand(count, generator=generator)


def divergence_reference(left: torch.Tensor, right: torch.Tensor) -> list[float]:
    p, q = left.double().softmax(-1), right.double().softmax(-1)
    return (p * (p / q).log()).sum(-1).tolist()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), direction=st.sampled_from(["forward", "reverse"]))
def test_loss_is_kl_over_the_noise_of_the_block(seed: int, direction: str) -> None:
    student, teacher, noise = draw(seed)
    result = discrete_forcing_loss(student, teacher, noise, direction=direction)
    pair = (teacher, student) if direction == "forward" else (student, teacher)
    each = divergence_reference(*pair)
    expected = sum(kl / p for kl, p in zip(each, noise.tolist(), strict=True)) / len(each)
    assert result.loss.item() == pytest.approx(expected, rel=1e-4)
    assert result.divergence.item() == pytest.approx(sum(each) / len(each), rel=1e-4)


def test_forward_direction_has_the_gradient_of_soft_label_cross_entropy() -> None:
    student, teacher, noise = draw(1)
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    discrete_forcing_loss(ours, teacher, noise).loss.backward()
    soft_labels = -(teacher.softmax(-1) * theirs.log_softmax(-1)).sum(-1)
    (soft_labels / noise).mean().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_padding_is_reported_apart() -> None:
    student, teacher, noise = draw(2)
    padding = torch.tensor([False, True, False, True, False, True, True])
    result = discrete_forcing_loss(student, teacher, noise, is_padding_N=padding)
    each = torch.tensor(divergence_reference(teacher, student))
    assert result.divergence_text.item() == pytest.approx(each[~padding].mean().item(), rel=1e-4)
    agreement = (student.argmax(-1) == teacher.argmax(-1)).float().mean()
    assert result.agreement.item() == pytest.approx(agreement.item())


def test_nothing_masked_is_zero_with_a_graph() -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    result = discrete_forcing_loss(student, torch.zeros(0, 5), torch.zeros(0))
    result.loss.backward()
    assert result.loss.item() == 0.0


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_student_with_the_teachers_attention_and_no_adapters_has_no_loss(family: str) -> None:
    network = tiny(family)
    prompt_lens, lengths = torch.tensor([2, 3]), torch.tensor([12, 9])
    noisy = monotone_block_noise(
        random_ids(2, 12),
        prompt_lens,
        lengths,
        block_size=4,
        mask_id=MASK,
        generator=torch.Generator().manual_seed(0),
    )
    positions = torch.arange(12).expand(2, -1)

    def logits(mask: MaskSpec) -> torch.Tensor:
        return network(noisy.ids_BT, positions, mask=mask, logits_at=noisy.masked_BT)

    noise = noisy.noise_BT[noisy.masked_BT]
    teacher = logits(Full(lengths))
    assert discrete_forcing_loss(logits(Full(lengths)), teacher, noise).loss.item() == pytest.approx(0, abs=1e-6)
    student = logits(BlockCausal(prompt_lens, 4, lengths))
    result = discrete_forcing_loss(student, teacher, noise)
    assert result.loss.item() > 0.01
    result.loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
