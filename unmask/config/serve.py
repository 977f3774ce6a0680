"""How a pairing is served."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from unmask.config.checks import require, require_labels

_LIMIT_GPU_MS, _LIMIT_CPU_MS = 100.0, 2000.0


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
    adaptive_k: bool = True
    """Draft fewer tokens than K where load or acceptance make them not worth their time."""
    target_replicas: int = 1
    draft_replicas: int = 1
    target_cpus: float = 1.0
    target_gpus: float = 0.0
    draft_cpus: float = 1.0
    draft_gpus: float = 0.0
    target_labels: dict[str, str] = field(default_factory=dict)
    """Target replicas run on nodes with these labels only."""
    draft_labels: dict[str, str] = field(default_factory=dict)
    ingress_labels: dict[str, str] = field(default_factory=dict)
    """Of the ingress and the directory: name nodes that are not taken away."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_num_seqs: int = 32
    draft_timeout_ms: float | None = None
    """A draft that has not answered by then costs the step its proposals, never a token. None is 2000, and 100 where
    the target is on a GPU, which stands still meanwhile."""
    draft_retry_s: float = 1.0
    """How long the breaker stays open after a failure before the draft is tried again."""
    eight_bit_rows: bool = False
    """Let the target's features travel to the draft as float8: half the bytes of bfloat16, for slow networks between
    target and draft; the draft sees them a little less precisely. Needs a target on a GPU."""
    turns_from: int | None = None
    """From this many running requests on they take turns in two halves, so that one is drafted while the other is
    verified: for large batches, whose steps take the longer the larger they are. None is never. Needs a target on a GPU
    of its own, without tensor parallelism; requests with a grammar suspend it."""
    draft_memory_mb: int = 256
    """Bound of the draft's context cache."""
    max_target_replicas: int | None = None
    """Scale the target up to this many replicas under load; None keeps `target_replicas`."""
    max_draft_replicas: int | None = None
    """Scale the draft up to this many replicas as they get busy; None keeps `draft_replicas`."""
    target_tokens_per_second: float | None = None
    """What one target replica is to generate at most before another is added; None looks at requests alone."""
    scale_up_after_s: float = 10.0
    """An engine takes a minute to start: act on a short load."""
    scale_down_after_s: float = 300.0
    """How long the load must be low before a replica is given back."""
    tool_parser: str | None = None
    """How the target writes tool calls: the name of one of vLLM's tool parsers (hermes, llama3_json ...); None refuses
    `tools`."""
    diffusion: str | None = None
    """Directory of a diffusion LM, which is served under `name`; None serves the target."""
    diffusion_name: str | None = None
    """Serve the diffusion LM under this name, and the target beside it under `name`."""
    decoder: dict[str, Any] = field(default_factory=dict)
    """How the diffusion LM decodes where a request does not say, as in {name: dparallel, threshold: 0.45}; empty takes
    the decoder that its attention is for."""
    verifier: str | None = None
    """Directory of the causal LM with which `apd` checks; None refuses `apd`."""
    diffusion_replicas: int = 1
    diffusion_cpus: float = 1.0
    diffusion_gpus: float = 0.0
    diffusion_labels: dict[str, str] = field(default_factory=dict)
    diffusion_rows: int = 32
    """Responses that one replica decodes at the same time."""
    diffusion_length: int = 1024
    """Longest prompt + response of the diffusion LM, in tokens; its caches are allocated for this length."""
    max_queued: int = 64
    """Responses that may wait for a slot; one more is refused at once (429)."""
    stall_timeout_s: float = 60.0
    """A target replica whose engine has requests and makes no step for so long is replaced; no step takes as long."""
    request_timeout_s: float = 300.0
    """A request that is not finished by then ends (504)."""
    api_keys_file: str | None = None
    """File of accepted API keys, `name:sha256` a line; None asks for no key."""
    traces_endpoint: str | None = None
    """OTLP collector (http://HOST:4318) that gets a span of every request from ingress, replica and draft; None traces
    nothing."""
    capture: str | None = None
    """Directory in which target replicas keep finished requests (token ids alone) for `on_policy`; None keeps none."""
    capture_mb: int = 1024
    """Bound of each target replica's share of it; the oldest requests give way."""
    capture_flush_s: float = 30.0
    """The longest that a finished request waits in memory to be written with others."""

    def __post_init__(self) -> None:
        for name in ("target_replicas", "draft_replicas", "max_num_seqs", "draft_memory_mb", "capture_mb"):
            require(getattr(self, name) >= 1, f"serve.{name}", "must be at least 1")
        self._check_diffusion()
        require(self.max_queued >= 0, "serve.max_queued", "must not be negative")
        require(self.request_timeout_s > 0, "serve.request_timeout_s", "must be positive")
        require(
            self.max_target_replicas is None or self.max_target_replicas >= self.target_replicas,
            "serve.max_target_replicas",
            "must be at least serve.target_replicas",
        )
        require(
            self.max_draft_replicas is None or self.max_draft_replicas >= self.draft_replicas,
            "serve.max_draft_replicas",
            "must be at least serve.draft_replicas",
        )
        require(
            self.target_tokens_per_second is None or self.target_tokens_per_second > 0,
            "serve.target_tokens_per_second",
            "must be positive",
        )
        for name in ("scale_up_after_s", "scale_down_after_s"):
            require(getattr(self, name) >= 0, f"serve.{name}", "must not be negative")
        for name in ("target_labels", "draft_labels", "ingress_labels"):
            require_labels(getattr(self, name), f"serve.{name}")
        for name in ("target_cpus", "draft_cpus", "target_gpus", "draft_gpus"):
            require(getattr(self, name) >= 0, f"serve.{name}", "must not be negative")
        require(self.draft_limit_ms > 0, "serve.draft_timeout_ms", "must be positive")
        require(
            not self.eight_bit_rows or self.target_gpus > 0,
            "serve.eight_bit_rows",
            "needs a target on a GPU; set serve.target_gpus, or leave it out",
        )
        require(
            self.turns_from is None or (self.turns_from >= 2 and self.target_gpus > 0),
            "serve.turns_from",
            "needs a target on a GPU (serve.target_gpus) and at least 2 requests; or leave it out",
        )
        for name in ("draft_retry_s", "capture_flush_s", "stall_timeout_s"):
            require(getattr(self, name) > 0, f"serve.{name}", "must be positive")
        require(
            self.traces_endpoint is None or self.traces_endpoint.startswith(("http://", "https://")),
            "serve.traces_endpoint",
            "must be the http:// or https:// address of an OTLP collector",
        )
        require(0 <= self.port <= 65535, "serve.port", "must be a port number (0 picks a free one)")
        require(
            self.num_speculative_tokens is None or self.num_speculative_tokens >= 1,
            "serve.num_speculative_tokens",
            "must be at least 1",
        )

    def _check_diffusion(self) -> None:
        for name in ("diffusion_replicas", "diffusion_rows"):
            require(getattr(self, name) >= 1, f"serve.{name}", "must be at least 1")
        for name in ("diffusion_cpus", "diffusion_gpus"):
            require(getattr(self, name) >= 0, f"serve.{name}", "must not be negative")
        require(self.diffusion_length >= 2, "serve.diffusion_length", "must leave room for a prompt and a response")
        require_labels(self.diffusion_labels, "serve.diffusion_labels")
        for name in ("diffusion_name", "verifier", "decoder"):
            require(
                self.diffusion is not None or not getattr(self, name),
                f"serve.{name}",
                "is of a diffusion LM; name its directory in serve.diffusion",
            )
        require(self.diffusion_name != self.name, "serve.diffusion_name", "must differ from serve.name")
        require(
            self.diffusion is None or self.draft is None or self.diffusion_name is not None,
            "serve.diffusion_name",
            "give the diffusion LM a name of its own, since the target is served too",
        )

    @property
    def draft_limit_ms(self) -> float:
        """How long a step waits for its draft: `draft_timeout_ms`, or what suits the target's device."""
        if self.draft_timeout_ms is not None:
            return self.draft_timeout_ms
        return _LIMIT_GPU_MS if self.target_gpus else _LIMIT_CPU_MS

    @property
    def serves_target(self) -> bool:
        """Whether the target is served: always, unless a diffusion LM takes its name."""
        return self.diffusion is None or self.diffusion_name is not None
