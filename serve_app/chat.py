"""`/v1/chat/completions`: from a request to choices, and from pieces to the API's objects."""

from __future__ import annotations

from serve_app import errors
from serve_app.detokenizer import BROKEN_CHARACTER
from serve_app.generation import ChoiceSpec, Piece
from serve_app.protocol import ChatRequest
from serve_app.replies import (
    ChatChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Metrics,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from serve_app.sampling import choice_specs, fit_context, sampling_options
from serve_app.tokenizer import ChatTokenizer


async def chat_specs(body: ChatRequest, tokenizer: ChatTokenizer, max_model_len: int) -> list[ChoiceSpec]:
    """The choices that a chat asks for. Raises ApiError."""
    if body.top_logprobs is not None and not body.logprobs:
        raise errors.invalid("needs 'logprobs': true", "top_logprobs")
    prompt_ids = await tokenizer.encode_chat(body.messages)
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
    return choice_specs(body, [prompt_ids], [sampling_options(body, max_tokens=max_tokens, logprobs=logprobs)])


class ChatFormat:
    """The objects of one chat: `chat.completion`, or the chunks of its stream."""

    def __init__(self, body: ChatRequest, *, request_id: str, model: str, created: int, tokenizer: ChatTokenizer):
        self._id = f"chatcmpl-{request_id}"
        self._model = model
        self._created = created
        self._tokenizer = tokenizer
        self._top = (body.top_logprobs or 0) if body.logprobs else None

    def opening(self, index: int) -> ChatCompletion:
        """The chunk that begins a choice: the role."""
        delta = ChatDelta(role="assistant", content="")
        return self._chunk([ChatChoice(index=index, delta=delta, logprobs=None, finish_reason=None)])

    def chunk(self, index: int, piece: Piece) -> ChatCompletion:
        """The chunk for what a choice has grown by."""
        delta = ChatDelta(content=piece.text) if piece.text else ChatDelta()
        choice = ChatChoice(index=index, delta=delta, logprobs=self._logprobs(piece), finish_reason=piece.finish_reason)
        return self._chunk([choice])

    def closing(self, usage: Usage | None, metrics: Metrics | None) -> ChatCompletion:
        """The chunk after all choices, with no choice in it."""
        return self._with_figures(self._chunk([]), usage, metrics)

    def whole(self, choices: list[Piece], usage: Usage, metrics: Metrics | None) -> ChatCompletion:
        """The answer that is not streamed."""
        answers = [
            ChatChoice(
                index=index,
                message=ChatMessage(role="assistant", content=choice.text),
                logprobs=self._logprobs(choice),
                finish_reason=choice.finish_reason,
            )
            for index, choice in enumerate(choices)
        ]
        completion = ChatCompletion(
            id=self._id, object="chat.completion", created=self._created, model=self._model, choices=answers
        )
        return self._with_figures(completion, usage, metrics)

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
