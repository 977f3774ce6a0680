"""Confidence-aware parallel decoding (Fast-dLLM, arXiv 2505.22618, section 3.3): commit whatever is sure enough."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unmask.decoding.decoder import require
from unmask.decoding.logits import Logits
from unmask.decoding.selection import best_of
from unmask.decoding.semi_autoregressive import BlockConfig, SemiAutoregressive
from unmask.denoiser import Denoiser


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdConfig(BlockConfig):
    """A fixed threshold, or a factor that lets the threshold fall as fewer tokens are committed together."""

    threshold: float = 0.9
    """Commit every column whose token has a higher probability."""
    factor: float | None = None
    """Instead of the threshold: commit the n surest columns for the largest n with (n + 1) (1 - c_n) < factor,
    c_n being the confidence of the n-th surest."""

    def __post_init__(self) -> None:
        BlockConfig.__post_init__(self)
        require(0 < self.threshold <= 1, "threshold", "must be in (0, 1]")
        require(self.factor is None or self.factor > 0, "factor", "must be positive")


class Threshold(SemiAutoregressive):
    """Commit the columns that are sure enough, and always the surest."""

    def __init__(self, denoiser: Denoiser, config: ThresholdConfig) -> None:
        super().__init__(denoiser, config)
        self.threshold, self.factor = config.threshold, config.factor

    def select(self, logits: Logits, tokens_BK: torch.Tensor, is_open_BK: torch.Tensor) -> torch.Tensor:
        """See SemiAutoregressive."""
        confidence = logits.probability(tokens_BK)
        if self.factor is None:
            sure = confidence > self.threshold
        else:
            sure = _within_factor(confidence, is_open_BK, self.factor)
        return sure | best_of(confidence, is_open_BK)


def _within_factor(confidence_BK: torch.Tensor, is_open_BK: torch.Tensor, factor: float) -> torch.Tensor:
    ordered, order = confidence_BK.masked_fill(~is_open_BK, -torch.inf).sort(dim=-1, descending=True)
    rank = torch.arange(1, ordered.shape[1] + 1, device=ordered.device)
    allowed = (rank + 1) * (1 - ordered) < factor  # true for a prefix: both factors grow with the rank
    return torch.zeros_like(is_open_BK).scatter(-1, order, allowed)
