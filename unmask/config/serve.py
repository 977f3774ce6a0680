"""How a pairing is served."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unmask.config.checks import require


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """A pairing behind the OpenAI API: the target and the draft are deployments of their own."""

    name: str = "unmask"
    """The model name that requests use."""
    host: str = "127.0.0.1"
    port: int = 8000
    draft: str | None = None
    """Published draft directory; None serves the target alone."""
    num_speculative_tokens: int | None = None
    """K; None is the draft's block size - 1."""
    target_replicas: int = 1
    draft_replicas: int = 1
    target_cpus: float = 1.0
    target_gpus: float = 0.0
    draft_cpus: float = 1.0
    draft_gpus: float = 0.0
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_num_seqs: int = 32
    draft_timeout_ms: float = 2000.0
    """A draft that has not answered by then costs the step its proposals, never a token."""
    draft_retry_s: float = 1.0
    """How long the breaker stays open after a failure before the draft is tried again."""
    draft_memory_mb: int = 256
    """Bound of the draft's context cache."""
    max_target_replicas: int | None = None
    """Scale the target up to this many replicas under load; None keeps `target_replicas`."""
    max_queued: int = 64
    """Responses that may wait for a slot; one more is refused at once (429)."""
    request_timeout_s: float = 300.0
    """A request that is not finished by then ends (504)."""
    api_keys_file: str | None = None
    """File of accepted API keys, `name:sha256` a line; None asks for no key."""

    def __post_init__(self) -> None:
        for name in ("target_replicas", "draft_replicas", "max_num_seqs", "draft_memory_mb"):
            require(getattr(self, name) >= 1, f"serve.{name}", "must be at least 1")
        require(self.max_queued >= 0, "serve.max_queued", "must not be negative")
        require(self.request_timeout_s > 0, "serve.request_timeout_s", "must be positive")
        require(
            self.max_target_replicas is None or self.max_target_replicas >= self.target_replicas,
            "serve.max_target_replicas",
            "must be at least serve.target_replicas",
        )
        for name in ("target_cpus", "draft_cpus", "target_gpus", "draft_gpus"):
            require(getattr(self, name) >= 0, f"serve.{name}", "must not be negative")
        for name in ("draft_timeout_ms", "draft_retry_s"):
            require(getattr(self, name) > 0, f"serve.{name}", "must be positive")
        require(0 <= self.port <= 65535, "serve.port", "must be a port number (0 picks a free one)")
        require(
            self.num_speculative_tokens is None or self.num_speculative_tokens >= 1,
            "serve.num_speculative_tokens",
            "must be at least 1",
        )
