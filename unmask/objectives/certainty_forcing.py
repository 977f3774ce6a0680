"""Certainty forcing (dParallel, arXiv 2509.26488): keep the answer, and be sure of what is already right.

Dimension letters: N positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


def certainty_entropy(
    logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean entropy, at a temperature, of the predictions that are already right.

    H = logsumexp(z / T) - sum_v p_v z_v / T with p = softmax(z / T). Membership is a gate without gradient. With
    T < 1 the distribution is sharper than the model's own, so the gradient concentrates on tokens that are right but
    not yet nearly one-hot.

    Args:
        logits: [..., V], any float dtype (computed in float32).
        labels: int64 [...], indices into V.
        valid: bool [...]; positions that may count.
        temperature: T.

    Returns:
        The mean in nats (float32 scalar; 0 with a gradient graph where nothing is right), and the number of
        positions averaged (float32 scalar, no gradient).
    """
    right = valid & (logits.detach().argmax(-1) == labels)
    scaled_NV = logits[right].float() / temperature
    entropy_N = scaled_NV.logsumexp(-1) - (scaled_NV.softmax(-1) * scaled_NV).sum(-1)
    count = right.sum().float()
    return entropy_N.sum() / count.clamp(min=1.0), count


@dataclass(frozen=True, slots=True)
class CertaintyForcing:
    """The parts of one view's loss, with their gradient graphs, and the numbers of positions that they are means of."""

    cross_entropy: torch.Tensor
    entropy: torch.Tensor
    num_positions: int
    num_right: torch.Tensor
    beta: float

    @property
    def loss(self) -> torch.Tensor:
        """CE(S) + beta * ENT(S)."""
        return self.cross_entropy + self.beta * self.entropy


def certainty_forcing_loss(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, *, beta: float = 2.0, temperature: float = 0.5
) -> CertaintyForcing:
    """One view's loss, CE(S) + beta * ENT(S) (arXiv 2509.26488, equations 5-7); a step sums its two views.

    Args:
        logits_NV: predictions of the view's loss positions S, those of all rows pooled.
        labels_N: int64, the teacher's tokens there.
        beta: weight of the entropy term (paper: 2).
        temperature: T of the entropy term (paper: 0.5); the cross-entropy is taken at 1.

    An empty S gives 0 with a gradient graph, so that every rank still takes part in its collectives.
    """
    num_positions = len(labels_N)
    total = F.cross_entropy(logits_NV.float(), labels_N, reduction="sum")
    cross_entropy = total / max(num_positions, 1)
    valid_N = torch.ones_like(labels_N, dtype=torch.bool)
    entropy, num_right = certainty_entropy(logits_NV, labels_N, valid_N, temperature)
    return CertaintyForcing(cross_entropy, entropy, num_positions, num_right, beta)
