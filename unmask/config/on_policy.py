"""Distillation on what a served pairing did."""

from __future__ import annotations

from dataclasses import dataclass

from unmask.config.checks import require


@dataclass(frozen=True, slots=True, kw_only=True)
class OnPolicyConfig:
    """Rounds of capture and distillation, after a first draft was distilled and published.

    A round's requests are the next prompts of `prompts`, sampled as `generate` says.
    """

    rounds: int = 1
    requests: int = 256
    """Of a round."""
    clients: int = 8
    """Requests under way at the same time."""

    def __post_init__(self) -> None:
        for name in ("rounds", "requests", "clients"):
            require(getattr(self, name) >= 1, f"on_policy.{name}", "must be at least 1")
