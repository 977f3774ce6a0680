from __future__ import annotations

import json
import logging
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from serve_app.errors import ApiError
from serve_app.protocol import ChatRequest, CompletionRequest
from serve_app.sampling import sampling_options
from serve_app.service import Service
from tests.unit.serve_app.conftest import MAX_MODEL_LEN

USER = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}]


def call(arguments: str) -> dict[str, Any]:
    """A message of an assistant that calls a tool."""
    return {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": arguments}}]}


async def post_chat(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json={"messages": USER, "max_tokens": 4, **fields})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"n": True}, "n"),
        ({"n": "2"}, "n"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": MAX_MODEL_LEN}, "max_tokens"),
        ({"max_completion_tokens": MAX_MODEL_LEN}, "max_completion_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ["x"] * 1_000_00}, "stop"),
        ({"stop": ""}, "stop.0"),
        ({"stop": ["ok", "y" * 257]}, "stop.1"),
        ({"stop": [3]}, "stop.0"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0.content"),
        ({"messages": [*USER, *IMAGE]}, "messages.1.content"),
        ({"messages": [*USER, {"role": "system", "content": "late"}]}, "messages"),
        ({"tools": TOOLS}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f g"}}]}, "tools.0.function.name"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "often"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"messages": [call("[1]")]}, "messages.0.tool_calls.0.function.arguments"),
        ({"messages": [call("{")]}, "messages.0.tool_calls.0.function.arguments"),
        ({"logit_bias": {"5": 3}}, "logit_bias"),
        ({"min_p": 0.1}, "min_p"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"decoder": "d2f"}, "decoder"),
        ({"treshold": 0.9}, "treshold"),
        ({"block_size": 32}, "block_size"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": []}}},
            "response_format.json_schema.schema",
        ),
    ],
)
async def test_a_bad_field_is_a_400_that_names_it(client: httpx.AsyncClient, fields: dict[str, Any], param: str):
    response = await post_chat(client, **fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param, error
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "prompt", [[], [[]], "", [""], {}, 7, [True], [1, "a"], ["a", 1], [[1], [None]], ["x"] * 33, [10**6]]
)
async def test_bad_prompts(client: httpx.AsyncClient, prompt: Any):
    response = await client.post("/v1/completions", json={"prompt": prompt})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "x"},
        {"store": True},
        {"tools": []},
        {"tool_choice": "none"},
        {"tools": TOOLS, "tool_choice": "none"},
        {"n": None},
        {"stop": None},
    ],
)
async def test_fields_that_ask_for_nothing_are_ignored(client: httpx.AsyncClient, fields: dict[str, Any]):
    assert (await post_chat(client, **fields)).status_code == 200


async def test_a_whole_number_may_be_written_as_a_decimal(client: httpx.AsyncClient):
    body = {"prompt": "Hi", "max_tokens": 3.0, "n": 1.0, "seed": -2.0}
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] == 3
    response = await client.post("/v1/completions", json=body | {"max_tokens": 2.5})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "max_tokens")


async def test_an_unknown_model_is_404(client: httpx.AsyncClient):
    response = await post_chat(client, model="gpt-9")
    assert response.status_code == 404
    assert response.json()["error"] | {"message": ""} == {
        "message": "",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    assert (await client.get("/v1/models/gpt-9")).status_code == 404


async def test_a_prompt_beyond_the_context_is_named(client: httpx.AsyncClient):
    response = await client.post("/v1/completions", json={"prompt": "x" * MAX_MODEL_LEN})
    assert response.json()["error"]["param"] == "prompt"
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v2", 404),
        ("GET", "/v1/models/", 404),
    ],
)
async def test_routing_errors_are_json_too(client: httpx.AsyncClient, method: str, path: str, status: int):
    response = await client.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    assert status != 405 or response.headers["allow"]


async def test_a_request_id_of_the_client_is_kept_and_a_wild_one_is_not(client: httpx.AsyncClient):
    assert (await client.get("/ping", headers={"X-Request-Id": "abc-1"})).headers["x-request-id"] == "abc-1"
    assert (await client.get("/ping", headers={"X-Request-Id": "a b\tc"})).headers["x-request-id"].isalnum()


async def test_a_fault_is_a_json_500_with_the_request_id(client: httpx.AsyncClient, service: Service):
    service.backend.reports = None  # type: ignore[method-assign, assignment]
    response = await client.get("/metrics", headers={"X-Request-Id": "abc-2"})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert response.headers["x-request-id"] == "abc-2"


async def test_prompts_are_never_logged(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture):
    secret = "the-secret-of-the-prompt"
    with caplog.at_level(logging.DEBUG, logger="serve_app"):
        await post_chat(client, messages=[{"role": "user", "content": secret}])
        await post_chat(client, messages=[{"role": secret, "content": secret}])
        refused = await post_chat(client, n=secret, decoder=secret)
        await client.get(f"/{secret}?q={secret}", headers={"X-Request-Id": f"{secret} {secret}"})
        metrics = await client.get("/metrics")
    assert caplog.text.count("serve_app") >= 4
    assert secret not in caplog.text
    assert secret not in refused.text
    assert "unmask_http_responses_total" in metrics.text
    assert secret not in metrics.text


def test_requests_become_sampling_options():
    body = ChatRequest.model_validate(
        {
            "messages": USER,
            "temperature": 0,
            "top_p": 0.5,
            "top_k": -1,
            "seed": 9,
            "stop_token_ids": [5],
            "presence_penalty": 1,
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
        }
    )
    options = sampling_options(body, max_tokens=7, logprobs=2)
    assert (options.temperature, options.top_p, options.top_k, options.seed) == (0.0, 0.5, 0, 9)
    assert (options.stop_token_ids, options.presence_penalty, options.logprobs) == ((5,), 1.0, 2)
    assert json.loads(options.json_schema or "") == {"type": "object"}
    assert (
        sampling_options(ChatRequest.model_validate({"messages": USER}), max_tokens=7, logprobs=None).temperature == 1
    )


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from([ChatRequest, CompletionRequest]),
    st.dictionaries(
        st.sampled_from([*ChatRequest.model_fields, *CompletionRequest.model_fields, "min_p", "steps"]),
        JSON_VALUES,
    ),
)
def test_no_body_makes_validation_fall_over(model: type[ChatRequest | CompletionRequest], body: dict[str, Any]):
    try:
        model.model_validate(body)
    except (ValidationError, ApiError):
        return
