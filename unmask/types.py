"""The vocabulary: the few records that every part of the line hands to the next.

Dimension letters used in names throughout: B batch, T sequence, Q query rows, K drafted tokens,
D sampled target layers, H hidden size, V vocabulary, L draft layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRecord:
    """What identifies a target. A draft carries the record of the target it was trained for.

    Two records must agree in every field for a pairing to be served.
    """

    revision: str
    """Commit hash of a hub model, or `sha256:...` of a local directory's weights."""
    tokenizer_hash: str
    chat_template_hash: str
    vocab_size: int
    hidden_size: int
    num_layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt, tokenised: what the teacher sees.

    `source` is the row it came from, kept for quarantine and for `meta`.
    """

    index: int
    ids: tuple[int, ...]
    source: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One prompt with the teacher's response; a row of the trajectory files (see `unmask.trajectories`)."""

    sample_id: str
    prompt_ids: list[int]
    response_ids: list[int]
    finish_reason: FinishReason
    num_forwards: int
    teacher: str
    teacher_revision: str
    decode_config: str
    commit_step: list[int] | None = None
    verdict: bool | None = None
    error: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How one request is sampled, in the engine-neutral words of the OpenAI API."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    """Report this many top log-probabilities a token; None reports none."""
    json_schema: str | None = None
    """A JSON schema (as JSON text) that the response must follow, where the backend can enforce it."""
    structural_tag: str | None = None
    """A structural tag of xgrammar's (as JSON text) that the response must follow: the frame of tool calls."""
    gather_s: float = 0.0
    """For how long a replica may gather tokens, in seconds, before it passes them on."""
    decoder: dict[str, Any] | None = None
    """How a diffusion LM decodes this request; None leaves it to the service."""
    traceparent: str | None = None
    """W3C trace context of whoever asks; None where the request is not traced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDelta:
    """Tokens that a backend has committed since its last delta; sent tokens are never revised."""

    token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: list[dict[int, float]] | None = None
    """One mapping token id -> log-probability a token, the sampled id included."""
    num_forwards: int | None = None
    """On the last delta, the target forwards that emitted the response's tokens, where the backend counts them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRequest:
    """A request that ended by itself, as the engine saw it: what `unmask.capture` keeps."""

    prompt_ids: list[int]
    response_ids: list[int]
    finish_reason: FinishReason
    num_forwards: int
    accepted: list[int] = field(default_factory=list)
    """Accepted drafts of each verification, in order."""
    drafted: list[int] = field(default_factory=list)
    """Drafts that each verification was given."""
    cached_tokens: int = 0
    """Prompt tokens that the engine took from its prefix cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposalRow:
    """What the draft is told of one request in one step.

    `num_features` feature rows sit at positions `start .. start + num_features - 1`; the anchor
    `last_token` is at position `start + num_features`. `last_token` < 0 asks for no proposal
    (a prefill chunk that has not reached the end of the prompt).
    """

    request: int
    start: int
    num_features: int
    last_token: int
    page_hashes: tuple[int, ...] = ()
    """Of the last full pages before the anchor (`unmask.pairing.page_hashes`); empty without prefix caching."""
