from __future__ import annotations

import asyncio

import httpx
import pytest

from serve_app.limits import MAX_BODY_BYTES

JSON = {"Content-Type": "application/json"}
CHAT = b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, %s}'

BAD_BODIES = {
    "empty": b"",
    "list": b"[]",
    "text": b'"hi"',
    "number": b"7",
    "null": b"null",
    "cut": b'{"messages": [',
    "not UTF-8": b'{"messages": "\xff"}',
    "lone surrogate": CHAT % rb'"user": "\ud800"',
    "NaN": CHAT % b'"temperature": NaN',
    "Infinity": CHAT % b'"temperature": Infinity',
    "huge integer": CHAT % (b'"seed": ' + b"9" * 100_000),
    "deep lists": b'{"messages": ' + b"[" * 2000 + b"]" * 2000 + b"}",
    "deep objects": b'{"a":' * 2000 + b"1" + b"}" * 2000,
    "many fields": b"{" + b",".join(b'"f%d": 0' % i for i in range(5000)) + b"}",
}


@pytest.mark.parametrize("name", BAD_BODIES)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
async def test_a_bad_body_is_a_400(client: httpx.AsyncClient, path: str, name: str):
    response = await client.post(path, content=BAD_BODIES[name], headers={**JSON, "X-Request-Id": "mine"})
    assert response.status_code == 400, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"] == "mine"


@pytest.mark.parametrize("value", [b"1e999", b"9" * 400, b"-1e999"])
@pytest.mark.parametrize("field", ["temperature", "max_tokens", "seed", "n", "top_p", "top_logprobs"])
async def test_numbers_out_of_range_are_400(client: httpx.AsyncClient, field: str, value: bytes):
    body = CHAT % b'"%s": %s' % (field.encode(), value)
    response = await client.post("/v1/chat/completions", content=body.replace(b'"max_tokens": 4, ', b""), headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


async def test_a_long_body_is_413_before_it_is_read(client: httpx.AsyncClient):
    read = 0

    async def body():
        nonlocal read
        for _ in range(100):
            read += MAX_BODY_BYTES // 10
            yield b" " * (MAX_BODY_BYTES // 10)

    response = await client.post("/v1/completions", content=body(), headers=JSON)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    # Only what a real server hands over is bounded here; the in-process transport reads ahead by one part.
    assert read <= MAX_BODY_BYTES * 1.3


async def test_a_declared_long_body_is_413(client: httpx.AsyncClient):
    headers = {**JSON, "Content-Length": str(MAX_BODY_BYTES + 1)}
    assert (await client.post("/v1/completions", content=b"{}", headers=headers)).status_code == 413


@pytest.mark.parametrize("media_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/xml"])
async def test_other_media_types_are_400(client: httpx.AsyncClient, media_type: str | None):
    headers = {"Content-Type": media_type} if media_type else {}
    response = await client.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)
    assert response.status_code == 400
    assert "Content-Type" in response.json()["error"]["message"]


async def test_a_body_just_within_the_limit_is_read(client: httpx.AsyncClient):
    content = b'{"prompt": "x", "max_tokens": 1}'
    response = await client.post("/v1/completions", content=content.ljust(MAX_BODY_BYTES), headers=JSON)
    assert response.status_code == 200


BIG = 1_800_000
LONG_BODIES = {
    "stop": (b"/v1/completions", b'{"prompt": "x", "stop": [' + b",".join([b"1"] * (BIG // 2)) + b"]}"),
    "stop_token_ids": (
        b"/v1/completions",
        b'{"prompt": "x", "stop_token_ids": [' + b",".join([b"-1"] * (BIG // 3)) + b"]}",
    ),
    "messages": (b"/v1/chat/completions", b'{"messages": [' + b",".join([b"{}"] * (BIG // 3)) + b"]}"),
    "tools": (b"/v1/chat/completions", b'{"messages": [], "tools": [' + b",".join([b"{}"] * (BIG // 3)) + b"]}"),
    "tokens": (b"/detokenize", b'{"tokens": [' + b",".join([b"-1"] * (BIG // 3)) + b"]}"),
    "a name": (b"/v1/completions", b'{"prompt": "x", "' + b"d" * BIG + b'": 1, "n": 0}'),
    "a text": (b"/tokenize", b'{"prompt": "' + b"d" * BIG + b'"}'),
}


@pytest.mark.parametrize("name", LONG_BODIES)
async def test_no_body_stops_the_others(client: httpx.AsyncClient, name: str):
    """A body of errors is refused at the first of them: all of them took the event loop for ten seconds."""
    path, body = LONG_BODIES[name]
    response = await client.post(path.decode(), content=body, headers=JSON)
    assert response.status_code == 400
    assert len(response.content) < 1000
    assert response.json()["error"]["param"] is None or len(response.json()["error"]["param"]) < 50


async def test_a_body_that_trickles_is_not_waited_for(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("serve_app.limits.READ_TIMEOUT_S", 0.05)

    async def body():
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    response = await client.post("/v1/completions", content=body(), headers=JSON)
    assert (response.status_code, response.json()["error"]["code"]) == (408, "request_timeout")
