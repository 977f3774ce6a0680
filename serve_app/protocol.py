"""The bodies of the OpenAI API, as far as this service speaks it.

Unknown fields are ignored, as other servers do. Known fields that would change the answer and are not served are
refused, so that no client believes in an option that had no effect.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, JsonValue, model_validator

from serve_app import errors
from serve_app.messages import MAX_TOOLS, Body, Message, NamedTool, Tool, ToolChoice

MAX_FIELDS = 64
MAX_CHOICES = 4
MAX_PROMPTS = 32
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
MAX_SCHEMA_CHARS = 65_536
MAX_DECODER_FIELDS = 16
MAX_TOKENIZED_CHARS = 524_288
MAX_DETOKENIZED = 131_072
_LONGEST_NAME = 32
_INT64 = 2**63

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "functions": (None, []),
    "function_call": (None, "none"),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "logit_bias": (None, {}),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "repetition_penalty": (None, 1),
    "best_of": (None, 1),
    "use_beam_search": (None, False),
    "echo": (None, False),
    "suffix": (None, ""),
    "prompt_logprobs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "structured_outputs": (None,),
}
"""Fields of OpenAI's and vLLM's APIs that are not served, with the values that ask for nothing."""


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: 2.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]

DIFFUSION_KEYS = frozenset({"decoder", "threshold", "block_size", "steps"})
"""How a diffusion LM decodes: the fields of `decoder` and their misspellings are refused beside it."""


def _refuse_unserved(cls: type[BaseModel], body: Any) -> Any:
    if not isinstance(body, dict):
        return body
    for name, neutral in _NEUTRAL.items():
        if name in body and name not in cls.model_fields and body[name] not in neutral:
            raise errors.invalid(f"'{name}' is not supported by this service; leave it out", name)
    if len(body) > MAX_FIELDS:
        raise errors.invalid(f"the body has more than {MAX_FIELDS} fields")
    for name in body.keys() - {"decoder"}:
        if len(name) <= _LONGEST_NAME and difflib.get_close_matches(name, DIFFUSION_KEYS, n=1, cutoff=0.85):
            raise errors.invalid("goes into 'decoder': {'name': ..., ...}, and for diffusion LMs alone", name)
    return body


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_prompts(value: Any) -> Any:
    """A list of prompts from OpenAI's four forms: a text, token ids, or a list of either."""
    if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int)):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text, a list of token ids, or a list of these")
    for prompt in value:
        ids = isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt)
        if not isinstance(prompt, str) and not ids:
            raise ValueError("must be a text, a list of token ids, or a list of these")
    return value


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool = False


class JsonSchema(Body):
    """A named JSON schema."""

    name: str = Field(default="response", max_length=64)
    schema_: dict[str, JsonValue] = Field(alias="schema")


class ResponseFormat(Body):
    """The form that the answer must take."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type 'json_schema' needs 'json_schema': {'schema': {...}}")
        return self


class GenerationRequest(Body):
    """What chat and text completions have in common."""

    model: str | None = Field(default=None, max_length=256)
    n: Annotated[Whole, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[Whole, Field(ge=1, lt=_INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, lt=_INT64)] | None = None
    seed: Annotated[Whole, Field(ge=-_INT64, lt=_INT64)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    stop: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
            Field(max_length=MAX_STOPS, fail_fast=True),
            BeforeValidator(_as_list),
        ]
        | None
    ) = None
    stop_token_ids: (
        Annotated[list[Annotated[Whole, Field(ge=0, lt=2**31)]], Field(max_length=MAX_STOPS, fail_fast=True)] | None
    ) = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    return_metrics: bool | None = None
    decoder: Annotated[dict[str, JsonValue], Field(max_length=MAX_DECODER_FIELDS)] | None = None

    _check_unserved = model_validator(mode="before")(classmethod(_refuse_unserved))

    @property
    def wants_usage_chunk(self) -> bool:
        """Whether a stream ends with a chunk that holds the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: Annotated[Whole, Field(ge=1, lt=_INT64)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _has_the_tools_it_chooses(self) -> ChatRequest:
        choice, names = self.tool_choice, {tool.function.name for tool in self.tools or ()}
        if choice not in (None, "none") and not names:
            raise errors.invalid("needs 'tools'", "tool_choice")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise errors.invalid("names none of 'tools'", "tool_choice")
        return self

    @property
    def offers_tools(self) -> bool:
        """Whether the model may call tools."""
        return bool(self.tools) and self.tool_choice != "none"


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: Annotated[
        list[str | list[int]], Field(max_length=MAX_PROMPTS, fail_fast=True), BeforeValidator(_as_prompts)
    ]
    logprobs: Annotated[Whole, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class TokenizeRequest(Body):
    """`POST /tokenize`: a text, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = Field(default=None, max_length=MAX_TOKENIZED_CHARS)
    messages: Messages | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[Annotated[Whole, Field(ge=0)]] = Field(max_length=MAX_DETOKENIZED, fail_fast=True)
