"""O1 to O5: ten times the load, clients that go away or read slowly, requests that take too long or are none."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.fault.load import HTTP_OK, Load, Reply, ask, paced, percentile
from tests.fault.record import Finding, at_most, conclude, equal
from tests.fault.scenario import Stage, is_ours, wait_until

pytestmark = pytest.mark.timeout(600)

SLOTS = 2
TOKENS = 48
DEADLINE_S = 12.0
LOOKS = 20
"""How often the time until a slot is free again is measured."""
CYCLES = [LOOKS, pytest.param(1000, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def service(ray_cluster: None) -> Iterator[Stage]:
    """The embedded target behind the admission that keeps waits short: a slot or a refusal, and no queue."""
    from serve_app.handle import serve_pairing
    from unmask.config import Recipe, ServeConfig, TargetConfig

    handle = serve_pairing(
        Recipe(
            target=TargetConfig(max_model_len=512, engine={"kv_cache_memory_bytes": 1 << 28, "enforce_eager": True}),
            serve=ServeConfig(port=0, dtype="float32", max_num_seqs=SLOTS, max_queued=0, request_timeout_s=DEADLINE_S),
        )
    )
    yield Stage(service=handle, targets=1)
    handle.shutdown()


def resident_mb(stage: Stage) -> float:
    """Memory of all processes that serve."""
    found = 0
    for process in psutil.process_iter():
        try:
            if is_ours(process) and process.cmdline()[0].startswith(("ray::Serve", "ray::ProxyActor", "VLLM::")):
                found += process.memory_info().rss
        except (psutil.NoSuchProcess, psutil.AccessDenied, IndexError):
            continue
    return found / 2**20


@dataclass(frozen=True, slots=True)
class Phase:
    """A time of load: its replies, its seconds, and the share of all cores that each side had."""

    replies: list[Reply]
    seconds: float
    shares: dict[str, float]

    @classmethod
    def of(cls, load: Callable[[], list[Reply]]) -> Phase:
        """Measure a load."""
        before, begun = cpu_seconds(), time.monotonic()
        replies = load()
        seconds = time.monotonic() - begun
        used = {side: after - before[side] for side, after in cpu_seconds().items()}
        return cls(replies, seconds, {side: of / seconds / psutil.cpu_count() for side, of in used.items()})

    def __str__(self) -> str:
        return ", ".join(f"{side} {100 * share:.0f} %" for side, share in self.shares.items())


def cpu_seconds() -> dict[str, float]:
    """Of the engine, of everything else that serves, and of the clients in this process."""
    found = {"engine": 0.0, "service": 0.0, "clients": 0.0}
    for process in psutil.process_iter():
        try:
            if not is_ours(process) and process.pid != os.getpid():
                continue
            times, name = process.cpu_times(), process.cmdline()[0]
        except (psutil.NoSuchProcess, psutil.AccessDenied, IndexError):
            continue
        side = "clients" if process.pid == os.getpid() else "engine" if name.startswith("VLLM::") else "service"
        found[side] += times.user + times.system
    return found


def answered_within(replies: list[Reply], begin: float, end: float) -> float:
    """Requests served in a span of time; one that lies half in it counts half."""
    return sum(
        max(0.0, min(end, reply.begun + reply.total_s) - max(begin, reply.begun)) / reply.total_s for reply in replies
    )


def is_proper_refusal(reply: Reply) -> bool:
    """429 or 503, with Retry-After and the API's error object."""
    return (
        reply.status in (429, 503)
        and "retry-after" in reply.headers
        and set(json.loads(reply.body)["error"]) == {"message", "type", "param", "code"}
    )


@pytest.mark.parametrize("seconds", [10, pytest.param(60, marks=pytest.mark.slow)])
def test_ten_times_the_load(service: Stage, seconds: int) -> None:
    url = service.service.url
    load = Load(stream=True, fields={"max_tokens": TOKENS})
    _in_turn(url, load, 0, 3)  # warms every path
    calm = Phase.of(lambda: _at_once(url, load, 5))
    capacity = len(calm.replies) / calm.seconds
    memory = resident_mb(service)
    flood = Phase.of(lambda: paced(url, load, 10 * capacity, seconds))
    served = [reply for reply in flood.replies if not reply.failed]
    refused = [reply for reply in flood.replies if reply.status != HTTP_OK]
    usual = percentile([reply.first_s for reply in calm.replies], 0.99)
    begun = min(reply.begun for reply in flood.replies)
    goodput = answered_within(served, begun, begun + seconds) / seconds / capacity
    took = max(reply.begun + reply.total_s for reply in flood.replies) - begun
    whole = len(served) / took / capacity
    shares = f"Of all cores' time at the peak: {calm}; at ten times the load: {flood}."
    findings = [
        equal("answers that are neither served nor properly refused",
              len(flood.replies) - len(served) - sum(map(is_proper_refusal, refused)), 0),
        at_most("time to first token, p99, over the uncongested one",
                percentile([reply.first_s for reply in served], 0.99) / usual, 2, "x"),
        at_most("refused within, p99", percentile([reply.total_s for reply in refused], 0.99), 0.2),
        Finding(what="goodput of the peak, whole answers until the last", required=">= 90 %",
                measured=f"{100 * whole:.0f} %", met=whole >= 0.9, timed=True, reason="" if whole >= 0.9 else shares),
        Finding(what="goodput of the peak, parts of answers while the load lasts", required=">= 90 %",
                measured=f"{100 * goodput:.0f} %", met=goodput >= 0.9, timed=True,
                reason="" if goodput >= 0.9 else shares),
        at_most("memory grown", resident_mb(service) - memory, 50, "MB"),
    ]  # fmt: skip
    scale = (
        f"SmolLM2-135M, {10 * capacity:.1f} requests/s for {seconds} s onto {SLOTS} slots without a queue, "
        f"{len(served)} served, {len(refused)} refused"
    )
    conclude("O1", f"10 x overload for {seconds} s", scale, findings)


def _at_once(url: str, load: Load, requests: int) -> list[Reply]:
    """What as many clients as there are slots are answered, each its requests in turn."""
    with ThreadPoolExecutor(SLOTS) as pool:
        of_clients = pool.map(lambda client: _in_turn(url, load, client, requests), range(SLOTS))
        return [reply for replies in of_clients for reply in replies]


def _in_turn(url: str, load: Load, client: int, requests: int) -> list[Reply]:
    with httpx.Client(base_url=url, timeout=60) as http:
        return [ask(http, load.prompt(client, n), load) for n in range(requests)]


@pytest.mark.parametrize("cycles", CYCLES)
def test_clients_that_go_away(service: Stage, cycles: int) -> None:
    body = {"prompt": "Count:", "max_tokens": 400, "ignore_eos": True, "stream": True}
    freed: list[float] = []
    gone = 0
    look = percentile([_seconds(lambda: service.metric("unmask_requests_running")) for _ in range(LOOKS)], 0.5)
    with httpx.Client(base_url=service.service.url, timeout=60) as http:
        while gone < cycles:
            with http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code == 429:  # The slots of those before are not free yet.
                    continue
                assert response.status_code == HTTP_OK
                next(response.iter_raw())
            gone += 1
            if len(freed) < LOOKS:
                left = time.monotonic()
                wait_until(lambda: service.metric("unmask_requests_running") == 0, 10, every_s=0.01)
                freed.append(time.monotonic() - left - look)
    wait_until(lambda: service.metric("unmask_requests_running") == 0, 10)
    wait_until(lambda: service.metric("vllm:num_requests_running") == 0, 10)
    looked = f"A look through proxy and ingress takes {look:.3f} s at rest; nothing shorter can be seen."
    findings = [
        equal("slots left taken", service.metric("unmask_requests_running"), 0.0),
        equal("requests left in the engine", service.metric("vllm:num_requests_running"), 0.0),
        at_most("slot free again, median, one look included", percentile(freed, 0.5) + look, 0.1, reason=looked),
        at_most("slot free again, median, less a look at rest", percentile(freed, 0.5), 0.1),
    ]
    scale = f"one at a time; a look through proxy and ingress takes {look:.3f} s at rest"
    conclude("O2", f"{cycles} clients hang up after the first token", scale, findings)


def _seconds(what: Callable[[], object]) -> float:
    begun = time.monotonic()
    what()
    return time.monotonic() - begun


def test_a_slow_reader_holds_no_slot(service: Stage) -> None:
    where = urlsplit(service.service.url)
    body = json.dumps({"prompt": "Count:", "max_tokens": 32, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection((where.hostname, where.port)) as reader:
        reader.sendall(head.encode() + b"\r\n\r\n" + body)
        stopped, read = threading.Event(), bytearray()

        def trickle() -> None:
            while not stopped.wait(1.0):
                read.extend(reader.recv(1))

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            wait_until(lambda: service.metric("unmask_requests_running") == 1, 30, every_s=0.01)
            wait_until(lambda: service.metric("unmask_requests_running") == 0, 60)
            read_by_then = len(read)
        finally:
            stopped.set()
            thread.join()
    findings = [
        Finding(
            what="bytes read when the slot was free again",
            required="< 500 of an answer of thousands",
            measured=str(read_by_then),
            met=read_by_then < 500,
        )
    ]
    conclude("O3", "a client reads one byte a second", "one stream", findings)


BAD_BODIES = {
    "2,000 levels": b'{"messages": ' + b"[" * 2000 + b"]" * 2000 + b"}",
    "invalid UTF-8": b'{"messages": "\xff"}',
    "[]": b"[]",
    "NaN": b'{"prompt": "x", "temperature": NaN}',
    "a huge integer": b'{"prompt": "x", "seed": ' + b"9" * 100_000 + b"}",
    "3 MB": b" " * 3_000_000,
}


def test_bodies_that_are_no_requests(service: Stage) -> None:
    statuses, seconds, kept = {}, [], 0
    with httpx.Client(base_url=service.service.url, timeout=60) as http:
        for name, body in BAD_BODIES.items():
            for turn in range(10):
                headers = {"Content-Type": "application/json", "X-Request-Id": f"mine-{turn}"}
                begun = time.monotonic()
                response = http.post("/v1/completions", content=body, headers=headers)
                seconds.append(time.monotonic() - begun)
                statuses[name] = response.status_code
                kept += response.headers["x-request-id"] == f"mine-{turn}"
    findings = [
        equal("status codes", statuses, {name: 413 if name == "3 MB" else 400 for name in BAD_BODIES}),
        equal("answers with the client's own request id", kept, 10 * len(BAD_BODIES)),
        at_most("refused within, p99", percentile(seconds, 0.99), 0.05),
    ]
    conclude("O5", "bodies that are no requests", f"{', '.join(BAD_BODIES)}; 10 times each", findings)


def test_a_request_that_takes_too_long(service: Stage) -> None:
    body = {"prompt": "Count:", "max_tokens": 500, "ignore_eos": True}
    with ThreadPoolExecutor(SLOTS) as pool:
        begun = time.monotonic()
        [*responses] = pool.map(
            lambda _: httpx.post(f"{service.service.url}/v1/completions", json=body, timeout=60), range(SLOTS)
        )
        seconds = time.monotonic() - begun
    assert {response.status_code for response in responses} == {504}, responses
    wait_until(lambda: service.metric("vllm:num_requests_running") == 0, 10)
    findings = [
        equal("error code", responses[0].json()["error"]["code"], "deadline_exceeded"),
        at_most("answered after the deadline", seconds - DEADLINE_S, 0.5),
        equal("requests left in the engine", service.metric("vllm:num_requests_running"), 0.0),
    ]
    conclude("O4", f"requests beyond the deadline of {DEADLINE_S:g} s", f"{SLOTS} at once", findings)
