"""The DFlash training objective (arXiv 2602.06036, section 4): anchored blocks and position-decayed cross-entropy.

Dimension letters: B batch, T sequence, M anchors a sequence, K = block size - 1 predicted rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.objectives.certainty_forcing import certainty_entropy

GAMMA = {16: 7.0, 10: 5.0, 8: 4.0}
"""Decay constants of the paper by block size."""


@dataclass(frozen=True, slots=True)
class AnchoredBlocks:
    """Training blocks cut from a batch of sequences."""

    ids_BMQ: Tensor
    """[anchor token, mask, mask ...] of each block."""
    positions_BMQ: Tensor
    labels_BMK: Tensor
    valid_BMK: Tensor
    """False where a label lies outside the response, and in dead blocks."""


def choose_anchors(response_BT: Tensor, num_anchors: int, generator: torch.Generator) -> Tensor:
    """Draw M anchors a sequence, uniformly without replacement among valid response positions.

    A position is valid if it and the next one are response tokens. Sequences with fewer take them all and
    fill up with -1 (dead blocks), so that every rank always has work for its collectives.

    Args:
        response_BT: bool, True on response tokens.
        generator: draws the anchors (on the device of `response_BT`).

    Returns:
        int64 [B, M], ascending where alive.
    """
    valid = response_BT & F.pad(response_BT[:, 1:], (0, 1), value=False)
    scores = torch.rand(valid.shape, generator=generator, device=valid.device).masked_fill(~valid, -1.0)
    best, positions = scores.topk(min(num_anchors, valid.shape[1]), dim=1)
    anchors = positions.masked_fill(best < 0, valid.shape[1]).sort(dim=1).values
    anchors = F.pad(anchors, (0, num_anchors - anchors.shape[1]), value=valid.shape[1])
    return anchors.masked_fill(anchors == valid.shape[1], -1)


def cut_blocks(
    ids_BT: Tensor, response_BT: Tensor, anchors_BM: Tensor, block_size: int, mask_token_id: int
) -> AnchoredBlocks:
    """Build the blocks that start at the anchors: a clean anchor, then masks that predict their own positions."""
    offsets = torch.arange(block_size, device=ids_BT.device)
    alive = (anchors_BM >= 0)[..., None]
    positions = (anchors_BM.clamp(min=0)[..., None] + offsets).expand(-1, -1, block_size)
    inside = positions.clamp(max=ids_BT.shape[1] - 1)
    rows = torch.arange(len(ids_BT), device=ids_BT.device)[:, None, None]
    tokens = ids_BT[rows, inside]
    in_response = response_BT[rows, inside] & (positions < ids_BT.shape[1]) & alive
    # A label counts only if every row before it in the block lies in the response too.
    valid = in_response.long().cumprod(dim=-1).bool()
    ids = torch.where(offsets == 0, tokens, mask_token_id)
    return AnchoredBlocks(ids, positions, tokens[..., 1:], valid[..., 1:])


def decay_weights(block_size: int, gamma: float | None = None, device: torch.device | None = None) -> Tensor:
    """w_k = exp(-(k - 1) / gamma) for k = 1 .. B - 1 (float32 [K]); gamma None takes the paper's constant."""
    gamma = gamma or GAMMA.get(block_size, block_size / 2)
    return torch.exp(-torch.arange(block_size - 1, device=device, dtype=torch.float32) / gamma)


@dataclass(frozen=True, slots=True)
class DraftingLoss:
    """Sums over this rank's rows; the denominators are the counts summed over all ranks."""

    cross_entropy_sum: Tensor
    """sum_k w_k * CE_k over valid rows."""
    weight_sum: Tensor
    """sum_k w_k over valid rows."""
    entropy_sum: Tensor
    """Sum of H_T over valid rows whose argmax is right."""
    right_count: Tensor
    valid_count: Tensor

    def totals(self) -> Tensor:
        """All sums, detached, as one float32 [5] vector to be reduced over ranks."""
        parts = (self.weight_sum, self.right_count, self.valid_count, self.cross_entropy_sum, self.entropy_sum)
        return torch.stack([part.detach().float() for part in parts])

    def loss(self, totals: Tensor, beta: float) -> Tensor:
        """This rank's share of L = sum w CE / sum w + beta * sum H / #right, with global denominators."""
        share = self.cross_entropy_sum / totals[0].clamp(min=1e-6)
        return share + beta * self.entropy_sum / totals[1].clamp(min=1.0) if beta else share

    def report(self, totals: Tensor, beta: float) -> dict[str, float]:
        """The global loss and its parts as plain numbers."""
        weight, right, valid, cross_entropy, entropy = totals.tolist()
        cross_entropy /= max(weight, 1e-6)
        entropy /= max(right, 1.0)
        return {
            "loss": cross_entropy + beta * entropy,
            "cross_entropy": cross_entropy,
            "entropy": entropy,
            "accuracy": right / max(valid, 1.0),
        }


def drafting_loss(
    logits_NKV: Tensor, labels_NK: Tensor, valid_NK: Tensor, weights_K: Tensor, temperature: float
) -> DraftingLoss:
    """Position-decayed cross-entropy, and the certainty term on rows that are already right.

    Args:
        logits_NKV: predictions of the masked rows, any float dtype (computed in float32).
        labels_NK: int64 labels, indices into V.
        valid_NK: bool; rows that count.
        weights_K: `decay_weights`.
        temperature: T of the certainty term's entropy (dParallel: 0.5).
    """
    logits = logits_NKV.float()
    cross_entropy = F.cross_entropy(logits.flatten(0, -2), labels_NK.flatten(), reduction="none").view_as(labels_NK)
    weights = weights_K * valid_NK
    entropy, right_count = certainty_entropy(logits, labels_NK, valid_NK, temperature)
    return DraftingLoss(
        cross_entropy_sum=(weights * cross_entropy).sum(),
        weight_sum=weights.sum(),
        entropy_sum=entropy * right_count,
        right_count=right_count,
        valid_count=valid_NK.sum(),
    )
