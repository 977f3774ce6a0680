"""Figures of merit of a speculative draft."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np


def acceptance_length(accepted: Sequence[int]) -> float:
    """tau: tokens a target verification yields, bonus included: 1 + accepted / verifications (as vLLM counts it)."""
    return 1 + fmean(accepted) if accepted else 1.0


def acceptance_by_position(accepted: Sequence[int], num_positions: int) -> list[float]:
    """Share of verifications in which drafted position k = 1 .. K was accepted."""
    return [sum(a >= k for a in accepted) / max(len(accepted), 1) for k in range(1, num_positions + 1)]


def bootstrap_interval(accepted_by_prompt: Sequence[Sequence[int]], draws: int = 1000, seed: int = 0) -> list[float]:
    """95 % interval of the pooled acceptance length, resampling prompts."""
    prompts = [a for a in accepted_by_prompt if a]
    if not prompts:
        return [1.0, 1.0]
    accepted = np.array([sum(prompt) for prompt in prompts])
    verifications = np.array([len(prompt) for prompt in prompts])
    chosen = np.random.default_rng(seed).integers(len(prompts), size=(draws, len(prompts)))
    values = np.sort(1 + accepted[chosen].sum(1) / verifications[chosen].sum(1))
    return [float(values[int(0.025 * draws)]), float(values[int(0.975 * draws) - 1])]
