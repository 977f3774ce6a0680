"""What every training run decides: its budget, its optimiser, its workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from unmask.config.checks import require, require_labels, require_workers


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """Budget, optimiser and placement of one training run; sections of a recipe add their objective to it."""

    section: ClassVar[str] = "training"
    """Name of the recipe's section, for error messages."""

    max_steps: int | None = None
    max_seconds: float | None = 300.0
    """Budget of optimiser time (loading not counted); the first limit reached ends the run."""
    sequences_per_step: int = 16
    """Of all workers together."""
    learning_rate: float = 3e-4
    schedule: Literal["constant_then_linear", "cosine"] = "cosine"
    warmup_fraction: float = 0.03
    decay_fraction: float = 0.4
    """Share of the budget over which the rate falls linearly to 0 (constant_then_linear)."""
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema: float = 0.0
    """Decay of the averaged weights that are published; 0 switches averaging off."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the forward pass; master weights and optimiser are float32."""
    compile: bool = False
    """Compile the network's layers with torch.compile."""
    num_workers: int = 1
    min_workers: int | None = None
    """Go on with as few workers when nodes are lost, and with more as they come back; None waits for all of them."""
    cpus_per_worker: float = 1.0
    use_gpu: bool = False
    labels: dict[str, str] = field(default_factory=dict)
    """Workers run on nodes with these labels only."""
    threads_per_worker: int | None = None
    checkpoint_every_s: float = 60.0
    log_every_steps: int = 50
    max_failures: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        self.check(
            self.max_steps is not None or self.max_seconds is not None,
            "max_steps",
            "give max_steps, max_seconds or both: the run has no end",
        )
        self.check(self.max_steps is None or self.max_steps > 0, "max_steps", "must be positive")
        self.check(self.max_seconds is None or self.max_seconds > 0, "max_seconds", "must be positive")
        for name in ("sequences_per_step", "num_workers", "log_every_steps"):
            self.check(getattr(self, name) >= 1, name, "must be at least 1")
        require_workers(self.section, "sequences_per_step", self.sequences_per_step, self.num_workers, self.min_workers)
        for name in ("weight_decay", "max_failures"):
            self.check(getattr(self, name) >= 0, name, "must not be negative")
        for name in ("learning_rate", "grad_clip", "checkpoint_every_s", "cpus_per_worker"):
            self.check(getattr(self, name) > 0, name, "must be positive")
        require_labels(self.labels, f"{self.section}.labels")
        for name in ("ema", "warmup_fraction"):
            self.check(0 <= getattr(self, name) < 1, name, "must be in [0, 1)")
        self.check(0 <= self.decay_fraction <= 1, "decay_fraction", "must be in [0, 1]")

    def check(self, condition: bool, name: str, message: str) -> None:
        """Refuse a value of this section. Raises ConfigError."""
        require(condition, f"{self.section}.{name}", message)
