"""Clients that ask a service again and again, and what each of them saw."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

HTTP_OK = 200


@dataclass(slots=True, kw_only=True)
class Reply:
    """One request as its client saw it. Times are in seconds."""

    prompt: str
    status: int = 0
    text: str = ""
    tokens: int = 0
    error: str = ""
    complete: bool = False
    """The answer came to its proper end: a whole body, or a stream with `[DONE]`."""
    begun: float = 0.0
    first_s: float = 0.0
    """Until the first token of a stream; until the answer otherwise."""
    total_s: float = 0.0
    longest_gap_s: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    """Of a refusal."""

    @property
    def failed(self) -> bool:
        """Whether the client got less than it asked for."""
        return self.status != HTTP_OK or not self.complete or bool(self.error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`clients` threads, each asking `requests` times in turn, or until `until` is set."""

    clients: int = 8
    requests: int = 10
    stream: bool = False
    half: bool = False
    """Every other client streams, whatever `stream` says."""
    prompts: int = 16
    fields: dict[str, Any] = field(default_factory=dict)

    def prompt(self, client: int, number: int) -> str:
        """Which prompt a request has: clients go through all of them, each from another one on."""
        return f"Item {(client * 5 + number) % self.prompts}:"

    def of_client(self, client: int) -> Load:
        """What one of the clients does."""
        return replace(self, stream=client % 2 == 0) if self.half else self

    def all_prompts(self) -> list[str]:
        """Every prompt once."""
        return [f"Item {number}:" for number in range(self.prompts)]


@dataclass(slots=True)
class Running:
    """A load that has been started."""

    pool: ThreadPoolExecutor
    work: list[Any]
    replies: list[Reply]
    stopping: threading.Event

    def wait(self) -> list[Reply]:
        """All replies, when every client is done."""
        for one in self.work:
            one.result()
        self.pool.shutdown()
        return self.replies

    def stop(self) -> list[Reply]:
        """End after the requests that are under way."""
        self.stopping.set()
        return self.wait()


def start(url: str, load: Load, on_chunk: Callable[[], None] = lambda: None, timeout_s: float = 120) -> Running:
    """Start the clients of a load."""
    replies: list[Reply] = []
    stopping = threading.Event()

    def run(client: int) -> None:
        with httpx.Client(base_url=url, timeout=timeout_s) as http:
            for number in range(load.requests):
                if stopping.is_set():
                    return
                replies.append(ask(http, load.prompt(client, number), load.of_client(client), on_chunk))

    pool = ThreadPoolExecutor(load.clients)
    return Running(pool, [pool.submit(run, client) for client in range(load.clients)], replies, stopping)


def paced(url: str, load: Load, rate: float, seconds: float) -> list[Reply]:
    """Replies to requests that begin at a steady rate, whatever becomes of those before."""
    replies: list[Reply] = []
    number = int(rate * seconds)
    limits = httpx.Limits(max_connections=200)
    with httpx.Client(base_url=url, timeout=60, limits=limits) as http, ThreadPoolExecutor(64) as pool:
        begun = time.monotonic()
        for n in range(number):
            time.sleep(max(0.0, begun + n / rate - time.monotonic()))
            pool.submit(lambda n=n: replies.append(ask(http, load.prompt(0, n), load)))
    return replies


def undisturbed(url: str, load: Load) -> dict[str, tuple[str, int]]:
    """Text and number of tokens of every prompt, one after another."""
    with httpx.Client(base_url=url, timeout=120) as http:
        replies = [ask(http, prompt, load) for prompt in load.all_prompts()]
    assert not any(reply.failed for reply in replies), replies
    return {reply.prompt: (reply.text, reply.tokens) for reply in replies}


def ask(http: httpx.Client, prompt: str, load: Load, on_chunk: Callable[[], None] = lambda: None) -> Reply:
    """One request; a failure of any kind is in the reply."""
    reply = Reply(prompt=prompt, begun=time.monotonic())
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 16, "ignore_eos": True, **load.fields}
    try:
        if load.stream:
            _stream(http, body, reply, on_chunk)
        else:
            _whole(http, body, reply)
    except httpx.HTTPError as error:
        reply.error = type(error).__name__
    reply.total_s = time.monotonic() - reply.begun
    reply.first_s = reply.first_s or reply.total_s
    return reply


def _whole(http: httpx.Client, body: dict[str, Any], reply: Reply) -> None:
    response = http.post("/v1/completions", json=body)
    reply.status, reply.headers = response.status_code, dict(response.headers)
    if response.status_code != HTTP_OK:
        reply.body = response.content
        return
    answer = response.json()
    reply.text, reply.tokens = answer["choices"][0]["text"], answer["usage"]["completion_tokens"]
    reply.complete = True


def _stream(http: httpx.Client, body: dict[str, Any], reply: Reply, on_chunk: Callable[[], None]) -> None:
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    with http.stream("POST", "/v1/completions", json=body) as response:
        reply.status, reply.headers = response.status_code, dict(response.headers)
        if response.status_code != HTTP_OK:
            reply.body = response.read()
            return
        last = time.monotonic()
        for event in _events(response):
            now = time.monotonic()
            reply.first_s = reply.first_s or now - reply.begun
            reply.longest_gap_s, last = max(reply.longest_gap_s, now - last), now
            _take_event(event, reply)
            on_chunk()


def _events(response: httpx.Response) -> Iterator[str]:
    """Payloads of server-sent events. `iter_lines` would also break lines at separators inside the text."""
    pending = b""
    for data in response.iter_raw():
        *whole, pending = (pending + data).split(b"\n\n")
        for event in whole:
            yield event.removeprefix(b"data: ").decode()


def _take_event(event: str, reply: Reply) -> None:
    if event == "[DONE]":
        reply.complete = True
        return
    chunk = json.loads(event)
    if "error" in chunk:
        reply.error = f"{chunk['error']['status']} {chunk['error']['code']}"
        return
    reply.text += "".join(choice["text"] for choice in chunk["choices"])
    if chunk.get("usage"):
        reply.tokens = chunk["usage"]["completion_tokens"]


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
