"""Learning rates over a budget."""

from __future__ import annotations

import math
from typing import Literal, Protocol


class Schedule(Protocol):
    """The fields of a training section that shape its rates."""

    @property
    def schedule(self) -> Literal["constant_then_linear", "cosine"]: ...
    @property
    def warmup_fraction(self) -> float: ...
    @property
    def decay_fraction(self) -> float: ...


def rate_share(config: Schedule, progress: float) -> float:
    """The rate at a share of the budget, over the highest: linear warm-up, then constant and linear decay, or cosine
    to 0."""
    if progress < config.warmup_fraction:
        return progress / config.warmup_fraction
    if config.schedule == "cosine":
        after = (progress - config.warmup_fraction) / (1 - config.warmup_fraction)
        return 0.5 * (1 + math.cos(math.pi * min(after, 1.0)))
    left = max(1.0 - progress, 0.0)
    return min(1.0, left / config.decay_fraction if config.decay_fraction else 1.0)


class CertaintySchedule(Protocol):
    """The fields of a training section that set the weight of its certainty term."""

    @property
    def beta(self) -> float: ...  # the highest weight
    @property
    def certainty_start(self) -> float: ...
    @property
    def certainty_ramp(self) -> float: ...


def certainty_weight(config: CertaintySchedule, progress: float) -> float:
    """The certainty term's weight at a share of the budget: 0, then a linear rise, then beta."""
    if progress < config.certainty_start:
        return 0.0
    risen = (progress - config.certainty_start) / config.certainty_ramp if config.certainty_ramp else 1.0
    return config.beta * min(risen, 1.0)
