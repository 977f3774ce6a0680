"""The model that is served and learned from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from unmask.config.checks import require

EMBEDDED_TARGET = "embedded:smollm2-135m-instruct"
TOY_TARGET = "embedded:toy"
"""Random weights over single characters, for trying the diffusion line on any CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetConfig:
    """The AR model whose output distribution is served, and whose text is learned from."""

    model: str = EMBEDDED_TARGET
    """`embedded:smollm2-135m-instruct`, `embedded:toy`, a local HF directory, or a hub id."""
    revision: str | None = None
    """Commit hash of a hub id; a branch name is resolved to its hash when the run starts."""
    max_model_len: int = 512
    """Longest prompt + response, in tokens."""
    engine: dict[str, Any] = field(default_factory=dict)
    """More options of the engine: vLLM's under its own names, or those of `unmask.decoding.engine.EngineConfig`."""

    def __post_init__(self) -> None:
        require(self.max_model_len >= 16, "target.max_model_len", "must be at least 16 tokens")
