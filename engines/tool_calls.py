"""Tool calls in vLLM's words: what the tools of a request ask of the sampler, and the calls in what it answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import Parser, ParserManager
from vllm.renderers.chat_utils import make_tool_call_id
from vllm.tokenizers import TokenizerLike
from vllm.tool_parsers import ToolParserManager

from unmask.errors import ConfigError, PromptError
from unmask.types import SamplingOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class CallDelta:
    """What one tool call has grown by; `id` and `name` come once."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    """JSON text, or the next part of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedText:
    """Generated text, told apart into what is said and what is called."""

    content: str | None
    calls: tuple[CallDelta, ...] = ()


class ToolParsers:
    """vLLM's tool parser of one name, over the tokenizer of the target.

    Args:
        name: as in vLLM's `--tool-call-parser`.
        tokenizer: of the target.

    Raises:
        ConfigError: vLLM has no such parser, or it needs tokens that the tokenizer lacks.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerFast) -> None:
        if name not in ToolParserManager.list_registered():
            known = ", ".join(ToolParserManager.list_registered())
            raise ConfigError(f"vLLM has no tool parser '{name}'; it has {known}", field="serve.tool_parser")
        # vLLM types the chat template of a tokenizer more narrowly than transformers does.
        self._tokenizer = cast("TokenizerLike", tokenizer)
        try:
            parser = ParserManager.get_parser(tool_parser_name=name, enable_auto_tools=True)
            self._parser = cast("type[Parser]", parser)
            self._parser(self._tokenizer)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"'{name}' does not fit the target: {error}", field="serve.tool_parser") from error

    def request(self, body: dict[str, Any]) -> ToolRequest:
        """What the tools of one request ask for. The arguments of a forced call follow their schema, unless the tool
        says `strict: false`; those of a call that the model chooses do with `strict: true`.

        Args:
            body: `tools`, `tool_choice`, `parallel_tool_calls` and `response_format` of a chat.

        Raises:
            PromptError: vLLM refuses them.
        """
        if body.get("tool_choice", "auto") != "auto":
            body = body | {"tools": [_strict(tool) for tool in body["tools"]]}
        try:
            asked = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": ""}], **body})
            adjusted = self.parser(asked).adjust_request(asked)
        except (ValidationError, ValueError, RuntimeError) as error:
            raise PromptError(f"the tools cannot be used: {error}", field="tools") from error
        return ToolRequest(self, cast("ChatCompletionRequest", adjusted))

    def parser(self, request: ChatCompletionRequest) -> Parser:
        """vLLM's parser for one response."""
        return self._parser(self._tokenizer, cast("Any", request.tools))


class ToolRequest:
    """The tools of one request."""

    def __init__(self, parsers: ToolParsers, request: ChatCompletionRequest) -> None:
        self._parsers = parsers
        self._request = request

    @property
    def keeps_special_tokens(self) -> bool:
        """Whether calls are marked by tokens that a decoder would leave out."""
        return not self._request.skip_special_tokens

    def constrain(self, options: SamplingOptions) -> SamplingOptions:
        """The options with the grammar of a forced call; as they are where the model chooses freely."""
        wanted = self._request.structured_outputs
        if wanted is None:
            return options
        schema = wanted.json if wanted.json is None or isinstance(wanted.json, str) else json.dumps(wanted.json)
        return replace(options, json_schema=schema, structural_tag=wanted.structural_tag)

    def whole(self, text: str, token_ids: Sequence[int]) -> ParsedText:
        """Parse a finished response."""
        parser = self._parsers.parser(self._request)
        _, content, calls = parser.parse(text, self._request, enable_auto_tools=True, model_output_token_ids=token_ids)
        found = (
            CallDelta(index=index, id=call.id or make_tool_call_id(), name=call.name, arguments=call.arguments)
            for index, call in enumerate(calls or ())
        )
        return ParsedText(content=content or None, calls=tuple(found))

    def stream(self) -> ToolStream:
        """A parser for one response that is streamed."""
        return ToolStream(self._parsers.parser(self._request), self._request)


class ToolStream:
    """Parses a response while it grows."""

    def __init__(self, parser: Parser, request: ChatCompletionRequest) -> None:
        self._parser = parser
        self._request = request

    def push(self, text: str, token_ids: list[int], *, finished: bool) -> ParsedText:
        """What has become certain with the next text; empty while it may be part of a call's frame."""
        delta = self._parser.parse_delta(text, token_ids, self._request, prompt_token_ids=[], finished=finished)
        if delta is None:
            return ParsedText(content=None)
        calls = []
        for call in delta.tool_calls or ():
            function = call.function
            name, arguments = (function.name, function.arguments) if function else (None, None)
            calls.append(CallDelta(index=call.index, id=call.id, name=name, arguments=arguments or ""))
        return ParsedText(content=delta.content or None, calls=tuple(calls))


def _strict(tool: dict[str, Any]) -> dict[str, Any]:
    return tool | {"function": {"strict": True} | tool["function"]}
