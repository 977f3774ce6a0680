"""The HTTP application: routes and middleware around a `Service`. It knows nothing of Ray."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response

import unmask
from serve_app import errors
from serve_app.auth import KeyFile, RequireKey, api_key
from serve_app.backend import BackendUnavailableError
from serve_app.chat import ChatFormat, chat_specs
from serve_app.completions import CompletionFormat, completion_specs
from serve_app.limits import BoundedRoute
from serve_app.observation import Observe
from serve_app.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from serve_app.replies import ChatCompletion, ModelCard, ModelList, Text, TextCompletion, Tokens
from serve_app.service import Service
from serve_app.telemetry import CONTENT_TYPE
from serve_app.tracing import Tracing

_DIRECTORY_S = 2.0
"""How long a probe waits to hear of the replicas."""

_ERROR_STATUSES = {
    400: "The request is at fault",
    401: "No valid API key",
    404: "Unknown model or path",
    413: "The body is too long",
    429: "The queue is full",
    500: "A fault of the service",
    503: "Nothing can serve the request now",
    504: "The request took too long",
}


def create_app(
    service: Service, keys: KeyFile | None = None, tracing: Tracing | None = None, *, sets_request_id: bool = True
) -> FastAPI:
    """The application.

    Args:
        service: what the endpoints serve from.
        keys: accepted API keys; None asks for none.
        tracing: where spans go; None records none.
        sets_request_id: put `X-Request-Id` on responses; false behind a proxy that does so itself.
    """
    app = FastAPI(
        title="Unmask",
        version=unmask.__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={status: {"description": text} for status, text in _ERROR_STATUSES.items()},
    )
    errors.install(app)
    app.include_router(_generation_routes(service))
    app.include_router(_token_routes(service))
    app.include_router(_operator_routes(service))
    if keys is not None:
        app.add_middleware(RequireKey, keys=keys)
    tracing = tracing or Tracing(None, "ingress")
    app.add_middleware(Observe, telemetry=service.telemetry, tracing=tracing, sets_header=sets_request_id)
    return app


def _generation_routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=BoundedRoute)

    def words(request: Request, model: Service) -> dict[str, Any]:
        return {
            "request_id": request.state.request_id,
            "model": model.model,
            "created": int(time.time()),
            "tokenizer": model.tokenizer,
        }

    @router.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a chat."""
        model = service.of(body.model)
        model.admission.check(body.n or 1, api_key(request))
        tools = model.tool_request(body)
        specs = await chat_specs(body, model.tokenizer, model.max_model_len, tools)
        specs = model.checked(body, specs, "messages")
        return await model.answer(request, body, specs, ChatFormat(body, tools, **words(request, model)))

    @router.post("/v1/completions", response_model=TextCompletion)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts."""
        model = service.of(body.model)
        model.admission.check(len(body.prompt) * (body.n or 1), api_key(request))
        specs = await completion_specs(body, model.tokenizer, model.max_model_len)
        specs = model.checked(body, specs, "prompt")
        return await model.answer(request, body, specs, CompletionFormat(body, **words(request, model)))

    return router


def _token_routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=BoundedRoute)
    cards = {
        served.model: ModelCard(
            id=served.model,
            object="model",
            created=served.created,
            owned_by="unmask",
            max_model_len=served.max_model_len,
        )
        for served in service.all
    }

    @router.get("/v1/models")
    async def models() -> ModelList:
        """The served models."""
        return ModelList(object="list", data=list(cards.values()))

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> ModelCard:
        """One served model."""
        return cards[service.of(model).model]

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Tokens:
        """Token ids of a text or a chat."""
        tokenizer = service.of(body.model).tokenizer
        if (body.prompt is None) == (body.messages is None):
            raise errors.invalid("give either 'prompt' or 'messages'", "prompt")
        if body.messages is not None:
            ids = await tokenizer.encode_chat(body.messages)
        else:
            ids = await tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
        return Tokens(tokens=ids, count=len(ids), max_model_len=service.of(body.model).max_model_len)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Text:
        """Text of token ids."""
        tokenizer = service.of(body.model).tokenizer
        tokenizer.check_ids(body.tokens, "tokens")
        return Text(prompt=await asyncio.to_thread(tokenizer.decode, body.tokens))

    return router


def _operator_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> JSONResponse:
        """Ready when an engine that answers is behind the service."""
        if any(served.admission.closed for served in service.all):
            raise errors.unavailable("the service is going down")
        try:
            async with asyncio.timeout(_DIRECTORY_S):
                reports = await service.backend.reports()
        except (BackendUnavailableError, TimeoutError):
            reports = []
        ready = {report.role for report in reports}
        for served in service.all:
            if served.role not in ready:
                raise errors.unavailable(f"no {served.role} replica is ready")
        return JSONResponse({"status": "ready"})

    @router.get("/ping")
    async def ping() -> JSONResponse:
        """Alive: the HTTP side works."""
        return JSONResponse({"status": "alive"})

    @router.get("/version")
    async def version() -> JSONResponse:
        """The version of the service."""
        return JSONResponse({"version": unmask.__version__})

    @router.get("/metrics")
    async def metrics() -> Response:
        """Metrics in Prometheus' text form. Replicas are left out while they cannot be asked."""
        try:
            reports = await service.backend.reports()
        except BackendUnavailableError:
            reports = []
        names = {served.role: served.model for served in service.all}
        return Response(service.telemetry.exposition(reports, service.model, names), media_type=CONTENT_TYPE)

    return router
