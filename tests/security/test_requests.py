"""Requests that want the service to reach for something: nothing that a client names is opened, loaded or run."""

from __future__ import annotations

import builtins
import socket
from typing import Any

import httpx
import pytest

from tests.unit.serve_app.conftest import app, backend, client, fast_tokenizer, service

__all__ = ["app", "backend", "client", "fast_tokenizer", "service"]

METADATA = "http://169.254.169.254/latest/meta-data"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"$ref": METADATA}}}
SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"$ref": METADATA}}}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every address that is connected to or looked up, and every file that is opened."""
    attempts: list[Any] = []
    original = builtins.open

    def connect(_: socket.socket, address: Any) -> None:
        attempts.append(address)
        raise OSError("no connection is expected")

    def look_up(*name: Any, **_: Any) -> None:
        attempts.append(name)
        raise OSError("no look-up is expected")

    def open_(path: Any, *arguments: Any, **options: Any) -> Any:
        attempts.append(path)
        return original(path, *arguments, **options)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(builtins, "open", open_)
    return attempts


@pytest.mark.parametrize("url", [METADATA, "http://127.0.0.1:8265/api/jobs/", "file:///etc/passwd"])
@pytest.mark.parametrize("part", ["image_url", "input_audio", "video_url", "file"])
async def test_content_by_address_is_refused_and_never_fetched(
    client: httpx.AsyncClient, opened: list[Any], part: str, url: str
) -> None:
    content = [{"type": "text", "text": "look"}, {"type": part, part: {"url": url}}]
    response = await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages.0.content"
    assert opened == []


@pytest.mark.parametrize("field", [{"tools": [TOOL]}, {"response_format": SCHEMA}])
async def test_references_in_schemas_are_not_followed(
    client: httpx.AsyncClient, opened: list[Any], field: dict[str, Any]
) -> None:
    await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "?"}], **field})
    assert opened == []


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "a\0b", "org/model"])
async def test_a_model_that_is_not_served_is_not_looked_for(
    client: httpx.AsyncClient, opened: list[Any], name: str
) -> None:
    response = await client.post("/v1/completions", json={"prompt": "x", "model": name})
    assert response.status_code == 404
    assert name not in response.text
    assert (await client.get(f"/v1/models/{name.replace(chr(0), '%00')}")).status_code == 404
    assert opened == []


@pytest.mark.parametrize(
    "field",
    [
        "lora_request",
        "mm_processor_kwargs",
        "code_revision",
        "trust_remote_code",
        "chat_template",
        "model_path",
        "vllm_xargs",
    ],
)
async def test_options_of_an_engine_or_loader_have_no_effect(client: httpx.AsyncClient, field: str) -> None:
    body = {"messages": [{"role": "user", "content": "?"}], "temperature": 0}
    plain = (await client.post("/v1/chat/completions", json=body)).json()["choices"]
    response = await client.post("/v1/chat/completions", json=body | {field: "{{ ''.__class__ }}"})
    assert response.status_code == 400 or response.json()["choices"] == plain


async def test_other_origins_are_told_nothing(client: httpx.AsyncClient) -> None:
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    for method in ("OPTIONS", "GET", "POST"):
        response = await client.request(method, "/v1/completions", headers=headers)
        assert not [name for name in response.headers if name.startswith("access-control")]
