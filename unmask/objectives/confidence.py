"""The confidence head: how likely each drafted token is to be accepted, given that all before it are.

Its inputs are the draft's final states without their graph, so that it never changes the draft. Serving multiplies its
outputs along a block to see how many tokens are worth verifying. Dimension letters: N blocks, K rows, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.objectives.row_losses import Rows


class ConfidenceHead(nn.Module):
    """A logit a row: a linear reading of its state, and an offset for its position.

    It learns how often rows match the text of trajectories. A verification accepts them as often if its request is
    sampled as that text was, so that the chances hold for requests of its temperature alone.

    Args:
        temperature: of the text that it is trained on; None where that is not known.
    """

    def __init__(self, hidden_size: int, num_rows: int, temperature: float | None = None) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_rows))

    def forward(self, hidden_NKH: Tensor) -> Tensor:
        """Logits [N, K] (float32) that row k is accepted if rows before it are; K may be smaller than in training."""
        # Autocast would take the product in half precision, whose steps are coarser than the chances that are compared.
        with torch.autocast(hidden_NKH.device.type, enabled=False):
            states = F.normalize(hidden_NKH.detach().float(), dim=-1) * hidden_NKH.shape[-1] ** 0.5
            return states @ self.weight + self.bias[: hidden_NKH.shape[-2]]

    def chances(self, hidden_NKH: Tensor) -> Tensor:
        """Chance [N, K] that each row of a block is accepted: that all before it are, and it is. It never rises."""
        return self(hidden_NKH).sigmoid().cumprod(-1)


def confidence_loss(logits_NK: Tensor, rows: Rows, valid_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropies summed over the rows that a verification reaches, and how many those are.

    It reaches a row if none before it is wrong.

    A proper scoring rule: its minimiser is the acceptance probability itself.
    """
    reached = valid_NK & F.pad((rows.right & valid_NK)[..., :-1], (1, 0), value=True).long().cumprod(-1).bool()
    losses = F.binary_cross_entropy_with_logits(logits_NK, rows.right.float(), reduction="none")
    return (losses * reached).sum(), reached.sum().float()


def judged_rows(chances: Sequence[float], accepted: int, emitted: int) -> list[tuple[float, bool]]:
    """The rows of one verification that it judged: the chance that a head gave each, and whether it was accepted.

    Args:
        chances: of the K rows, each given that those before it are accepted.
        accepted: rows that were; the next one was judged too, and was wrong.
        emitted: tokens that the response took; beyond its end nothing is judged.
    """
    return [(chance, k < accepted) for k, chance in enumerate(chances[: min(accepted + 1, emitted)])]


def error_of(judged: Sequence[tuple[float, bool]]) -> float | None:
    """`calibration_error` of judged rows; None without any."""
    if not judged:
        return None
    chances, right = torch.tensor(judged).unbind(1)
    return calibration_error(chances, right)


def calibration_error(probability: Tensor, accepted: Tensor, num_bins: int = 10) -> float:
    """Expected calibration error: |mean probability - share accepted| averaged over equal-width bins by their size."""
    bins = (probability * num_bins).long().clamp(max=num_bins - 1)
    counts = torch.bincount(bins, minlength=num_bins)
    gaps = torch.bincount(bins, weights=(probability - accepted.float()).double(), minlength=num_bins).abs()
    return float(gaps.sum() / counts.sum())
