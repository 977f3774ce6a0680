"""What a run is made of: one frozen dataclass per concept, presets as functions.

Plain dataclasses, so that the library imports without a validation framework; `unmask.recipe` reads
YAML and dotted overrides into them and turns every mistake into a one-line `ConfigError`.
Combinations that cannot work are refused in `__post_init__`, before any model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from unmask.errors import ConfigError

EMBEDDED_TARGET = "embedded:smollm2-135m-instruct"


def _require(condition: bool, field_name: str, message: str) -> None:
    if not condition:
        raise ConfigError(message, field=field_name)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetConfig:
    """The AR model whose output distribution is served, and whose text is learned from."""

    model: str = EMBEDDED_TARGET
    """`embedded:smollm2-135m-instruct`, a local HF directory, or a hub id."""
    revision: str | None = None
    """Commit hash of a hub id; a branch name is resolved to its hash when the run starts."""
    max_model_len: int = 512
    """Longest prompt + response, in tokens."""
    engine: dict[str, Any] = field(default_factory=dict)
    """More vLLM engine options, under vLLM's own names."""

    def __post_init__(self) -> None:
        _require(self.max_model_len >= 16, "target.max_model_len", "must be at least 16 tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptsConfig:
    """Where prompts come from."""

    source: str = "demo"
    """`demo` (the project's own word problems), a .jsonl/.json/.parquet file (.gz too), or a hub data set id."""
    split: str = "train"
    """For `demo`: train, new_items or new_templates. For a hub data set: its split."""
    field: str = "prompt"
    """The column that holds the text, or a list of chat messages."""
    system: str | None = None
    """A system message put before plain-text prompts."""
    limit: int | None = None
    """Use only the first rows."""

    def __post_init__(self) -> None:
        _require(self.limit is None or self.limit > 0, "prompts.limit", "must be positive (leave it out for all rows)")


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
        _require(self.max_new_tokens > 0, "generate.max_new_tokens", "must be positive")
        _require(self.temperature >= 0, "generate.temperature", "must be 0 (greedy) or positive")
        _require(0 < self.top_p <= 1, "generate.top_p", "must be in (0, 1]")
        _require(self.top_k >= 0, "generate.top_k", "must be 0 (off) or positive")
        _require(self.samples_per_prompt >= 1, "generate.samples_per_prompt", "must be at least 1")
        _require(
            self.samples_per_prompt == 1 or self.temperature > 0,
            "generate.samples_per_prompt",
            "more than one sample per prompt needs generate.temperature > 0 (greedy samples are all equal)",
        )
        _require(self.rows_per_shard >= 1, "generate.rows_per_shard", "must be at least 1")
        _require(self.min_actors >= 1, "generate.min_actors", "must be at least 1")
        _require(self.max_actors >= self.min_actors, "generate.max_actors", "must be at least generate.min_actors")
        _require(self.cpus_per_actor > 0, "generate.cpus_per_actor", "must be positive")
        _require(self.gpus_per_actor >= 0, "generate.gpus_per_actor", "must be 0 (CPU) or positive")
        _require(self.max_attempts >= 1, "generate.max_attempts", "must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftConfig:
    """Shape of a DFlash draft (its width, heads and vocabulary are the target's)."""

    num_layers: int = 2
    block_size: int = 8
    """B: the anchor and B - 1 masks."""
    num_target_features: int = 5
    """D: sampled target layers, evenly spaced from block 1 to block N - 3."""
    mask_token_id: int | None = None
    """None picks the first unused special id of the tokenizer."""
    init: Literal["target", "random"] = "target"
    """`target` starts each block from a target block and `fc` from the last feature."""

    def __post_init__(self) -> None:
        _require(self.num_layers >= 1, "draft.num_layers", "must be at least 1")
        _require(self.block_size >= 2, "draft.block_size", "must be at least 2 (the anchor and one mask)")
        _require(self.num_target_features >= 1, "draft.num_target_features", "must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig:
    """Training of the draft. Defaults suit a few CPU minutes; `published()` is the paper's recipe."""

    max_steps: int | None = None
    max_seconds: float | None = 300.0
    """Budget of optimiser time (loading and features not counted); the first limit reached ends the run."""
    sequences_per_step: int = 2
    """Per worker."""
    anchors_per_sequence: int = 16
    decay_gamma: float | None = None
    """Position decay; None takes 7 / 5 / 4 for B = 16 / 10 / 8 and B / 2 otherwise."""
    beta: float = 0.0
    """Weight of the certainty-forcing term; 0 switches it off."""
    entropy_temperature: float = 0.5
    learning_rate: float = 1.5e-3
    schedule: Literal["constant_then_linear", "cosine"] = "constant_then_linear"
    warmup_fraction: float = 0.0
    decay_fraction: float = 0.4
    """Share of the budget over which the rate falls linearly to 0 (constant_then_linear)."""
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema: float = 0.99
    """Decay of the averaged weights that are published; 0 switches averaging off."""
    head_negatives: int | None = 1024
    """Train the head on the ids of the trajectories and this many random others; None uses the whole vocabulary."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    num_workers: int = 1
    cpus_per_worker: float = 1.0
    use_gpu: bool = False
    threads_per_worker: int | None = None
    feature_cache_gb: float = 4.0
    """Target features are kept in memory up to this size and recomputed beyond it."""
    checkpoint_every_s: float = 60.0
    log_every_steps: int = 50
    max_failures: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        _require(
            self.max_steps is not None or self.max_seconds is not None,
            "distill.max_steps",
            "give max_steps, max_seconds or both: the run has no end",
        )
        _require(self.max_steps is None or self.max_steps > 0, "distill.max_steps", "must be positive")
        _require(self.max_seconds is None or self.max_seconds > 0, "distill.max_seconds", "must be positive")
        for name in ("sequences_per_step", "anchors_per_sequence", "num_workers", "log_every_steps"):
            _require(getattr(self, name) >= 1, f"distill.{name}", "must be at least 1")
        for name in ("beta", "weight_decay", "feature_cache_gb", "max_failures"):
            _require(getattr(self, name) >= 0, f"distill.{name}", "must not be negative")
        for name in ("entropy_temperature", "learning_rate", "grad_clip", "checkpoint_every_s", "cpus_per_worker"):
            _require(getattr(self, name) > 0, f"distill.{name}", "must be positive")
        _require(0 <= self.ema < 1, "distill.ema", "must be in [0, 1)")
        _require(0 <= self.warmup_fraction < 1, "distill.warmup_fraction", "must be in [0, 1)")
        _require(0 <= self.decay_fraction <= 1, "distill.decay_fraction", "must be in [0, 1]")
        _require(self.decay_gamma is None or self.decay_gamma > 0, "distill.decay_gamma", "must be positive")
        _require(
            self.head_negatives is None or self.head_negatives >= 0, "distill.head_negatives", "must not be negative"
        )


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
            _require(getattr(self, name) >= 1, f"evaluate.{name}", "must be at least 1")
        _require(self.prompts_new_templates >= 0, "evaluate.prompts_new_templates", "must not be negative")
        _require(
            self.num_speculative_tokens is None or self.num_speculative_tokens >= 1,
            "evaluate.num_speculative_tokens",
            "must be at least 1",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishConfig:
    """An immutable, versioned directory that a service can load."""

    name: str = "dflash"
    directory: str | None = None
    """Where versions go; None is `<run_dir>/published`."""
    draft: str | None = None
    """The draft to publish; None is what `distill` made."""
    adopt: bool = False
    """Accept a draft that does not say which target it is for, and record this target in it."""
    license: str = "apache-2.0"

    def __post_init__(self) -> None:
        _require(
            bool(self.name) and self.name.replace("-", "").replace("_", "").isalnum(),
            "publish.name",
            "must be letters, digits, '-' and '_'",
        )


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
            _require(getattr(self, name) >= 1, f"serve.{name}", "must be at least 1")
        _require(self.max_queued >= 0, "serve.max_queued", "must not be negative")
        _require(self.request_timeout_s > 0, "serve.request_timeout_s", "must be positive")
        _require(
            self.max_target_replicas is None or self.max_target_replicas >= self.target_replicas,
            "serve.max_target_replicas",
            "must be at least serve.target_replicas",
        )
        for name in ("target_cpus", "draft_cpus", "target_gpus", "draft_gpus"):
            _require(getattr(self, name) >= 0, f"serve.{name}", "must not be negative")
        for name in ("draft_timeout_ms", "draft_retry_s"):
            _require(getattr(self, name) > 0, f"serve.{name}", "must be positive")
        _require(0 <= self.port <= 65535, "serve.port", "must be a port number (0 picks a free one)")
        _require(
            self.num_speculative_tokens is None or self.num_speculative_tokens >= 1,
            "serve.num_speculative_tokens",
            "must be at least 1",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One run from prompts to a served pairing."""

    run_dir: str = ".unmask/run"
    target: TargetConfig = field(default_factory=TargetConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)

    def __post_init__(self) -> None:
        largest = self.draft.block_size - 1
        for section, k in (
            ("evaluate", self.evaluate.num_speculative_tokens),
            ("serve", self.serve.num_speculative_tokens),
        ):
            _require(
                k is None or k <= largest,
                f"{section}.num_speculative_tokens",
                f"K = {k} exceeds block size - 1 = {largest}; lower it or raise draft.block_size",
            )
        _require(
            self.generate.max_new_tokens < self.target.max_model_len,
            "generate.max_new_tokens",
            f"must leave room for a prompt inside target.max_model_len = {self.target.max_model_len}",
        )


def published() -> DistillConfig:
    """The training recipe of the DFlash paper (arXiv 2602.06036): 512 anchors, AdamW 6e-4, cosine, whole head."""
    return DistillConfig(
        anchors_per_sequence=512,
        learning_rate=6e-4,
        schedule="cosine",
        warmup_fraction=0.04,
        ema=0.0,
        head_negatives=None,
        max_seconds=None,
        max_steps=100_000,
    )
