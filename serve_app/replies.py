"""What the service answers: the objects of the OpenAI API.

They are written with `exclude_unset`: a field that the API wants as null is set to None by its maker.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length", "tool_calls"]


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")

    def to_json(self) -> str:
        """The object as the client gets it."""
        return self.model_dump_json(exclude_unset=True)


class Usage(_Reply):
    """Tokens of a request; the tokens of a prompt count once, whatever `n` is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Metrics(_Reply):
    """How a request went, on demand (`return_metrics`)."""

    queue_time_ms: float
    time_to_first_token_ms: float
    total_time_ms: float
    tokens_per_second: float
    mean_acceptance_length: float | None
    """Tokens emitted per target forward, bonus included; null where the backend does not count forwards."""
    tokens_per_forward: float | None
    """Tokens emitted per forward of whatever model answered; null like the one before."""
    num_forwards: int | None
    """Forwards spent on the request."""


class TopLogprob(_Reply):
    """A token that the model might have chosen."""

    token: str
    logprob: float
    bytes: list[int] | None
    """UTF-8 of the token; null for a part of a character."""


class TokenLogprob(TopLogprob):
    """A chosen token with its best alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Reply):
    """Log-probabilities of a chat answer."""

    content: list[TokenLogprob]


class CalledFunction(_Reply):
    """The function of a call."""

    name: str | None = None
    arguments: str


class CalledTool(_Reply):
    """A call, or what a chunk adds to it: `id`, `type` and the name come once."""

    index: int | None = None
    """Position among the calls of the message; in streams alone."""
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class ChatMessage(_Reply):
    """A message."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[CalledTool] | None = None


class ChatDelta(_Reply):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[CalledTool] | None = None


class ChatChoice(_Reply):
    """One answer of a chat, or one chunk of it."""

    index: int
    message: ChatMessage | None = None
    delta: ChatDelta | None = None
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletion(_Reply):
    """`chat.completion`, or a chunk of it."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None
    metrics: Metrics | None = None


class TextLogprobs(_Reply):
    """Log-probabilities of a text completion, in the API's older form."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(_Reply):
    """One text completion, or one chunk of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextCompletion(_Reply):
    """`text_completion`, whole or a chunk."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None
    metrics: Metrics | None = None


class ModelCard(_Reply):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(_Reply):
    """The served models."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokens(_Reply):
    """Answer of `/tokenize`."""

    tokens: list[int]
    count: int
    max_model_len: int


class Text(_Reply):
    """Answer of `/detokenize`."""

    prompt: str
