"""`/v1/chat/completions`: from a request to choices, and from pieces to the API's objects."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from serve_app import errors
from serve_app.detokenizer import BROKEN_CHARACTER
from serve_app.generation import ChoiceSpec, Piece
from serve_app.protocol import ChatRequest
from serve_app.replies import (
    CalledFunction,
    CalledTool,
    ChatChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    FinishReason,
    Metrics,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from serve_app.sampling import choice_specs, fit_context, sampling_options
from serve_app.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    # Imports vLLM, which only a service with a tool parser needs.
    from engines.tool_calls import CallDelta, ToolRequest, ToolStream


async def chat_specs(
    body: ChatRequest, tokenizer: ChatTokenizer, max_model_len: int, tools: ToolRequest | None
) -> list[ChoiceSpec]:
    """The choices that a chat asks for. Raises ApiError."""
    if body.top_logprobs is not None and not body.logprobs:
        raise errors.invalid("needs 'logprobs': true", "top_logprobs")
    offered = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] if tools else None
    prompt_ids = await tokenizer.encode_chat(body.messages, offered)
    newer = body.max_completion_tokens is not None
    max_tokens = fit_context(
        len(prompt_ids),
        body.max_completion_tokens if newer else body.max_tokens,
        default=None,
        max_model_len=max_model_len,
        prompt_param="messages",
        max_param="max_completion_tokens" if newer else "max_tokens",
    )
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    options = sampling_options(body, max_tokens=max_tokens, logprobs=logprobs)
    if tools is None:
        return choice_specs(body, [prompt_ids], [options])
    decode = tokenizer.decode_all if tools.keeps_special_tokens else None
    specs = choice_specs(body, [prompt_ids], [tools.constrain(options)])
    return [replace(spec, decode=decode) for spec in specs]


class ChatFormat:
    """The objects of one chat: `chat.completion`, or the chunks of its stream."""

    def __init__(
        self,
        body: ChatRequest,
        tools: ToolRequest | None,
        *,
        request_id: str,
        model: str,
        created: int,
        tokenizer: ChatTokenizer,
    ) -> None:
        self._tools = tools
        self._calls: dict[int, ToolStream] = {}
        self._called: set[int] = set()
        self._id = f"chatcmpl-{request_id}"
        self._model = model
        self._created = created
        self._tokenizer = tokenizer
        self._top = (body.top_logprobs or 0) if body.logprobs else None

    def opening(self, index: int) -> ChatCompletion:
        """The chunk that begins a choice: the role."""
        delta = ChatDelta(role="assistant", content="")
        return self._chunk([ChatChoice(index=index, delta=delta, logprobs=None, finish_reason=None)])

    def chunk(self, index: int, piece: Piece) -> ChatCompletion | None:
        """The chunk for what a choice has grown by; None while a tool parser holds it all back."""
        delta, reason = ChatDelta(), piece.finish_reason
        if self._tools is not None:
            delta, reason = self._parsed(self._tools, index, piece)
        elif piece.text:
            delta.content = piece.text
        logprobs = self._logprobs(piece)
        if not (delta.model_fields_set or reason or logprobs):
            return None
        return self._chunk([ChatChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=reason)])

    def _parsed(self, tools: ToolRequest, index: int, piece: Piece) -> tuple[ChatDelta, FinishReason | None]:
        stream = self._calls.setdefault(index, tools.stream())
        parsed = stream.push(piece.text, piece.token_ids, finished=piece.finish_reason is not None)
        delta = ChatDelta()
        if parsed.content:
            delta.content = parsed.content
        if parsed.calls:
            self._called.add(index)
            delta.tool_calls = [_called_tool(call, streamed=True) for call in parsed.calls]
        return delta, _reason(piece.finish_reason, called=index in self._called)

    def closing(self, usage: Usage | None, metrics: Metrics | None) -> ChatCompletion:
        """The chunk after all choices, with no choice in it."""
        return self._with_figures(self._chunk([]), usage, metrics)

    def whole(self, choices: list[Piece], usage: Usage, metrics: Metrics | None) -> ChatCompletion:
        """The answer that is not streamed."""
        answers = [self._answer(index, choice) for index, choice in enumerate(choices)]
        completion = ChatCompletion(
            id=self._id, object="chat.completion", created=self._created, model=self._model, choices=answers
        )
        return self._with_figures(completion, usage, metrics)

    def _answer(self, index: int, choice: Piece) -> ChatChoice:
        message, reason = ChatMessage(role="assistant", content=choice.text), choice.finish_reason
        if self._tools is not None:
            parsed = self._tools.whole(choice.text, choice.token_ids)
            if parsed.calls:
                message.content = parsed.content
                message.tool_calls = [_called_tool(call, streamed=False) for call in parsed.calls]
            reason = _reason(reason, called=bool(parsed.calls))
        return ChatChoice(index=index, message=message, logprobs=self._logprobs(choice), finish_reason=reason)

    def _chunk(self, choices: list[ChatChoice]) -> ChatCompletion:
        return ChatCompletion(
            id=self._id, object="chat.completion.chunk", created=self._created, model=self._model, choices=choices
        )

    @staticmethod
    def _with_figures(reply: ChatCompletion, usage: Usage | None, metrics: Metrics | None) -> ChatCompletion:
        if usage is not None:
            reply.usage = usage
        if metrics is not None:
            reply.metrics = metrics
        return reply

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if self._top is None:
            return None
        return ChatLogprobs(
            content=[
                self._token_logprob(token_id, table)
                for token_id, table in zip(piece.token_ids, piece.logprobs, strict=True)
            ]
        )

    def _token_logprob(self, token_id: int, table: dict[int, float]) -> TokenLogprob:
        best = sorted(table.items(), key=lambda item: -item[1])[: self._top]
        chosen = self._top_logprob(token_id, table[token_id])
        return TokenLogprob(
            token=chosen.token,
            logprob=chosen.logprob,
            bytes=chosen.bytes,
            top_logprobs=[self._top_logprob(*item) for item in best],
        )

    def _top_logprob(self, token_id: int, logprob: float) -> TopLogprob:
        token = self._tokenizer.decode_token(token_id)
        bytes_ = None if BROKEN_CHARACTER in token else list(token.encode())
        return TopLogprob(token=token, logprob=max(logprob, -9999.0), bytes=bytes_)


def _called_tool(call: CallDelta, *, streamed: bool) -> CalledTool:
    """A call, or a part of one: a part that begins a call says what is called."""
    function = CalledFunction(arguments=call.arguments)
    if call.name is not None:
        function.name = call.name
    tool = CalledTool(function=function)
    if streamed:
        tool.index = call.index
    if call.id is not None:
        tool.id, tool.type = call.id, "function"
    return tool


def _reason(reason: FinishReason | None, *, called: bool) -> FinishReason | None:
    """A response that ended by itself with a call ended for the call; one that was cut off did not."""
    return "tool_calls" if called and reason == "stop" else reason
