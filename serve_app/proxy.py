"""Serve's HTTP proxy in the API's form: what it says of itself is JSON too, and a stream never just ends.

Serve answers for an application that cannot: in plain text, and for a stream whose replica has died with silence. A
proxy loads `middlewares` where its environment names them (`actors.cluster.RAY_ENVIRONMENT`).
"""

from __future__ import annotations

import logging
import re
import uuid
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app import errors

logger = logging.getLogger(__name__)

_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_OPTIONS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")
"""By these headers any client could change how long Serve waits."""
_BAD_REQUEST, _NOT_FOUND, _TIMEOUT, _TOO_MANY, _INTERNAL = 400, 404, 408, 429, 500


def middlewares() -> list[Middleware]:
    """What Serve's proxy is wrapped in."""
    return [Middleware(ApiForm)]


class ApiForm:
    """ASGI middleware around Serve's proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = [(name, value) for name, value in scope["headers"] if _is_welcome(name, value)]
        if not any(name == b"x-request-id" for name, _ in headers):
            headers.append((b"x-request-id", uuid.uuid4().hex.encode()))
        scope = {**scope, "headers": headers}
        answer = _Answer(send, dict(headers)[b"x-request-id"])
        try:
            await self._app(scope, receive, answer.send)
        except Exception:
            logger.exception("the proxy failed a request")
        await answer.finish()


def _is_welcome(name: bytes, value: bytes) -> bool:
    return name not in _OPTIONS and (name != b"x-request-id" or _ID.fullmatch(value) is not None)


class _Answer:
    """Passes an answer on, and puts its own in the place of a plain one."""

    def __init__(self, send: Send, request_id: bytes) -> None:
        self._send = send
        self._request_id = request_id
        self._started = self._ended = self._streams = False
        self._plain: errors.ApiError | None = None

    async def send(self, message: Message) -> None:
        """Take one message of the application."""
        if message["type"] == "http.response.start":
            kinds = {bytes(name).lower(): bytes(value) for name, value in message.get("headers", ())}
            kind = kinds.get(b"content-type", b"")
            if message["status"] >= _BAD_REQUEST and not kind.startswith(b"application/json"):
                self._plain = _error(message["status"], kinds.get(b"retry-after"))
                return
            self._started, self._streams = True, kind.startswith(b"text/event-stream")
        elif message["type"] == "http.response.body" and self._started:
            self._ended = not message.get("more_body", False)
        if self._plain is None:
            await self._send(message)

    async def finish(self) -> None:
        """Say what the application has left unsaid."""
        if self._ended:
            return
        if not self._started:
            await self._whole(self._plain or errors.internal())
        elif self._streams:
            event = errors.unavailable("the service has lost the request").event_json()
            await self._send({"type": "http.response.body", "body": f"data: {event}\n\n".encode(), "more_body": False})

    async def _whole(self, error: errors.ApiError) -> None:
        response = error.response()
        headers: list[Any] = [*response.raw_headers, (b"x-request-id", self._request_id)]
        await self._send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        await self._send({"type": "http.response.body", "body": response.body, "more_body": False})


def _error(status: int, retry_after: bytes | None) -> errors.ApiError:
    """Serve's plain refusal in the API's words."""
    if status == _NOT_FOUND:
        return errors.ApiError(_NOT_FOUND, "there is nothing at this path", code="not_found")
    if status == _TIMEOUT:
        return errors.ApiError(504, "not finished in time", kind="timeout_error", code="deadline_exceeded")
    seconds = float(retry_after) if retry_after and retry_after.isdigit() else 1.0
    if status == _TOO_MANY:
        return errors.overloaded(seconds)
    if status < _INTERNAL:
        return errors.ApiError(status, "the request was refused")
    if status == _INTERNAL:
        return errors.internal()
    return errors.unavailable("the service cannot answer at the moment", seconds)
