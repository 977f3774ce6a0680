"""A generation request from its specs to its response."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from serve_app import errors
from serve_app.admission import Admission
from serve_app.auth import api_key
from serve_app.backend import Backend
from serve_app.generation import ChoiceSpec, Generation, Piece
from serve_app.protocol import MAX_SCHEMA_CHARS, ChatRequest, GenerationRequest
from serve_app.replies import ChatCompletion, Metrics, TextCompletion, Usage
from serve_app.streaming import EventStream, until_disconnect
from serve_app.telemetry import Telemetry
from serve_app.tokenizer import ChatTokenizer
from serve_app.tracing import NO_SPAN, Span, traceparent

if TYPE_CHECKING:
    from engines.tool_calls import ToolParsers, ToolRequest
    from serve_app.diffusion_rules import DiffusionRules

logger = logging.getLogger(__name__)

Reply = ChatCompletion | TextCompletion


class Format(Protocol):
    """How an endpoint words its answer."""

    def opening(self, index: int) -> Reply | None:
        """The chunk that begins a choice, if there is one."""
        ...

    def chunk(self, index: int, piece: Piece) -> Reply | None:
        """The chunk for what a choice has grown by, if it says anything."""
        ...

    def closing(self, usage: Usage | None, metrics: Metrics | None) -> Reply:
        """The chunk after all choices."""
        ...

    def whole(self, choices: list[Piece], usage: Usage, metrics: Metrics | None) -> Reply:
        """The answer that is not streamed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What every endpoint shares."""

    model: str
    max_model_len: int
    created: int
    tokenizer: ChatTokenizer
    backend: Backend
    admission: Admission
    telemetry: Telemetry
    deadline_s: float
    write_timeout_s: float = 30.0
    diffusion: DiffusionRules | None = None
    """What may be asked of a diffusion LM; None for an autoregressive model."""
    tools: ToolParsers | None = None
    """How the model writes tool calls; None where it is not known."""
    beside: tuple[Service, ...] = ()
    """The other models of the application."""
    generations: set[Generation] = field(default_factory=set)
    """Those that are not answered to the end yet."""

    @property
    def role(self) -> str:
        """The role of the replicas that answer."""
        return "target" if self.diffusion is None else "diffusion"

    @property
    def all(self) -> tuple[Service, ...]:
        """Every model of the application, this one first."""
        return (self, *self.beside)

    def of(self, name: str | None) -> Service:
        """The service of a model; a request without a name takes this one. Raises ApiError."""
        for service in self.all:
            if name in (None, service.model):
                return service
        raise errors.unknown_model("', '".join(service.model for service in self.all))

    def checked(self, body: GenerationRequest, specs: list[ChoiceSpec], prompt_param: str) -> list[ChoiceSpec]:
        """The choices as the model can generate them. Raises ApiError for what only another kind of model could do."""
        if self.diffusion is not None:
            return self.diffusion.apply(body, specs, prompt_param)
        if body.decoder is not None:
            raise errors.invalid("the served model is not a diffusion LM; leave this option out", "decoder")
        return specs

    def tool_request(self, body: ChatRequest) -> ToolRequest | None:
        """What a chat's tools ask for; None where it offers none. Raises ApiError where the model calls no tools."""
        if not body.offers_tools:
            return None
        if self.diffusion is not None:
            raise errors.invalid("a diffusion LM calls no tools; leave this out", "tools")
        if self.tools is None:
            raise errors.invalid("the service has no tool parser (serve.tool_parser); leave this out", "tools")
        names = {"tools", "tool_choice", "parallel_tool_calls", "response_format"}
        wanted = body.model_dump(include=names, exclude_none=True, by_alias=True)
        if len(json.dumps(wanted)) > MAX_SCHEMA_CHARS:
            raise errors.invalid(f"exceed {MAX_SCHEMA_CHARS} characters", "tools")
        return self.tools.request(wanted)

    async def answer(
        self, request: Request, body: GenerationRequest, specs: Sequence[ChoiceSpec], form: Format
    ) -> Response:
        """Generate and answer. Errors before the first token have an HTTP status, later ones are stream events."""
        span: Span = getattr(request.state, "span", NO_SPAN)
        generation = Generation(
            # Clients may give several requests one id; the engine must tell them apart.
            f"{request.state.request_id}-{secrets.token_hex(4)}",
            _with_context(specs, traceparent(span)),
            backend=self.backend,
            admission=self.admission,
            decode=self.tokenizer.decode,
            deadline_s=self.deadline_s,
            api_key=api_key(request),
        )
        self.generations.add(generation)
        answer = _Answer(self, body, specs, form, generation, request)
        streaming = False
        try:
            if body.stream:
                await until_disconnect(answer.wait_for_first(), request.receive)
                streaming = True
                return EventStream(
                    answer.events(), close=partial(self._end, generation), write_timeout_s=self.write_timeout_s
                )
            reply = await until_disconnect(answer.whole(), request.receive)
            return Response(reply.to_json(), media_type="application/json")
        except ClientDisconnect:
            return Response(status_code=499)
        finally:
            if not streaming:
                await self._end(generation)

    async def drain(self, limit_s: float) -> None:
        """Refuse new requests and wait until the others are answered; at the limit those that run end with a 503."""
        try:
            async with asyncio.timeout(limit_s):
                await self.admission.drain()
                for generation in tuple(self.generations):
                    await generation.answered.wait()
        except TimeoutError:
            for generation in tuple(self.generations):
                generation.fail(errors.unavailable("the service is going down"))

    async def _end(self, generation: Generation) -> None:
        self.generations.discard(generation)
        await generation.aclose()
        generation.answered.set()


def _with_context(specs: Sequence[ChoiceSpec], context: str | None) -> Sequence[ChoiceSpec]:
    if context is None:
        return specs
    return [replace(spec, options=replace(spec.options, traceparent=context)) for spec in specs]


class _Answer:
    """The pieces of one request, gathered and put into the endpoint's words."""

    def __init__(
        self,
        service: Service,
        body: GenerationRequest,
        specs: Sequence[ChoiceSpec],
        form: Format,
        generation: Generation,
        request: Request,
    ) -> None:
        self._service = service
        self._body = body
        self._form = form
        self._generation = generation
        self._request_id = request.state.request_id
        self._span: Span = getattr(request.state, "span", NO_SPAN)
        self._choices = [Piece() for _ in specs]
        prompts = specs[:: body.n or 1]
        self._prompt_tokens = sum(len(spec.prompt_ids) for spec in prompts)
        self._first: tuple[int, Piece] | None = None
        self._first_token_at = 0.0

    async def wait_for_first(self) -> None:
        """Wait for the first piece and keep it for `events`."""
        self._first = self._note(await anext(self._generation))

    async def whole(self) -> Reply:
        """The answer that is not streamed."""
        async for _ in self._pieces():
            pass
        usage, metrics = self._finish()
        return self._form.whole(self._choices, usage, metrics)

    async def events(self) -> AsyncIterator[str]:
        """The stream's events; a failure is one more event, and then the end without `[DONE]`."""
        opened: set[int] = set()
        try:
            async for index, piece in self._pieces():
                if index not in opened:
                    opened.add(index)
                    opening = self._form.opening(index)
                    if opening is not None:
                        yield opening.to_json()
                if piece.text or piece.finish_reason or (piece.token_ids and piece.logprobs):
                    chunk = self._form.chunk(index, piece)
                    if chunk is not None:
                        yield chunk.to_json()
            usage, metrics = self._finish()
            if self._body.wants_usage_chunk or metrics is not None:
                yield self._form.closing(usage if self._body.wants_usage_chunk else None, metrics).to_json()
        except errors.ApiError as error:
            yield self._last_event(error)
            return
        except Exception:
            logger.exception("request %s failed in its stream", self._request_id)
            yield self._last_event(errors.internal())
            return
        yield "[DONE]"

    def _last_event(self, error: errors.ApiError) -> str:
        self._service.telemetry.stream_errors.labels(str(error.status_code)).inc()
        return error.event_json()

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        if self._first is not None:
            yield self._first
        async for item in self._generation:
            yield self._note(item)

    def _note(self, item: tuple[int, Piece]) -> tuple[int, Piece]:
        index, piece = item
        if not self._first_token_at:
            self._first_token_at = time.perf_counter()
        self._choices[index].add(piece)
        return item

    def _finish(self) -> tuple[Usage, Metrics | None]:
        """Count the finished request."""
        telemetry, generation = self._service.telemetry, self._generation
        now = time.perf_counter()
        completion_tokens = sum(len(choice.token_ids) for choice in self._choices)
        usage = Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=self._prompt_tokens + completion_tokens,
        )
        queued = (generation.admitted or now) - generation.started
        to_first = self._first_token_at - generation.started
        total = now - generation.started
        telemetry.prompt_tokens.inc(self._prompt_tokens)
        telemetry.completion_tokens.inc(completion_tokens)
        telemetry.queue_time.observe(queued)
        telemetry.first_token_time.observe(to_first)
        telemetry.total_time.observe(total)
        self._span.set_attributes(
            {
                "gen_ai.request.model": self._service.model,
                "gen_ai.usage.input_tokens": self._prompt_tokens,
                "gen_ai.usage.output_tokens": completion_tokens,
                "gen_ai.response.finish_reasons": [choice.finish_reason or "" for choice in self._choices],
                "unmask.queue_ms": queued * 1e3,
                "unmask.time_to_first_token_ms": to_first * 1e3,
            }
        )
        if not self._body.return_metrics:
            return usage, None
        forwards = self._num_forwards()
        per_forward = completion_tokens / forwards if forwards else None
        return usage, Metrics(
            queue_time_ms=queued * 1e3,
            time_to_first_token_ms=to_first * 1e3,
            total_time_ms=total * 1e3,
            tokens_per_second=completion_tokens / total,
            mean_acceptance_length=None if self._service.diffusion else per_forward,
            tokens_per_forward=per_forward,
            num_forwards=forwards,
        )

    def _num_forwards(self) -> int | None:
        forwards = [choice.num_forwards for choice in self._choices]
        return None if None in forwards else sum(number for number in forwards if number is not None)
