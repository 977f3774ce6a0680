"""Entropy-threshold decoding (dParallel, arXiv 2509.26488, section 4.3): commit whatever the model is certain of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unmask.decoding.decoder import require
from unmask.decoding.logits import Logits
from unmask.decoding.selection import best_of
from unmask.decoding.semi_autoregressive import BlockConfig, SemiAutoregressive
from unmask.denoiser import Denoiser


@dataclass(frozen=True, slots=True, kw_only=True)
class DParallelConfig(BlockConfig):
    """The papers' thresholds lie between 0.45 and 0.5 nats."""

    threshold: float = 0.5
    """tau, in nats."""

    def __post_init__(self) -> None:
        BlockConfig.__post_init__(self)
        require(self.threshold >= 0, "threshold", "must be 0 nats or more")


class DParallel(SemiAutoregressive):
    """Commit the columns with H <= tau, and always the one of least entropy (of raw logits, at any temperature)."""

    def __init__(self, denoiser: Denoiser, config: DParallelConfig) -> None:
        super().__init__(denoiser, config)
        self.threshold = config.threshold

    def select(self, logits: Logits, tokens_BK: torch.Tensor, is_open_BK: torch.Tensor) -> torch.Tensor:
        """See SemiAutoregressive."""
        return (logits.entropy_BK <= self.threshold) | best_of(-logits.entropy_BK, is_open_BK)
