"""`/v1/completions`: from a request to choices, and from pieces to the API's objects."""

from __future__ import annotations

from serve_app.generation import ChoiceSpec, Piece
from serve_app.protocol import CompletionRequest
from serve_app.replies import Metrics, TextChoice, TextCompletion, TextLogprobs, Usage
from serve_app.sampling import choice_specs, fit_context, sampling_options
from serve_app.tokenizer import ChatTokenizer

_DEFAULT_MAX_TOKENS = 16
"""The API's own default for text completions."""


async def completion_specs(body: CompletionRequest, tokenizer: ChatTokenizer, max_model_len: int) -> list[ChoiceSpec]:
    """The choices that a completion asks for. Raises ApiError."""
    prompts, options = [], []
    for prompt in body.prompt:
        if isinstance(prompt, str):
            prompt_ids = await tokenizer.encode(prompt)
        else:
            tokenizer.check_ids(prompt, "prompt")
            prompt_ids = prompt
        max_tokens = fit_context(
            len(prompt_ids),
            body.max_tokens,
            default=_DEFAULT_MAX_TOKENS,
            max_model_len=max_model_len,
            prompt_param="prompt",
            max_param="max_tokens",
        )
        prompts.append(prompt_ids)
        options.append(sampling_options(body, max_tokens=max_tokens, logprobs=body.logprobs))
    return choice_specs(body, prompts, options)


class CompletionFormat:
    """The objects of one text completion, whole or streamed."""

    def __init__(self, body: CompletionRequest, *, request_id: str, model: str, created: int, tokenizer: ChatTokenizer):
        self._id = f"cmpl-{request_id}"
        self._model = model
        self._created = created
        self._tokenizer = tokenizer
        self._top = body.logprobs
        self._offsets: dict[int, int] = {}

    def opening(self, index: int) -> None:
        """Text completions have no opening chunk."""

    def chunk(self, index: int, piece: Piece) -> TextCompletion:
        """The chunk for what a choice has grown by."""
        return self._reply([self._choice(index, piece)])

    def closing(self, usage: Usage | None, metrics: Metrics | None) -> TextCompletion:
        """The chunk after all choices, with no choice in it."""
        return self._reply([], usage, metrics)

    def whole(self, choices: list[Piece], usage: Usage, metrics: Metrics | None) -> TextCompletion:
        """The answer that is not streamed."""
        return self._reply([self._choice(index, choice) for index, choice in enumerate(choices)], usage, metrics)

    def _choice(self, index: int, piece: Piece) -> TextChoice:
        return TextChoice(
            index=index, text=piece.text, logprobs=self._logprobs(index, piece), finish_reason=piece.finish_reason
        )

    def _reply(
        self, choices: list[TextChoice], usage: Usage | None = None, metrics: Metrics | None = None
    ) -> TextCompletion:
        reply = TextCompletion(
            id=self._id, object="text_completion", created=self._created, model=self._model, choices=choices
        )
        if usage is not None:
            reply.usage = usage
        if metrics is not None:
            reply.metrics = metrics
        return reply

    def _logprobs(self, index: int, piece: Piece) -> TextLogprobs | None:
        """Log-probabilities; `text_offset` counts characters from the beginning of the choice."""
        if self._top is None:
            return None
        decode = self._tokenizer.decode_token
        reply = TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        offset = self._offsets.get(index, 0)
        for token_id, table in zip(piece.token_ids, piece.logprobs, strict=True):
            best = sorted(table.items(), key=lambda item: -item[1])[: self._top]
            reply.tokens.append(decode(token_id))
            reply.token_logprobs.append(max(table[token_id], -9999.0))
            reply.top_logprobs.append({decode(other): max(logprob, -9999.0) for other, logprob in best})
            reply.text_offset.append(offset)
            offset += len(reply.tokens[-1])
        self._offsets[index] = offset
        return reply
