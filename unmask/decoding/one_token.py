"""Low-confidence remasking (LLaDA, arXiv 2502.09992, section 2.4), with a fixed number of tokens a forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unmask.decoding.decoder import require
from unmask.decoding.logits import Logits
from unmask.decoding.semi_autoregressive import BlockConfig, SemiAutoregressive
from unmask.denoiser import Denoiser


@dataclass(frozen=True, slots=True, kw_only=True)
class OneTokenConfig(BlockConfig):
    """One token a forward is the quality ceiling, and how trajectories are made; more is few-step decoding."""

    tokens_per_forward: int = 1

    def __post_init__(self) -> None:
        BlockConfig.__post_init__(self)
        require(
            1 <= self.tokens_per_forward <= self.block_size, "tokens_per_forward", "must be between 1 and block_size"
        )


class OneToken(SemiAutoregressive):
    """Commit the open columns of highest confidence."""

    def __init__(self, denoiser: Denoiser, config: OneTokenConfig) -> None:
        super().__init__(denoiser, config)
        self.tokens_per_forward = config.tokens_per_forward

    def select(self, logits: Logits, tokens_BK: torch.Tensor, is_open_BK: torch.Tensor) -> torch.Tensor:
        """The n most confident columns, n = tokens_per_forward."""
        confidence = logits.probability(tokens_BK).masked_fill(~is_open_BK, -torch.inf)
        best = confidence.topk(self.tokens_per_forward, dim=-1).indices
        return torch.zeros_like(is_open_BK).scatter(-1, best, True)
