"""What a target engine has done so far, for the metrics page."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class TargetStats:
    """Counters since the engine started, and gauges of its last step."""

    num_steps: int = 0
    """Of the engine, whatever was in them."""
    num_drafts: int = 0
    """Target forwards of one request that verified a draft block."""
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    """How often the draft at each position of a block was accepted."""
    num_generated_tokens: int = 0
    num_prompt_tokens: int = 0
    num_preemptions: int = 0
    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    """Share of the target's KV cache in use."""

    @property
    def acceptance_length(self) -> float | None:
        """Tokens emitted per target forward that verified a block, the bonus included."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else None
