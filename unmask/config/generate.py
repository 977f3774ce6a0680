"""How teacher trajectories are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unmask.config.checks import require


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """Teacher trajectories: how they are sampled and how the work is cut."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    seed: int = 0
    """Each row's own seed is derived from this one, so that a retried row is the same row."""
    samples_per_prompt: int = 1
    rows_per_shard: int = 64
    min_actors: int = 1
    max_actors: int = 1
    cpus_per_actor: float = 1.0
    gpus_per_actor: float = 0.0
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "bfloat16"
    max_attempts: int = 2
    """A shard whose engine dies this often is retried row by row, and the killing row quarantined."""
    progress_every_s: float = 5.0

    def __post_init__(self) -> None:
        require(self.max_new_tokens > 0, "generate.max_new_tokens", "must be positive")
        require(self.temperature >= 0, "generate.temperature", "must be 0 (greedy) or positive")
        require(0 < self.top_p <= 1, "generate.top_p", "must be in (0, 1]")
        require(self.top_k >= 0, "generate.top_k", "must be 0 (off) or positive")
        require(self.samples_per_prompt >= 1, "generate.samples_per_prompt", "must be at least 1")
        require(
            self.samples_per_prompt == 1 or self.temperature > 0,
            "generate.samples_per_prompt",
            "more than one sample per prompt needs generate.temperature > 0 (greedy samples are all equal)",
        )
        require(self.rows_per_shard >= 1, "generate.rows_per_shard", "must be at least 1")
        require(self.min_actors >= 1, "generate.min_actors", "must be at least 1")
        require(self.max_actors >= self.min_actors, "generate.max_actors", "must be at least generate.min_actors")
        require(self.cpus_per_actor > 0, "generate.cpus_per_actor", "must be positive")
        require(self.gpus_per_actor >= 0, "generate.gpus_per_actor", "must be 0 (CPU) or positive")
        require(self.max_attempts >= 1, "generate.max_attempts", "must be at least 1")
