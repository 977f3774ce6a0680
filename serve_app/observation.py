"""Every request has an id, a log line and a count, and a span where requests are traced."""

from __future__ import annotations

import logging
import re
import time
import uuid

from opentelemetry.trace import SpanKind
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app import errors
from serve_app.telemetry import Telemetry
from serve_app.tracing import NO_SPAN, Tracing

logger = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_GONE = 499


class Observe:
    """Outermost ASGI middleware: request id, access log, response counter, and an answer to every fault.

    Neither the log nor the counters hold anything from a body; an unknown path is counted as `other`.

    Args:
        app: the application.
        telemetry: where responses are counted.
        tracing: where spans of generation requests go.
        sets_header: put `X-Request-Id` on the response; false behind a proxy that does so itself.
    """

    def __init__(self, app: ASGIApp, telemetry: Telemetry, tracing: Tracing, *, sets_header: bool) -> None:
        self._app = app
        self._telemetry = telemetry
        self._tracing = tracing
        self._sets_header = sets_header

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = _request_id(scope)
        # Probes and metrics are asked for every few seconds, and say nothing of a request.
        traced = scope["method"] == "POST"
        parent = Headers(scope=scope).get("traceparent")
        span = self._tracing.start("POST", parent, SpanKind.SERVER) if traced else NO_SPAN
        scope.setdefault("state", {}).update(request_id=request_id, span=span)
        status = 0

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._sets_header:
                    MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, observed_send)
        except Exception:
            logger.exception("request %s failed", request_id)
            if status:
                raise
            await errors.internal().response()(scope, receive, observed_send)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._record(scope, route, request_id, status, time.perf_counter() - started)
            span.update_name(f"POST {route}")
            self._tracing.finish(
                span,
                {
                    "http.request.method": "POST",
                    "http.route": route,
                    "http.response.status_code": status or _GONE,
                    "unmask.request_id": request_id,
                },
            )

    def _record(self, scope: Scope, route: str, request_id: str, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in {"GET", "POST", "HEAD", "OPTIONS"} else "other"
        # Status 0: the client went away before there was anything to send.
        self._telemetry.responses.labels(method, route, str(status or _GONE)).inc()
        logger.info("%s %s %s %d %.1f ms", request_id, method, route, status or _GONE, seconds * 1e3)


def _request_id(scope: Scope) -> str:
    offered = Headers(scope=scope).get("x-request-id", "")
    return offered if _ID.fullmatch(offered) else uuid.uuid4().hex
