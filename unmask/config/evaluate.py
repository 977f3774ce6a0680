"""How a checkpoint is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from unmask.config.checks import require, require_labels
from unmask.config.prompts import PromptsConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """Held-out prompts: the real speculative loop for a pairing, decoders and verdicts for a diffusion LM."""

    prompts: int = 16
    """Held-out prompts of trained kinds."""
    prompts_new_templates: int = 10
    """Held-out prompts of kinds never trained on."""
    new_items: PromptsConfig = field(default_factory=lambda: PromptsConfig(split="new_items"))
    new_templates: PromptsConfig = field(default_factory=lambda: PromptsConfig(split="new_templates"))
    max_new_tokens: int = 64
    num_speculative_tokens: int | None = None
    """K; None is block size - 1."""
    decoders: tuple[dict[str, Any], ...] = ()
    """Decoders of a diffusion student, beside its teacher's; none takes the one that its objective is made for."""
    num_workers: int = 1
    """Prompts are shared out over this many processes."""
    cpus_per_worker: float = 1.0
    use_gpu: bool = False
    labels: dict[str, str] = field(default_factory=dict)
    """Workers run on nodes with these labels only."""

    def __post_init__(self) -> None:
        for name in ("prompts", "max_new_tokens", "num_workers"):
            require(getattr(self, name) >= 1, f"evaluate.{name}", "must be at least 1")
        require_labels(self.labels, "evaluate.labels")
        require(self.prompts_new_templates >= 0, "evaluate.prompts_new_templates", "must not be negative")
        require(
            self.num_speculative_tokens is None or self.num_speculative_tokens >= 1,
            "evaluate.num_speculative_tokens",
            "must be at least 1",
        )
