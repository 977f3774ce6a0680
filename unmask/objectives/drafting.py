"""The DFlash training objective (arXiv 2602.06036, section 4): anchored blocks, position weights, certainty gates.

Dimension letters: B batch, T sequence, M anchors a sequence, K = block size - 1 predicted rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.objectives.row_losses import Rows

Weighting = Literal["decay", "d_pace", "first_miss", "d_pace_first_miss"]
Gate = Literal["right", "prefix_right", "target_relative"]

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


def choose_anchors(
    response_BT: Tensor, num_anchors: int, generator: torch.Generator, first_BT: Tensor | None = None
) -> Tensor:
    """Draw M anchors a sequence, uniformly without replacement among valid response positions.

    A position is valid if it and the next one are response tokens. Sequences with fewer take them all and
    fill up with -1 (dead blocks), so that every rank always has work for its collectives.

    Args:
        response_BT: bool, True on response tokens.
        generator: draws the anchors (on the device of `response_BT`).
        first_BT: bool, columns that are drawn before all others.

    Returns:
        int64 [B, M], ascending where alive.
    """
    valid = response_BT & F.pad(response_BT[:, 1:], (0, 1), value=False)
    scores = torch.rand(valid.shape, generator=generator, device=valid.device)
    scores = (scores if first_BT is None else scores + first_BT).masked_fill(~valid, -1.0)
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


def position_weights(kind: Weighting, rows: Rows, valid_NK: Tensor, decay_K: Tensor, smoothing: float = 0.5) -> Tensor:
    """w_k of every row (float32 [N, K], no gradient, 0 where invalid).

    `decay` is the paper's fixed decay. `first_miss` trains up to the first wrong row and nothing behind it (Spec-AUF,
    arXiv 2607.01893). `d_pace` weighs a row by the accepted suffix that is expected to begin at it, sum_{m >= k}
    prod_{j <= m} c_j with the confidences c in the text's tokens smoothed towards 1 (D-PACE, arXiv 2605.18810).
    `d_pace_first_miss` is both: a row behind a wrong one weighs nothing, and one behind right ones, whose confidences
    are then 1, the suffix that it begins.

    Args:
        valid_NK: bool; in a block nothing valid follows an invalid row.
        smoothing: of the confidences, c = (1 - smoothing) q + smoothing.
    """
    if kind == "decay":
        return decay_K * valid_NK
    right_NK = rows.right.float()
    if kind == "first_miss":
        return _before(right_NK) * valid_NK
    smooth_NK = (1 - smoothing) * rows.confidence.detach() + smoothing
    return _before(smooth_NK if kind == "d_pace" else right_NK) * _suffixes(smooth_NK * valid_NK)


def _suffixes(chances_NK: Tensor) -> Tensor:
    """Expected number of accepted rows from each row on, if all before it are: s_k = c_k (1 + s_{k + 1})."""
    expected = [torch.zeros_like(chances_NK[..., 0])]
    for chance_N in reversed(chances_NK.unbind(-1)):
        expected.append(chance_N * (1 + expected[-1]))
    return torch.stack(expected[:0:-1], dim=-1)


def certainty_gates(kind: Gate, rows: Rows, valid_NK: Tensor) -> Tensor:
    """How much of the certainty term each row carries (float32 [N, K], no gradient).

    `right`: rows whose argmax is right (dParallel, arXiv 2509.26488). `prefix_right`: if all rows before are right
    too. `target_relative`: r_k * g_k with g_k = 1[argmax q_k = argmax p_k] and r_k = prod_{j < k} a_j, the probability
    that a verification reaches row k, a_j = `Rows.acceptance`; its term is the entropy above the target's own
    (`RowObjective.relative`), whose p this is.
    """
    if kind == "target_relative":
        return _before(rows.acceptance * valid_NK) * (rows.agrees & valid_NK)
    right = (rows.right & valid_NK).float()
    return right if kind == "right" else right.cumprod(-1)


def _before(values_NK: Tensor) -> Tensor:
    """Product of all earlier columns."""
    return F.pad(values_NK[..., :-1], (1, 0), value=1.0).cumprod(-1)


@dataclass(frozen=True, slots=True)
class DraftingLoss:
    """Sums over this rank's rows; the denominators are sums over all ranks."""

    row_sum: Tensor
    """sum_k w_k * l_k over valid rows."""
    weight_sum: Tensor
    """sum_k w_k over valid rows."""
    entropy_sum: Tensor
    """Certainty term, each row times its gate."""
    gate_sum: Tensor
    right_count: Tensor
    accepted_sum: Tensor
    """Right rows before the first wrong one, over all blocks."""
    valid_count: Tensor
    block_count: Tensor

    def totals(self) -> Tensor:
        """All sums, detached, as one float32 [8] vector to be reduced over ranks."""
        parts = (
            self.weight_sum, self.gate_sum, self.valid_count, self.row_sum, self.entropy_sum, self.right_count,
            self.accepted_sum, self.block_count,
        )  # fmt: skip
        return torch.stack([part.detach().float() for part in parts])

    def loss(self, totals: Tensor, beta: float | Tensor) -> Tensor:
        """This rank's share of L = sum w l / sum w + beta * sum g H / sum g, with global denominators."""
        share = self.row_sum / totals[0].clamp(min=1e-6)
        if isinstance(beta, float) and not beta:
            return share
        return share + beta * self.entropy_sum / totals[1].clamp(min=1e-6)


def report(totals: Tensor, beta: float | Tensor) -> dict[str, Tensor]:
    """The global loss and its parts as float32 scalars on the device of `totals`.

    `acceptance` is teacher-forced (1 + right rows before the first wrong one); it does not predict a served pairing's.
    """
    weight, gate, valid, row, entropy, right, accepted, blocks = totals.unbind()
    row, entropy = row / weight.clamp(min=1e-6), entropy / gate.clamp(min=1e-6)
    return {
        "loss": row + beta * entropy,
        "cross_entropy": row,
        "entropy": entropy,
        "accuracy": right / valid.clamp(min=1.0),
        "acceptance": 1 + accepted / blocks.clamp(min=1.0),
    }


def drafting_loss(rows: Rows, valid_NK: Tensor, weights_NK: Tensor, gates_NK: Tensor) -> DraftingLoss:
    """Sum the rows' terms under their weights and gates; everything is [N, K]."""
    return DraftingLoss(
        row_sum=(weights_NK * rows.loss).sum(),
        weight_sum=weights_NK.sum(),
        entropy_sum=(gates_NK * rows.entropy).sum(),
        gate_sum=gates_NK.sum(),
        right_count=(rows.right & valid_NK).sum(),
        accepted_sum=(rows.right & valid_NK).float().cumprod(-1).sum(),
        valid_count=valid_NK.sum(),
        block_count=valid_NK[..., 0].sum(),
    )
