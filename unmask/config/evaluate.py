"""How a checkpoint is measured."""

from __future__ import annotations

from dataclasses import dataclass, field

from unmask.config.checks import require
from unmask.config.prompts import PromptsConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """The real speculative loop on held-out prompts."""

    prompts: int = 16
    """Held-out prompts of trained kinds."""
    prompts_new_templates: int = 10
    """Held-out prompts of kinds never trained on."""
    new_items: PromptsConfig = field(default_factory=lambda: PromptsConfig(split="new_items"))
    new_templates: PromptsConfig = field(default_factory=lambda: PromptsConfig(split="new_templates"))
    max_new_tokens: int = 64
    num_speculative_tokens: int | None = None
    """K; None is block size - 1."""
    num_workers: int = 1
    """Prompts are shared out over this many processes."""
    cpus_per_worker: float = 1.0
    use_gpu: bool = False

    def __post_init__(self) -> None:
        for name in ("prompts", "max_new_tokens", "num_workers"):
            require(getattr(self, name) >= 1, f"evaluate.{name}", "must be at least 1")
        require(self.prompts_new_templates >= 0, "evaluate.prompts_new_templates", "must not be negative")
        require(
            self.num_speculative_tokens is None or self.num_speculative_tokens >= 1,
            "evaluate.num_speculative_tokens",
            "must be at least 1",
        )
