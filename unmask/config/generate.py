"""How teacher trajectories are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from unmask.config.checks import require, require_labels
from unmask.errors import nearest

DECODERS = ("one_token", "threshold", "dparallel", "d2f")
"""Those of `unmask.decoding.registry` that need no verifier network."""
DEFAULT_BLOCK = 32
"""Of all of them."""


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
    labels: dict[str, str] = field(default_factory=dict)
    """Actors run on nodes with these labels only, and only such nodes are added for them."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "bfloat16"
    decoder: dict[str, Any] | None = None
    """How a diffusion LM decodes, such as `{name: one_token, block_size: 32}`; None for a causal LM, in vLLM."""
    verifier: Literal["number", "code"] | None = None
    """How responses are judged against the row's `reference`; only right ones are trained on. None judges nothing."""
    reference: str = "answer"
    """The column to compare with: a number or a text that ends with one, or Python tests."""
    max_attempts: int = 2
    """A shard that is in flight this often when an engine dies gets the engine alone, in ever smaller groups of its
    rows, and a row with which the engine dies this often by itself is quarantined."""
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
        require_labels(self.labels, "generate.labels")
        if self.decoder is not None:
            self._check_decoder(self.decoder)
        require(self.max_attempts >= 1, "generate.max_attempts", "must be at least 1")

    def _check_decoder(self, decoder: dict[str, Any]) -> None:
        name, block_size = decoder.get("name"), decoder.get("block_size", DEFAULT_BLOCK)
        require(
            name in DECODERS,
            "generate.decoder.name",
            f"unknown decoder {name!r}{nearest(str(name), DECODERS)}; choose one of {', '.join(DECODERS)}",
        )
        require(
            isinstance(block_size, int) and block_size >= 1 and self.max_new_tokens % block_size == 0,
            "generate.decoder.block_size",
            f"must divide generate.max_new_tokens = {self.max_new_tokens}, which {block_size!r} does not",
        )
        require(self.top_k == 0, "generate.top_k", "diffusion decoders have none; leave it out")
