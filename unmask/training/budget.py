"""How much of a training run is used up, in steps and in seconds of optimiser time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Budget:
    """A run ends at the first limit reached; None is no limit. `seconds_used` survives a resume."""

    max_steps: int | None
    max_seconds: float | None
    seconds_used: float = 0.0

    def progress(self, steps_done: int) -> float:
        """Share of the budget used, in [0, 1]; the run is over at 1."""
        by_steps = steps_done / self.max_steps if self.max_steps else 0.0
        by_seconds = self.seconds_used / self.max_seconds if self.max_seconds else 0.0
        return min(max(by_steps, by_seconds), 1.0)
