"""Discrete diffusion forcing (D2F, arXiv 2508.09192): a block-causal student learns from its bidirectional self.

Student and teacher are one network on one noisy input: the student has block-causal attention and its adapters, the
teacher full attention and none (and no gradient). Dimension letters: N masked positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, slots=True)
class DiscreteForcing:
    """The loss and what to watch beside it (all without gradient but the loss)."""

    loss: torch.Tensor
    divergence: torch.Tensor
    """Mean KL, unweighted, in nats."""
    divergence_text: torch.Tensor
    """The same over positions that are not EOS padding, which agrees trivially and hides the rest."""
    agreement: torch.Tensor
    """Share of positions where student and teacher name the same token."""


def discrete_forcing_loss(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    noise_N: torch.Tensor,
    *,
    is_padding_N: torch.Tensor | None = None,
    direction: Literal["forward", "reverse"] = "forward",
) -> DiscreteForcing:
    """Mean over masked positions of KL / p, with p the masking probability of the position's block.

    Args:
        student_NV: block-causal logits.
        teacher_NV: bidirectional logits of the same positions on the same noisy input.
        noise_N: float, masking probability of each position's block.
        is_padding_N: bool, labels that are EOS padding; None where there is none.
        direction: `forward` is KL(teacher || student), what the authors' code minimises up to a constant;
            `reverse` is KL(student || teacher), as the paper writes it.

    An empty N gives 0 with a gradient graph.
    """
    student = student_NV.float().log_softmax(-1)
    teacher = teacher_NV.detach().float().log_softmax(-1)
    left, right = (teacher, student) if direction == "forward" else (student, teacher)
    divergence_N = (left.exp() * (left - right)).sum(-1)
    text_N = torch.ones_like(noise_N, dtype=torch.bool) if is_padding_N is None else ~is_padding_N
    return DiscreteForcing(
        loss=_mean(divergence_N / noise_N),
        divergence=_mean(divergence_N).detach(),
        divergence_text=_mean(divergence_N[text_N]).detach(),
        agreement=_mean((student_NV.argmax(-1) == teacher_NV.argmax(-1)).float()),
    )


def _mean(values_N: torch.Tensor) -> torch.Tensor:
    """Mean that is 0, graph and all, for no values."""
    return values_N.sum() / max(len(values_N), 1)
