"""The messages of a chat and its tools, as clients write them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Json,
    JsonValue,
    ValidationInfo,
    WrapValidator,
    field_validator,
)

MAX_TOOLS = 128
MAX_TOOL_CALLS = 128


def _as_text(content: Any) -> Any:
    """Message content as one text, from a text or a list of text parts."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError("only text parts ({'type': 'text', 'text': ...}) are supported")
    return "".join(part["text"] for part in content)


def _as_choice(value: Any, validate: Any) -> Any:
    """One error for the whole field, where pydantic would have one for each form."""
    try:
        return validate(value)
    except ValueError:
        raise ValueError(
            "must be 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ...}}"
        ) from None


class Body(BaseModel):
    """A part of a request. Unknown fields are ignored, values are taken as they are, errors do not quote them."""

    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)


class CalledFunction(Body):
    """A function with the arguments that it was called with."""

    name: str = Field(min_length=1, max_length=64)
    arguments: Annotated[Json[dict[str, JsonValue]], BeforeValidator(lambda text: text or "{}")]


class ToolCall(Body):
    """A call that the assistant made earlier in the chat."""

    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One message of a chat; only one that calls tools may do without content."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOL_CALLS, fail_fast=True)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    """The call that a message of a tool answers."""
    content: Annotated[str | None, BeforeValidator(_as_text)] = Field(default=None, validate_default=True)

    @field_validator("content")
    @classmethod
    def _has_content(cls, content: str | None, info: ValidationInfo) -> str | None:
        if content is None and not (info.data.get("role") == "assistant" and info.data.get("tool_calls")):
            raise ValueError("is missing")
        return content

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates read it. They know no 'developer': it is the newer name of 'system'."""
        role = "system" if self.role == "developer" else self.role
        entry: dict[str, Any] = {"role": role, "content": self.content or ""}
        if self.tool_calls:
            entry["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            entry["tool_call_id"] = self.tool_call_id
        return entry


class Function(Body):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool that the model may use: a function is the only kind."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """A function by its name."""

    name: str = Field(min_length=1, max_length=64)


class NamedTool(Body):
    """The one tool that the model has to use."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedTool, WrapValidator(_as_choice)]
