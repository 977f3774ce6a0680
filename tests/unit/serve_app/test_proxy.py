"""What Serve's proxy says of itself, in the API's form."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from serve_app.proxy import ApiForm, middlewares

START, BODY = "http.response.start", "http.response.body"
STREAM = [(b"content-type", b"text/event-stream")]
PLAIN = [(b"content-type", b"text/plain"), (b"retry-after", b"7")]


async def through(
    app: Callable[..., Awaitable[None]], headers: list[tuple[bytes, bytes]] | None = None
) -> list[dict[str, Any]]:
    """The messages that a client gets of an application behind the middleware."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    await ApiForm(app)({"type": "http", "headers": headers or []}, receive, send)
    return sent


def says(*messages: dict[str, Any]) -> Callable[..., Awaitable[None]]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    return app


async def test_an_answer_is_passed_on_as_it_is():
    answer = [
        {"type": START, "status": 200, "headers": [(b"content-type", b"application/json")]},
        {"type": BODY, "body": b"{}", "more_body": False},
    ]
    assert await through(says(*answer)) == answer
    refusal = [{**answer[0], "status": 400}, answer[1]]
    assert await through(says(*refusal)) == refusal


@pytest.mark.parametrize(
    ("status", "becomes", "code"),
    [
        (404, 404, "not_found"),
        (408, 504, "deadline_exceeded"),
        (429, 429, "rate_limit_exceeded"),
        (500, 500, None),
        (503, 503, "service_unavailable"),
    ],
)
async def test_a_plain_refusal_becomes_the_apis(status: int, becomes: int, code: str | None):
    start, body = await through(
        says({"type": START, "status": status, "headers": PLAIN}, {"type": BODY, "body": b"Internal things."}),
        [(b"x-request-id", b"mine")],
    )
    assert start["status"] == becomes
    headers = dict(start["headers"])
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"x-request-id"] == b"mine"
    if becomes in (429, 503):
        assert headers[b"retry-after"] == b"7"
    error = json.loads(body["body"])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert not body["more_body"]


async def test_silence_and_faults_are_a_500():
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("inside")

    for app in (says(), fails):
        start, body = await through(app)
        assert start["status"] == 500
        assert b"inside" not in body["body"]
        assert dict(start["headers"])[b"x-request-id"]


@pytest.mark.parametrize("fails", [False, True])
async def test_a_stream_that_is_cut_ends_with_an_error_event(fails: bool):
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": START, "status": 200, "headers": STREAM})
        await send({"type": BODY, "body": b"data: {}\n\n", "more_body": True})
        if fails:
            raise RuntimeError

    *_, last = await through(app)
    assert not last["more_body"]
    event = json.loads(last["body"].removeprefix(b"data: "))
    assert (event["error"]["status"], event["error"]["code"]) == (503, "service_unavailable")


async def test_a_stream_that_ends_properly_is_left_alone():
    messages = [{"type": START, "status": 200, "headers": STREAM}, {"type": BODY, "body": b"data: [DONE]\n\n"}]
    assert await through(says(*messages)) == messages


async def test_clients_do_not_set_serves_own_options():
    seen: list[tuple[bytes, bytes]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(scope["headers"])

    await through(app, [(b"x-request-timeout-seconds", b"0.1"), (b"accept", b"*/*"), (b"x-request-id", b"a b\xff")])
    names = [name for name, _ in seen]
    assert sorted(names) == [b"accept", b"x-request-id"]
    assert dict(seen)[b"x-request-id"] not in (b"a b\xff", b"")


def test_serve_finds_it_by_name():
    from ray._common.utils import import_attr

    from actors.cluster import RAY_ENVIRONMENT

    found = import_attr(RAY_ENVIRONMENT["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"])
    assert found is middlewares
    assert found()[0].cls is ApiForm
