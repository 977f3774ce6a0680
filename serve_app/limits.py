"""Bounds on what is read from a client before anything is made of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from serve_app import errors

MAX_BODY_BYTES = 2 * 1024 * 1024
READ_TIMEOUT_S = 30.0
"""A body that trickles in holds a place that others wait for."""


def parse_json(body: bytes) -> Any:
    """Parse a request body.

    pydantic's parser works in one pass with bounded effort: it refuses nesting beyond 200 levels, integers beyond
    4300 digits, NaN, invalid UTF-8 and lone surrogates, where the standard library raises RecursionError, takes
    quadratic time, or lets them through to the tokenizer.

    Raises:
        ApiError: 400, without quoting the body.
    """
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise errors.invalid(f"the body is not valid JSON: {error}", code="invalid_json") from None


class BoundedRequest(Request):
    """A request whose body is read up to `MAX_BODY_BYTES`, for `READ_TIMEOUT_S`, and parsed by `parse_json`."""

    async def body(self) -> bytes:
        """The whole body. Raises ApiError: 413 when it is too long, 408 when it does not come, 400 if it is no JSON."""
        if not hasattr(self, "_body"):
            media_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
            if media_type != "application/json":
                raise errors.invalid("send the body as JSON, with 'Content-Type: application/json'")
            self._body = await self._read()
        return self._body

    async def json(self) -> Any:
        """The parsed body."""
        return parse_json(await self.body())

    async def _read(self) -> bytes:
        declared = self.headers.get("content-length", "0")
        if not declared.isdecimal() or len(declared) > 9 or int(declared) > MAX_BODY_BYTES:
            raise errors.too_large(MAX_BODY_BYTES)
        body = bytearray()
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                async for chunk in self.stream():
                    body += chunk
                    if len(body) > MAX_BODY_BYTES:
                        raise errors.too_large(MAX_BODY_BYTES)
        except TimeoutError:
            raise errors.too_slow(READ_TIMEOUT_S) from None
        return bytes(body)


class BoundedRoute(APIRoute):
    """A route that hands its endpoint a `BoundedRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The endpoint, wrapped."""
        handle = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            return await handle(BoundedRequest(request.scope, request.receive))

        return bounded
