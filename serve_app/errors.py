"""HTTP errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from unmask.errors import UserError


class ApiError(HTTPException):
    """An error that the client is told about.

    Args:
        status: HTTP status.
        message: what is wrong and what to do; it never quotes the prompt.
        kind: OpenAI's `type`.
        param: the request field at fault, or None.
        code: OpenAI's short machine-readable code, or None.
        retry_after_s: when another try makes sense; sent as `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        headers = None if retry_after_s is None else {"Retry-After": str(max(1, round(retry_after_s)))}
        super().__init__(status, message, headers)
        self.kind = kind
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {"error": {"message": self.detail, "type": self.kind, "param": self.param, "code": self.code}}

    def event_json(self) -> str:
        """The error as an event of a stream, whose HTTP status has already gone out."""
        body = self.body()
        body["error"]["status"] = self.status_code
        return json.dumps(body)

    def response(self) -> JSONResponse:
        """The whole HTTP response."""
        return JSONResponse(self.body(), self.status_code, headers=self.headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request cannot be served as it is."""
    return ApiError(400, message, param=param, code=code)


def unauthorized() -> ApiError:
    """401: no key or an unknown one."""
    error = ApiError(401, "give a valid API key as 'Authorization: Bearer KEY'", code="invalid_api_key")
    error.headers = {"WWW-Authenticate": "Bearer"}
    return error


def unknown_model(served: str) -> ApiError:
    """404: the request names another model than the one served."""
    return ApiError(404, f"unknown model; this service serves '{served}'", param="model", code="model_not_found")


def too_slow(limit_s: float) -> ApiError:
    """408: the request body did not arrive in time."""
    error = ApiError(408, f"the request body did not arrive within {limit_s:g} s", code="request_timeout")
    error.headers = {"Connection": "close"}
    return error


def too_large(limit_bytes: int) -> ApiError:
    """413: the request body is longer than the service reads; the rest of it is not waited for."""
    error = ApiError(413, f"the request body exceeds {limit_bytes} bytes", code="request_too_large")
    error.headers = {"Connection": "close"}
    return error


def overloaded(retry_after_s: float) -> ApiError:
    """429: the queue is full."""
    return ApiError(
        429,
        "too many requests are waiting; try again later",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        retry_after_s=retry_after_s,
    )


def internal() -> ApiError:
    """500: a fault of the service; its log holds the cause."""
    return ApiError(500, "internal error; quote the X-Request-Id when reporting it", kind="server_error")


def unavailable(message: str, retry_after_s: float = 2.0) -> ApiError:
    """503: nothing can serve the request at the moment."""
    return ApiError(
        503, message, kind="service_unavailable_error", code="service_unavailable", retry_after_s=retry_after_s
    )


def deadline_exceeded(limit_s: float) -> ApiError:
    """504: the request took longer than the service allows."""
    return ApiError(504, f"not finished within {limit_s:g} s", kind="timeout_error", code="deadline_exceeded")


def from_user_error(error: UserError) -> ApiError:
    """400 for a request that the backend refused."""
    return invalid(str(error.args[0]), error.field)


def from_validation(error: RequestValidationError) -> ApiError:
    """400 that names the first field at fault and does not quote its value."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    if not where and first["type"] != "value_error":
        return invalid("the body must be a JSON object")
    return invalid(first["msg"].removeprefix("Value error, "), where or None)


def install(app: FastAPI) -> None:
    """Make every error of an application answer in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def on_routing_error(_: Request, error: HTTPException) -> JSONResponse:
        response = ApiError(error.status_code, error.detail).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
        return from_validation(error).response()

    @app.exception_handler(UserError)
    async def on_user_error(_: Request, error: UserError) -> JSONResponse:
        return from_user_error(error).response()
