"""What one predicted row costs: its loss, its entropy, and the gradients of both, from the logits of that row alone.

A draft is accepted with probability sum_v min(p_v, q_v) at its best, which cross-entropy and KL bound and TV equals.
LK-hybrid goes from KL to TV as they agree (arXiv 2602.23881). Dimension letters: N rows, V vocabulary; q is the
draft's distribution, p the target's.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

LossName = Literal["ce", "kl", "tv", "lk_hybrid"]
_ETA = 3.0
"""How soon LK-hybrid leans on TV (the paper's best)."""


@dataclass(frozen=True, slots=True)
class RowObjective:
    """Which terms a row has."""

    loss: LossName = "ce"
    entropy: bool = False
    """Whether the certainty term is computed."""
    temperature: float = 0.5
    """T of the certainty term."""
    relative: bool = False
    """The certainty term is [H_T(q) - H_T(p)]_+ in place of H_T(q), and rows are compared with p (`Rows.agrees`)."""
    verified_at: float = 1.0
    """Temperature at which drafted tokens are verified, for `Rows.acceptance`."""
    target_temperature: float = 1.0
    """Of the p that KL, TV and LK-hybrid compare q with; towards 0 KL is cross-entropy with p's likeliest token."""

    @property
    def needs_target(self) -> bool:
        """Whether the target's logits are needed beside its tokens."""
        return self.loss != "ce" or (self.entropy and self.relative)


@dataclass(frozen=True, slots=True)
class Rows:
    """Per-row figures, float32 (bool for `right` and `agrees`); `loss` and `entropy` may carry gradients.

    The drafted token is argmax q. In `agrees` and `acceptance` p is the target's distribution if the objective is
    relative to it and its logits are given; else p is one at the text's token.
    """

    loss: Tensor
    entropy: Tensor
    right: Tensor
    """Whether the drafted token is the text's: in greedy text the row is accepted if all before it are."""
    confidence: Tensor
    """q of the text's token."""
    agrees: Tensor
    """Whether argmax q = argmax p."""
    acceptance: Tensor
    """Probability that the drafted token is accepted: p(argmax q) at `RowObjective.verified_at`, at 0 whether it
    agrees."""

    def parts(self) -> tuple[Tensor, ...]:
        """The figures in the order of the fields."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def view(self, *shape: int) -> Rows:
        """The same rows in another shape."""
        return Rows(*(part.view(shape) for part in self.parts()))


def row_losses(logits_NV: Tensor, labels_N: Tensor, target_NV: Tensor | None, objective: RowObjective) -> Rows:
    """The terms as written in the papers, differentiated by autograd: the reference of `row_gradients`.

    Args:
        logits_NV: the draft's, any float dtype (computed in float32).
        labels_N: int64, the target's tokens.
        target_NV: the target's logits at the same rows; None unless `objective.needs_target`.
    """
    logits = logits_NV.float()
    log_q = logits.log_softmax(-1)
    label_log_q = log_q.gather(-1, labels_N[:, None])[:, 0]
    loss = -label_log_q
    if objective.loss != "ce":
        log_p = _log_softmax(_known(target_NV), objective.target_temperature)
        overlap = torch.minimum(log_q.exp(), log_p.exp()).sum(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        weight = _kl_share(objective.loss, overlap.detach())
        loss = weight * kl + (1 - weight) * (1 - overlap)
    entropy = torch.zeros_like(loss)
    if objective.entropy:
        entropy = _entropy(logits, objective.temperature)
        if objective.relative:
            entropy = (entropy - _entropy(_known(target_NV).float(), objective.temperature)).relu()
    drafted = logits.detach().argmax(-1)
    right = drafted == labels_N
    judged = _judged(drafted, right, target_NV, objective)
    return Rows(loss, entropy, right, label_log_q.detach().exp(), *judged)


def row_gradients(
    logits_NV: Tensor, labels_N: Tensor, target_NV: Tensor | None, objective: RowObjective
) -> tuple[Rows, list[Tensor]]:
    """`row_losses` without a graph, and the gradient of each term with respect to the logits in closed form.

    Written so that a compiler makes one pass for the sums and one for the gradients.

    Returns:
        The rows, and [N, V] gradients in the dtype of the logits: of the loss, then of the entropy if there is one.
    """
    logits = logits_NV.float()
    log_q = logits.log_softmax(-1)
    q = log_q.exp()
    is_label = torch.arange(logits.shape[-1], device=logits.device) == labels_N[:, None]
    label_log_q = log_q.gather(-1, labels_N[:, None])[:, 0]
    loss, gradient = -label_log_q, q - is_label.float()
    if objective.loss != "ce":
        log_p = _log_softmax(_known(target_NV), objective.target_temperature)
        p = log_p.exp()
        overlap = torch.minimum(q, p).sum(-1)
        kl = (p * (log_p - log_q)).sum(-1)
        weight = _kl_share(objective.loss, overlap)
        loss = weight * kl + (1 - weight) * (1 - overlap)
        below = (q < p).float()
        of_tv = -q * (below - (below * q).sum(-1, keepdim=True))
        gradient = weight[:, None] * (q - p) + (1 - weight[:, None]) * of_tv
    gradients = [gradient.to(logits_NV.dtype)]
    entropy = torch.zeros_like(loss)
    if objective.entropy:
        log_sharp = (logits / objective.temperature).log_softmax(-1)
        sharp = log_sharp.exp()
        entropy = -(sharp * log_sharp).sum(-1)
        gradient = -sharp * (log_sharp + entropy[:, None]) / objective.temperature
        if objective.relative:
            entropy = entropy - _entropy(_known(target_NV).float(), objective.temperature)
            gradient = gradient * (entropy > 0).float()[:, None]
            entropy = entropy.relu()
        gradients.append(gradient.to(logits_NV.dtype))
    drafted = logits.argmax(-1)
    right = drafted == labels_N
    judged = _judged(drafted, right, target_NV, objective)
    return Rows(loss, entropy, right, label_log_q.exp(), *judged), gradients


def _known(target_NV: Tensor | None) -> Tensor:
    if target_NV is None:
        raise ValueError("this objective needs the target's logits")
    return target_NV


def _judged(
    drafted_N: Tensor, right_N: Tensor, target_NV: Tensor | None, objective: RowObjective
) -> tuple[Tensor, Tensor]:
    """`agrees` and `acceptance` of `Rows`."""
    # Only the relative gate reads them, and another pass over the target's logits is a tenth of the default's rows.
    if target_NV is None or not objective.relative:
        return right_N, right_N.float()
    agrees = drafted_N == target_NV.argmax(-1)
    if objective.verified_at == 0:
        return agrees, agrees.float()
    log_p = _log_softmax(target_NV, objective.verified_at)
    return agrees, log_p.gather(-1, drafted_N[:, None])[:, 0].exp()


def _log_softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    """Log-probabilities in float32."""
    logits = logits_NV.float()
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def _kl_share(loss: LossName, overlap_N: Tensor) -> Tensor:
    """Share of KL in the loss; the rest is TV."""
    if loss == "lk_hybrid":
        return torch.exp(-_ETA * overlap_N)
    return torch.full_like(overlap_N, 1.0 if loss == "kl" else 0.0)


def _entropy(logits_NV: Tensor, temperature: float) -> Tensor:
    log_probabilities = (logits_NV / temperature).log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)
