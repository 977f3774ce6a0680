"""The whole service: Ray Serve's proxy, the ingress, vLLM with a draft in another process."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from actors.cluster import FaultError
from tests.serve.conftest import K
from tests.trace_collector import Collector

pytestmark = pytest.mark.timeout(600)

BODY = {
    "messages": [{"role": "user", "content": "Write one sentence about the sea."}],
    "temperature": 0,
    "max_tokens": 48,
}


def metric(client: httpx.Client, name: str) -> float:
    """Sum of a metric over its labels."""
    text = client.get("/metrics").text
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def wait_until(condition: Callable[[], bool], limit_s: float) -> float:
    """Seconds until the condition held."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < limit_s, "it never held"
        time.sleep(0.2)
    return time.monotonic() - started


def wait_for_speculation(client: httpx.Client, limit_s: float = 60) -> None:
    wait_until(lambda: metric(client, "unmask_speculation_enabled") == 1, limit_s)


def ask(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json={**BODY, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def text_of(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


def streamed(
    client: httpx.Client, on_chunk: Callable[[], None] = lambda: None, **fields: Any
) -> tuple[str, dict[str, Any]]:
    """Text and usage of a stream that came to its proper end."""
    text, usage, lines = "", {}, []
    request = {**BODY, "stream": True, "stream_options": {"include_usage": True}, **fields}
    with client.stream("POST", "/v1/chat/completions", json=request) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line:
                lines.append(line.removeprefix("data: "))
                on_chunk()
    assert lines.pop() == "[DONE]"
    for chunk in map(json.loads, lines):
        assert "error" not in chunk, chunk
        usage = chunk.get("usage") or usage
        text += "".join(choice["delta"].get("content", "") for choice in chunk["choices"])
    return text, usage


@pytest.fixture(scope="module")
def reference(client: httpx.Client) -> dict[str, Any]:
    """The greedy answer while the draft works."""
    wait_for_speculation(client)
    before = metric(client, "vllm:spec_decode_num_drafts_total")
    answer = ask(client)
    assert len(text_of(answer)) > 20
    wait_until(lambda: metric(client, "vllm:spec_decode_num_drafts_total") > before, 5)
    return answer


def test_ready_and_described(client: httpx.Client, service):
    assert client.get("/health").status_code == 200
    assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 256
    assert len(service.target_pids()) == len(service.draft_pids()) == 1
    assert service.target_pids() != service.draft_pids()


def test_a_stream_adds_up_to_the_answer(client: httpx.Client, reference: dict[str, Any]):
    assert streamed(client) == (text_of(reference), reference["usage"])


WORDS = [
    "Zażółć gęślą",
    "naïve café",
    "東京の夜",
    "👩\u200d👧 🇯🇵 🎉",
    "Ωμέγα",
    "привет мир",
    "שלום",
    "नमस्ते",
    "한국어",
    "ไทย",
]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # four hundred answers, one after another
def test_two_hundred_streams_of_many_scripts_add_up(client: httpx.Client):
    """Characters of several bytes are cut across tokens, and tokens across blocks of the draft."""
    wait_for_speculation(client)
    beyond_ascii = 0
    for number in range(200):
        first, second = WORDS[number % 10], WORDS[number // 10 % 10]
        prompt = f"{number}: {first}, {second}, {first}, {second}, {first}, {second}, {first},"
        body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 0, "ignore_eos": True}
        whole = client.post("/v1/completions", json=body).json()
        response = client.post(
            "/v1/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}}
        )
        *events, end = [event.removeprefix("data: ") for event in response.text.split("\n\n") if event]
        assert end == "[DONE]"
        *chunks, last = map(json.loads, events)
        parts = [chunk["choices"][0] for chunk in chunks]
        [choice] = whole["choices"]
        assert "".join(part["text"] for part in parts) == choice["text"]
        tokens = [token for part in parts for token in (part["logprobs"] or {"tokens": []})["tokens"]]
        assert tokens == choice["logprobs"]["tokens"]
        assert last["usage"] == whole["usage"]
        beyond_ascii += not choice["text"].isascii()
    assert beyond_ascii > 100


def test_the_official_client(service, reference: dict[str, Any]):
    official = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)
    chunks = list(official.chat.completions.create(model="unmask", stream=True, **BODY))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text_of(reference)
    with pytest.raises(openai.BadRequestError) as refused:
        official.chat.completions.create(model="unmask", messages=BODY["messages"], max_tokens=10_000)
    assert refused.value.param == "max_tokens"


def test_a_request_is_one_trace(client: httpx.Client, collector: Collector, reference: dict[str, Any]):
    trace_id, parent = secrets.token_hex(16), secrets.token_hex(8)
    response = client.post(
        "/v1/completions",
        json={"model": "unmask", "prompt": "A secret: one, two", "max_tokens": 8, "ignore_eos": True},
        headers={"traceparent": f"00-{trace_id}-{parent}-01"},
    )
    assert response.status_code == 200
    services = {"unmask-ingress", "unmask-target", "unmask-draft"}
    wait_until(lambda: services <= collector.of_trace(trace_id).keys(), 40)
    spans = collector.of_trace(trace_id)
    ingress, target, draft = (spans[f"unmask-{role}"] for role in ("ingress", "target", "draft"))
    assert ingress.name == "POST /v1/completions"
    assert ingress.parent_span_id.hex() == parent
    assert target.parent_span_id == ingress.span_id
    assert draft.parent_span_id == target.span_id
    told = {one.key: one.value for one in target.attributes}
    assert told["gen_ai.usage.output_tokens"].int_value == 8
    assert {one.key: one.value for one in draft.attributes}["unmask.draft_steps"].int_value >= 1
    assert ingress.start_time_unix_nano <= target.start_time_unix_nano <= draft.start_time_unix_nano
    assert draft.end_time_unix_nano <= target.end_time_unix_nano <= ingress.end_time_unix_nano
    assert all("secret" not in str(span) for span in spans.values())


def test_options_reach_the_engine(client: httpx.Client, reference: dict[str, Any]):
    text = text_of(reference)
    stop = text[10:14]
    stopped = ask(client, stop=stop)
    assert text_of(stopped) == text[: text.index(stop)]
    assert stopped["usage"]["completion_tokens"] < reference["usage"]["completion_tokens"]
    two = ask(client, n=2, temperature=1, seed=7, max_tokens=12)
    assert two["choices"][0]["message"] != two["choices"][1]["message"]
    metrics = ask(client, return_metrics=True)["metrics"]
    assert 1 <= metrics["mean_acceptance_length"] <= K + 1
    content = ask(client, logprobs=True, top_logprobs=2, max_tokens=3)["choices"][0]["logprobs"]["content"]
    assert len(content) == 3
    assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] <= 0 for entry in content), (
        "greedy takes the best"
    )


def test_a_json_schema_is_followed_and_a_bad_one_refused(client: httpx.Client):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert isinstance(json.loads(text_of(ask(client, response_format=form)))["a"], bool)
    form["json_schema"]["schema"] = {"type": "no such type"}
    response = client.post("/v1/chat/completions", json={**BODY, "response_format": form})
    assert response.status_code == 400, response.text


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/v1/chat/completions", b"[", 400),
        ("POST", "/v1/chat/completions", b'{"messages": [], "n": 9}', 400),
        ("POST", "/v1/completions", b'{"prompt": "x", "model": "other"}', 404),
        ("POST", "/v1/completions", b" " * 3_000_000, 413),
        ("GET", "/v1/completions", b"", 405),
        ("GET", "/nowhere", b"", 404),
    ],
)
def test_errors_through_the_proxy(client: httpx.Client, method: str, path: str, content: bytes, status: int):
    headers = {"Content-Type": "application/json", "X-Request-Id": "mine-1"}
    response = client.request(method, path, content=content, headers=headers)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.headers.get_list("x-request-id") == ["mine-1"]


def test_a_client_that_goes_away_frees_the_engine(client: httpx.Client):
    long = {**BODY, "stream": True, "max_tokens": 200, "ignore_eos": True}
    for _ in range(5):
        with client.stream("POST", "/v1/chat/completions", json=long) as response:
            next(response.iter_lines())
        wait_until(lambda: metric(client, "unmask_requests_running") == 0, 2)
    wait_until(lambda: metric(client, "vllm:num_requests_running") == 0, 5)


def test_overload_is_a_429_and_what_was_admitted_is_served(client: httpx.Client):
    with ThreadPoolExecutor(16) as pool:
        requests = [
            pool.submit(client.post, "/v1/chat/completions", json={**BODY, "max_tokens": 24}) for _ in range(16)
        ]
        responses = [request.result() for request in requests]
    statuses = sorted(response.status_code for response in responses)
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 8, "4 run and 4 wait"
    for response in responses:
        if response.status_code == 429:
            assert response.headers["retry-after"]
            assert response.json()["error"]["code"] == "rate_limit_exceeded"


def test_a_swapped_draft_goes_live_under_load(
    client: httpx.Client, service, reference: dict[str, Any], another_draft: Path, stranger: Path
):
    wait_for_speculation(client)
    before = metric(client, "unmask_draft_version")
    pids = service.target_pids(), service.draft_pids()
    stop = threading.Event()

    def keep_asking() -> int:
        count = 0
        while not stop.is_set():
            assert streamed(client) == (text_of(reference), reference["usage"])
            count += 1
        return count

    with ThreadPoolExecutor(3) as pool:
        askers = [pool.submit(keep_asking) for _ in range(3)]
        try:
            service.swap_draft(another_draft)
            wait_until(
                lambda: metric(client, "unmask_link_draft_version") == metric(client, "unmask_draft_version"), 30
            )
            with pytest.raises(FaultError, match="refused"):
                service.swap_draft(stranger)
        finally:
            stop.set()
        assert sum(asker.result() for asker in askers) >= 3
    assert metric(client, "unmask_draft_version") not in (0, before)
    assert metric(client, "unmask_draft_swaps_total") == 1
    assert (service.target_pids(), service.draft_pids()) == pids
    wait_for_speculation(client)


@pytest.mark.slow
def test_a_killed_draft_costs_no_token(client: httpx.Client, service, reference: dict[str, Any]):
    wait_for_speculation(client)
    [pid] = service.draft_pids()
    speculated = metric(client, "vllm:spec_decode_num_drafts_total")
    begun = threading.Event()
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(streamed, client, begun.set) for _ in range(3)]
        assert begun.wait(30)
        os.kill(pid, signal.SIGKILL)
        for answer in answers:
            assert answer.result() == (text_of(reference), reference["usage"])
    wait_until(lambda: metric(client, "unmask_speculation_enabled") == 0, 10)
    assert text_of(ask(client)) == text_of(reference)
    assert client.get("/health").status_code == 200
    wait_for_speculation(client)
    assert service.draft_pids() != [pid]
    assert text_of(ask(client)) == text_of(reference)
    wait_until(lambda: metric(client, "vllm:spec_decode_num_drafts_total") > speculated, 10)


@pytest.mark.slow
def test_a_killed_target_loses_no_token(client: httpx.Client, service, reference: dict[str, Any]):
    report = next(report for report in service.reports() if report.role == "target")
    lines = 0

    def kill_in_the_middle() -> None:
        nonlocal lines
        lines += 1
        if lines == 6:
            os.kill(report.pids[0], signal.SIGKILL)

    assert streamed(client, kill_in_the_middle) == (text_of(reference), reference["usage"])
    assert metric(client, "unmask_requests_resumed_total") == 1
    assert service.target_pids() != [report.pids[0]]
    wait_until(lambda: not any(alive(pid) for pid in report.pids), 20)


def test_shutdown_finishes_what_has_begun(client: httpx.Client, service, reference: dict[str, Any]):
    reports = service.reports()
    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(streamed, client, begun.set)
        assert begun.wait(30)
        service.shutdown()
        assert answer.result() == (text_of(reference), reference["usage"])
    wait_until(lambda: not any(alive(pid) for report in reports for pid in report.pids), 20)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not yet waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
