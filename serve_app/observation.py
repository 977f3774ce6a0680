"""Every request has an id, a log line and a count."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app import errors
from serve_app.telemetry import Telemetry

logger = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Observe:
    """Outermost ASGI middleware: request id, access log, response counter, and an answer to every fault.

    Neither the log nor the counters hold anything from a body; an unknown path is counted as `other`.

    Args:
        app: the application.
        telemetry: where responses are counted.
        sets_header: put `X-Request-Id` on the response; false behind a proxy that does so itself.
    """

    def __init__(self, app: ASGIApp, telemetry: Telemetry, *, sets_header: bool) -> None:
        self._app = app
        self._telemetry = telemetry
        self._sets_header = sets_header

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
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
            self._record(scope, request_id, status, time.perf_counter() - started)

    def _record(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in {"GET", "POST", "HEAD", "OPTIONS"} else "other"
        # Status 0: the client went away before there was anything to send.
        self._telemetry.responses.labels(method, route, str(status or 499)).inc()
        logger.info("%s %s %s %d %.1f ms", request_id, method, route, status or 499, seconds * 1e3)


def _request_id(scope: Scope) -> str:
    offered = Headers(scope=scope).get("x-request-id", "")
    return offered if _ID.fullmatch(offered) else uuid.uuid4().hex
