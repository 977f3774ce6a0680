"""Streams whose client does not read, or goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from serve_app.streaming import EventStream


class Client:
    """Takes a few messages, then none."""

    def __init__(self, takes: int) -> None:
        self.takes = takes
        self.taken: list[dict[str, Any]] = []
        self.gone = asyncio.Event()

    async def send(self, message: dict[str, Any]) -> None:
        if len(self.taken) >= self.takes:
            await asyncio.Event().wait()
        self.taken.append(message)

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}


async def events(count: int) -> AsyncIterator[str]:
    for number in range(count):
        yield str(number)


@pytest.mark.parametrize("goes", [False, True])
async def test_a_client_that_takes_nothing_more_is_let_go(goes: bool) -> None:
    closed = asyncio.Event()

    async def close() -> None:
        closed.set()

    client = Client(takes=3)
    stream = EventStream(events(100), close=close, write_timeout_s=30.0 if goes else 0.05)
    serving = asyncio.create_task(stream({"type": "http"}, client.receive, client.send))
    await asyncio.sleep(0.02)
    assert not serving.done()
    if goes:
        client.gone.set()
    await asyncio.wait_for(serving, 5)
    assert closed.is_set()
    assert len(client.taken) == 3


async def test_a_stream_is_sent_to_its_end_and_closed() -> None:
    closed = asyncio.Event()

    async def close() -> None:
        closed.set()

    client = Client(takes=1000)
    await EventStream(events(3), close=close, write_timeout_s=1.0)({"type": "http"}, client.receive, client.send)
    bodies = [message["body"] for message in client.taken[1:]]
    assert bodies == [b"data: 0\n\n", b"data: 1\n\n", b"data: 2\n\n", b""]
    assert not client.taken[-1]["more_body"]
    assert closed.is_set()
