from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.service import Service
from tests.unit.serve_app.conftest import MAX_MODEL_LEN, TEXTS, ToyBackend

GREEDY = {"temperature": 0}


def chat(content: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **GREEDY, **fields}


def events(response: httpx.Response) -> list[Any]:
    """Payloads of a stream, `[DONE]` left as it is."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def stream(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[Any]:
    response = await client.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    got = events(response)
    assert got.pop() == "[DONE]"
    return got


async def test_a_chat_answer(client: httpx.AsyncClient):
    response = (await client.post("/v1/chat/completions", json=chat("q"))).json()
    [choice] = response["choices"]
    assert choice["message"]["content"] in TEXTS
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    assert response["object"] == "chat.completion"
    assert response["id"].startswith("chatcmpl-")
    usage = response["usage"]
    assert usage["completion_tokens"] == len(choice["message"]["content"].encode()) + 1, "a token a byte, and EOS"
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert "metrics" not in response


async def test_a_chat_stream_has_role_text_reason_usage_and_end(client: httpx.AsyncClient):
    *chunks, last = await stream(client, "/v1/chat/completions", chat("q"))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all("usage" not in chunk for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] > 0
    assert {chunk["object"] for chunk in [*chunks, last]} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.text(st.characters(codec="utf-8"), max_size=8),
    block=st.integers(1, 7),
    stop=st.sampled_from([None, "Stop", ["\u6771", "is"], ["\U0001f389", ". T"]]),
    max_tokens=st.integers(1, 80),
    n=st.integers(1, 4),
    seed=st.integers(0, 9),
)
async def test_a_stream_adds_up_to_the_answer(
    client: httpx.AsyncClient,
    backend: ToyBackend,
    prompt: str,
    block: int,
    stop: Any,
    max_tokens: int,
    n: int,
    seed: int,
):
    body = chat(prompt, stop=stop, max_tokens=max_tokens, n=n, seed=seed, temperature=1, logprobs=True)
    whole = (await client.post("/v1/chat/completions", json=body)).json()
    backend.block = block
    *chunks, last = await stream(client, "/v1/chat/completions", body)
    texts, reasons = [""] * n, [None] * n
    tokens: list[list[Any]] = [[] for _ in range(n)]
    for chunk in chunks:
        [choice] = chunk["choices"]
        assert reasons[choice["index"]] is None, "nothing follows the finish reason"
        texts[choice["index"]] += choice["delta"].get("content", "")
        reasons[choice["index"]] = choice["finish_reason"]
        tokens[choice["index"]] += (choice["logprobs"] or {"content": []})["content"]
    assert tokens == [choice["logprobs"]["content"] for choice in whole["choices"]]
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert reasons == [choice["finish_reason"] for choice in whole["choices"]]
    assert last["usage"] == whole["usage"], "however the tokens were grouped"


async def test_a_stop_string_ends_the_text_and_the_work(client: httpx.AsyncClient, backend: ToyBackend):
    body = {"prompt": [f"p{i}" for i in range(8)], "max_tokens": 200, "stop": [" "], **GREEDY}
    response = (await client.post("/v1/completions", json=body)).json()
    assert {choice["text"] for choice in response["choices"]} <= {text.split(" ")[0] for text in TEXTS}
    assert {choice["finish_reason"] for choice in response["choices"]} == {"stop"}
    assert backend.active == 0
    assert backend.cancelled == 8, "the backend was told to stop"


async def test_prompts_and_choices_are_numbered_in_the_apis_order(client: httpx.AsyncClient):
    one = [
        (await client.post("/v1/completions", json={"prompt": p, "n": 2, "seed": 3, "max_tokens": 99})).json()
        for p in "ab"
    ]
    both = (
        await client.post("/v1/completions", json={"prompt": ["a", "b"], "n": 2, "seed": 3, "max_tokens": 99})
    ).json()
    assert [c["index"] for c in both["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in both["choices"]] == [c["text"] for answer in one for c in answer["choices"]]
    assert both["usage"]["prompt_tokens"] == 2, "a prompt counts once, whatever n is"


@pytest.mark.parametrize("prompt", ["ab", [[67, 68]], [67, 68], ["ab"]])
async def test_the_four_forms_of_a_prompt(client: httpx.AsyncClient, prompt: Any):
    ids = (await client.post("/tokenize", json={"prompt": "ab"})).json()["tokens"]
    assert ids == [67, 68]
    response = await client.post("/v1/completions", json={"prompt": prompt, **GREEDY, "max_tokens": 99})
    assert (
        response.json()["choices"][0]["text"]
        == (await client.post("/v1/completions", json={"prompt": "ab", **GREEDY, "max_tokens": 99})).json()["choices"][
            0
        ]["text"]
    )


async def test_max_tokens_defaults(client: httpx.AsyncClient):
    text = (await client.post("/v1/completions", json={"prompt": "a", "ignore_eos": True})).json()
    assert text["usage"]["completion_tokens"] == 16
    assert text["choices"][0]["finish_reason"] == "length"
    talk = (await client.post("/v1/chat/completions", json=chat("a", ignore_eos=True))).json()
    assert talk["usage"]["total_tokens"] == MAX_MODEL_LEN


async def test_chat_logprobs(client: httpx.AsyncClient):
    body = chat("q", logprobs=True, top_logprobs=2, max_tokens=5)
    [choice] = (await client.post("/v1/chat/completions", json=body)).json()["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 5
    for entry in content:
        assert entry["bytes"] == (None if "\ufffd" in entry["token"] else list(entry["token"].encode()))
    assert all(entry["logprob"] == -0.25 and len(entry["top_logprobs"]) == 2 for entry in content)
    assert content[0]["top_logprobs"][0]["token"] == content[0]["token"]
    *chunks, _ = await stream(client, "/v1/chat/completions", body)
    streamed = [e for c in chunks if c["choices"][0]["logprobs"] for e in c["choices"][0]["logprobs"]["content"]]
    assert streamed == content


async def test_text_logprobs(client: httpx.AsyncClient):
    body = {"prompt": "q", "logprobs": 1, "max_tokens": 7, **GREEDY}
    [choice] = (await client.post("/v1/completions", json=body)).json()["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["text_offset"] == list(range(7)) or any(len(token) != 1 for token in logprobs["tokens"])
    assert all(len(table) == 1 for table in logprobs["top_logprobs"])
    *chunks, _ = await stream(client, "/v1/completions", body)
    for key, value in logprobs.items():
        assert [entry for chunk in chunks for entry in chunk["choices"][0]["logprobs"][key]] == value


async def test_metrics_on_request(client: httpx.AsyncClient):
    response = (await client.post("/v1/chat/completions", json=chat("q", return_metrics=True))).json()
    metrics, usage = response["metrics"], response["usage"]
    assert 0 <= metrics["queue_time_ms"] <= metrics["time_to_first_token_ms"] <= metrics["total_time_ms"]
    forwards = -(-usage["completion_tokens"] // 3)
    assert metrics["mean_acceptance_length"] == pytest.approx(usage["completion_tokens"] / forwards)
    *_, last = await stream(client, "/v1/chat/completions", chat("q", return_metrics=True))
    assert last["metrics"]["mean_acceptance_length"] == metrics["mean_acceptance_length"]


async def test_what_the_backend_refuses_is_a_400(client: httpx.AsyncClient):
    schema = {"type": "json_schema", "json_schema": {"schema": {"title": "refused"}}}
    for flag in (False, True):
        response = await client.post("/v1/chat/completions", json=chat("q", response_format=schema, stream=flag))
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "response_format"


async def test_a_backend_that_fails_before_the_first_token_is_a_503(client: httpx.AsyncClient, backend: ToyBackend):
    backend.fails_after = 0
    for flag in (False, True):
        response = await client.post("/v1/chat/completions", json=chat("q", stream=flag))
        assert response.status_code == 503
        assert response.headers["retry-after"]


async def test_a_backend_that_fails_later_ends_the_stream_with_an_error(client: httpx.AsyncClient, backend: ToyBackend):
    backend.fails_after = 6
    response = await client.post("/v1/chat/completions", json=chat("q", stream=True))
    *_, last = events(response)
    assert response.status_code == 200
    assert last["error"]["status"] == 503
    assert last["error"]["code"] == "service_unavailable"


async def test_a_fault_in_one_choice_ends_the_others(client: httpx.AsyncClient, backend: ToyBackend, service: Service):
    backend.fails_after = 6
    response = await client.post("/v1/chat/completions", json=chat("q", n=4))
    assert response.status_code == 503
    assert (backend.active, service.admission.running) == (0, 0)


async def test_the_deadline_is_a_504_and_ends_the_work(
    client: httpx.AsyncClient, backend: ToyBackend, service: Service
):
    object.__setattr__(service, "deadline_s", 0.2)
    backend.gate.clear()
    for flag in (False, True):
        response = await client.post("/v1/chat/completions", json=chat("q", stream=flag))
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "deadline_exceeded"
    backend.gate.set()
    backend.delay_s = 0.15
    *_, last = events(await client.post("/v1/chat/completions", json=chat("q", stream=True)))
    assert last["error"]["status"] == 504
    assert (backend.active, service.admission.running) == (0, 0)


async def test_overload_is_refused_at_once_and_everything_admitted_is_served(
    client: httpx.AsyncClient, backend: ToyBackend, service: Service
):
    backend.gate.clear()
    posts = [asyncio.create_task(client.post("/v1/chat/completions", json=chat(f"{i}"))) for i in range(40)]
    done, pending = await asyncio.wait(posts, timeout=2, return_when=asyncio.ALL_COMPLETED)
    assert len(done) == 24, "8 run, 8 wait"
    assert len(pending) == 16
    for task in done:
        assert task.result().status_code == 429
        assert task.result().headers["retry-after"] == "1"
    backend.gate.set()
    assert {response.status_code for response in await asyncio.gather(*pending)} == {200}
    assert (service.admission.running, service.admission.waiting) == (0, 0)


async def test_requests_may_share_a_request_id(client: httpx.AsyncClient, backend: ToyBackend):
    backend.delay_s = 0.01
    headers = {"X-Request-Id": "same"}
    posts = [client.post("/v1/chat/completions", json=chat("q", n=2), headers=headers) for _ in range(3)]
    assert [response.status_code for response in await asyncio.gather(*posts)] == [200] * 3


async def test_draining_refuses_new_requests(client: httpx.AsyncClient, service: Service):
    await service.admission.drain()
    response = await client.post("/v1/chat/completions", json=chat("q"))
    assert response.status_code == 503
    assert response.headers["retry-after"]


async def test_a_service_that_goes_down_is_not_ready(client: httpx.AsyncClient, service: Service):
    assert (await client.get("/health")).status_code == 200
    await service.drain(1.0)
    assert (await client.get("/health")).status_code == 503


@pytest.mark.parametrize("stream", [False, True])
async def test_what_does_not_end_in_time_is_told_so(
    client: httpx.AsyncClient, backend: ToyBackend, service: Service, stream: bool
):
    backend.delay_s = 0.2
    asked = asyncio.create_task(client.post("/v1/chat/completions", json=chat("q", stream=stream)))
    await asyncio.sleep(0.5)
    assert backend.active
    await service.drain(0.1)
    response = await asked
    if stream:
        *_, last = events(response)
        assert (response.status_code, last["error"]["status"]) == (200, 503)
    else:
        assert response.status_code == 503
    assert (backend.active, service.admission.running, service.generations) == (0, 0, set())


async def test_a_fault_while_wording_a_stream_is_its_last_event(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: Any) -> None:
        raise KeyError("no such thing")

    monkeypatch.setattr("serve_app.chat.ChatFormat.chunk", fails)
    response = await client.post("/v1/chat/completions", json=chat("q", stream=True))
    *_, last = events(response)
    assert last["error"]["status"] == 500
    assert "no such thing" not in response.text
    text = (await client.get("/metrics")).text
    assert 'unmask_stream_errors_total{status="500"} 1.0' in text


async def test_metrics(client: httpx.AsyncClient):
    await client.post("/v1/chat/completions", json=chat("q"))
    await client.get("/nowhere")
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = set(response.text.splitlines())
    for line in (
        'unmask_http_responses_total{method="POST",route="/v1/chat/completions",status="200"} 1.0',
        'unmask_http_responses_total{method="GET",route="other",status="404"} 1.0',
        "unmask_requests_running 0.0",
        'unmask_replicas{role="target"} 1.0',
        'vllm:generation_tokens_total{model_name="toy",replica="t1"} 7.0',
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="toy",position="1",replica="t1"} 3.0',
        'unmask_speculation_enabled{model_name="toy",replica="t1"} 1.0',
        'unmask_draft_steps_total{model_name="toy",replica="d1"} 3.0',
    ):
        assert line in lines, response.text


async def test_models_and_tokens(client: httpx.AsyncClient):
    models = (await client.get("/v1/models")).json()
    assert [card["id"] for card in models["data"]] == ["toy"]
    assert (await client.get("/v1/models/toy")).json() == models["data"][0]
    assert models["data"][0]["max_model_len"] == MAX_MODEL_LEN
    ids = (await client.post("/tokenize", json={"messages": [{"role": "user", "content": "\u00e9"}]})).json()
    text = (await client.post("/detokenize", json={"tokens": ids["tokens"]})).json()["prompt"]
    assert text == "user\n\u00e9\nassistant\n"
    assert (await client.post("/detokenize", json={"tokens": [99999]})).status_code == 400
    assert (await client.post("/tokenize", json={})).status_code == 400


async def test_no_cors(client: httpx.AsyncClient):
    response = await client.get("/v1/models", headers={"Origin": "https://evil.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]
