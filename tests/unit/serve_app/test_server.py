"""The application behind a real HTTP server, with the official client."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from serve_app.service import Service
from tests.unit.serve_app.conftest import TEXTS, ToyBackend

USER = [{"role": "user", "content": "hello"}]


def wait_until(condition: Callable[[], bool], limit_s: float = 20.0) -> float:
    """Seconds until the condition held."""
    started = time.perf_counter()
    while not condition():
        assert time.perf_counter() - started < limit_s, "it never held"
        time.sleep(0.002)
    return time.perf_counter() - started


@pytest.fixture
def official(server_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0)


def test_the_official_client_chats(official: openai.OpenAI):
    whole = official.chat.completions.create(model="toy", messages=USER, temperature=0)
    assert whole.choices[0].message.content in TEXTS
    with official.chat.completions.create(
        model="toy", messages=USER, temperature=0, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_the_official_client_completes_and_lists(official: openai.OpenAI):
    completion = official.completions.create(model="toy", prompt=["a", "b"], n=2, max_tokens=5, logprobs=1)
    assert len(completion.choices) == 4
    assert completion.choices[0].logprobs is not None
    assert [model.id for model in official.models.list()] == ["toy"]
    assert official.models.retrieve("toy").id == "toy"


def test_errors_become_the_official_clients_exceptions(official: openai.OpenAI, backend: ToyBackend):
    with pytest.raises(openai.BadRequestError) as bad:
        official.chat.completions.create(model="toy", messages=USER, n=9)
    assert bad.value.param == "n"
    assert bad.value.request_id
    with pytest.raises(openai.NotFoundError) as missing:
        official.chat.completions.create(model="other", messages=USER)
    assert missing.value.code == "model_not_found"
    backend.fails_after = 6
    with pytest.raises(openai.APIError, match="not available"):
        list(official.chat.completions.create(model="toy", messages=USER, stream=True, temperature=0))
    backend.fails_after = 0
    with pytest.raises(openai.InternalServerError):
        official.chat.completions.create(model="toy", messages=USER)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_goes_away_frees_its_slot(
    server_url: str, backend: ToyBackend, service: Service, streaming: bool, begun: bool
):
    backend.delay_s = 0.02
    if not begun:
        backend.gate.clear()
    body = json.dumps({"messages": USER, "stream": streaming, "max_tokens": 4000, "ignore_eos": True}).encode()
    address = urlsplit(server_url)
    for _ in range(20):
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            wait_until(lambda: backend.active == 1)
            if streaming and begun:
                assert b"200 OK" in connection.recv(100)
        assert wait_until(lambda: backend.active == 0 and service.admission.running == 0) < 0.1
    assert backend.cancelled == 20


def test_a_client_that_does_not_read_holds_no_slot(server_url: str, backend: ToyBackend, service: Service):
    body = json.dumps({"messages": USER, "stream": True, "ignore_eos": True}).encode()
    address = urlsplit(server_url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        wait_until(lambda: backend.active == 1)
        wait_until(lambda: service.admission.running == 0, limit_s=30)


def test_a_body_that_never_ends_is_cut_off(server_url: str):
    def endless():
        while True:
            yield b" " * 65536

    response = httpx.post(
        f"{server_url}/v1/completions", content=endless(), headers={"Content-Type": "application/json"}, timeout=10
    )
    assert response.status_code == 413
