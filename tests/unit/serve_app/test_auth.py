from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from fastapi.routing import APIRoute

from serve_app.auth import OPEN_PATHS, KeyFile, hash_key
from serve_app.ingress import create_app
from serve_app.service import Service
from tests.unit.serve_app.conftest import ToyBackend

OPEN = {"/health", "/ping"}
GUARDED = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/models/{model:path}",
    "/tokenize",
    "/detokenize",
    "/version",
    "/metrics",
    "/openapi.json",
}


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# two clients\nalice:{hash_key('key-A')}\n{hash_key('key-B')}  # no name\n")
    return path


@pytest.fixture
async def guarded(service: Service, key_file: Path):
    app = create_app(service, KeyFile(key_file))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://toy") as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_every_route_is_known_to_this_test(service: Service):
    routes = {route.path for route in create_app(service).routes}
    assert routes == OPEN | GUARDED
    assert OPEN == OPEN_PATHS


async def test_every_route_but_the_probes_asks_for_a_key(guarded: httpx.AsyncClient, service: Service):
    for route in create_app(service).routes:
        for method in sorted(route.methods or set()) if isinstance(route, APIRoute) else ["GET"]:
            response = await guarded.request(method, route.path)
            if route.path in OPEN:
                assert response.status_code == 200, route.path
                continue
            assert response.status_code == 401, route.path
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/nothing", "/health/", "//health", "/v1/models/../../health", "/HEALTH"])
async def test_unknown_paths_ask_for_a_key_too(guarded: httpx.AsyncClient, path: str):
    response = await guarded.get(path)
    assert response.status_code == 401 or str(response.url).endswith("/health")


@pytest.mark.parametrize("key", ["key-A", "key-B"])
async def test_any_of_the_keys_is_accepted(guarded: httpx.AsyncClient, key: str):
    assert (await guarded.get("/v1/models", headers=bearer(key))).status_code == 200


@pytest.mark.parametrize(
    "key", ["", "key-a", "KEY-A", "xkey-A", "key-AB", "key-", "schl\u00fcssel".encode().decode("latin-1")]
)
async def test_other_keys_are_not(guarded: httpx.AsyncClient, key: str):
    response = await guarded.get("/v1/models", headers={"Authorization": f"Bearer {key}".encode("latin-1")})
    assert response.status_code == 401


async def test_a_hash_is_no_key(guarded: httpx.AsyncClient):
    assert (await guarded.get("/v1/models", headers=bearer(hash_key("key-A")))).status_code == 401


async def test_keys_change_without_a_restart(guarded: httpx.AsyncClient, key_file: Path):
    replacement = key_file.with_suffix(".new")
    replacement.write_text(hash_key("key-C"))
    replacement.replace(key_file)
    assert (await guarded.get("/v1/models", headers=bearer("key-A"))).status_code == 401
    assert (await guarded.get("/v1/models", headers=bearer("key-C"))).status_code == 200


@pytest.mark.parametrize("content", [None, "not a hash", "\xff\xfe"])
def test_a_broken_file_accepts_no_key_until_it_is_mended(key_file: Path, content: str | None):
    keys = KeyFile(key_file)
    assert keys.accepts("key-A")
    good = key_file.read_text()
    if content is None:
        key_file.unlink()
    else:
        key_file.write_bytes(content.encode("latin-1"))
    assert not keys.accepts("key-A")
    key_file.write_text(good)
    assert keys.accepts("key-A")


def test_keys_are_compared_in_constant_time(key_file: Path, monkeypatch: pytest.MonkeyPatch):
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    assert KeyFile(key_file).accepts("key-A")
    assert len(compared) == 2, "every entry is compared, also after a match"


async def test_keys_are_never_logged(guarded: httpx.AsyncClient, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG, logger="serve_app"):
        await guarded.get("/v1/models", headers=bearer("key-A"))
        await guarded.get("/v1/models", headers=bearer("wrong-key"))
    assert "key-A" not in caplog.text
    assert "wrong-key" not in caplog.text


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(2000):
        if holds():
            return
        await asyncio.sleep(0.005)
    raise TimeoutError


async def test_a_flood_of_one_key_leaves_the_other_its_turns(
    guarded: httpx.AsyncClient, backend: ToyBackend, service: Service
):
    backend.gate.clear()
    body = {"model": "toy", "messages": [{"role": "user", "content": "q"}], "max_tokens": 4}

    def post(key: str) -> asyncio.Task[httpx.Response]:
        return asyncio.create_task(guarded.post("/v1/chat/completions", json=body, headers=bearer(key)))

    flood = [post("key-A") for _ in range(100)]
    await until(lambda: sum(task.done() for task in flood) == 84)
    others = [post("key-B") for _ in range(3)]
    await until(lambda: sum(task.done() for task in flood) == 87)
    backend.gate.set()
    assert [response.status_code for response in await asyncio.gather(*others)] == [200] * 3
    statuses = [response.status_code for response in await asyncio.gather(*flood)]
    assert (statuses.count(200), statuses.count(429)) == (13, 87), "8 ran, 8 waited, of which 3 gave way"
