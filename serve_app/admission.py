"""How much work the service takes on: a bounded number of choices running, a bounded number waiting."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from serve_app import errors


class Admission:
    """Slots for running choices, handed out in order of arrival.

    Args:
        slots: choices that run at the same time.
        queue: choices that may wait for a slot; one more is refused at once.
        retry_after_s: told to refused clients.
    """

    def __init__(self, slots: int, queue: int, *, retry_after_s: float = 1.0) -> None:
        self.slots = slots
        self.queue = queue
        self.running = 0
        self.waiting = 0
        self._retry_after_s = retry_after_s
        self._line: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    @asynccontextmanager
    async def admit(self, choices: int) -> AsyncIterator[None]:
        """Hold slots for the choices of one request.

        Raises:
            ApiError: 400 when the request could never be admitted, 429 when the queue is full, 503 when draining.
        """
        await self._enter(choices)
        try:
            yield
        finally:
            self._leave(choices)

    async def drain(self) -> None:
        """Refuse new requests from now on, and wait until those admitted or waiting are done."""
        self._closed = True
        await self._idle.wait()

    async def _enter(self, choices: int) -> None:
        if self._closed:
            raise errors.unavailable("the service is shutting down")
        if choices > self.slots:
            raise errors.invalid(f"asks for {choices} choices; this service runs at most {self.slots} at a time", "n")
        if not self._line and self.running + choices <= self.slots:
            self._take(choices)
            return
        if self.waiting + choices > self.queue:
            raise errors.overloaded(self._retry_after_s)
        await self._wait(choices)

    async def _wait(self, choices: int) -> None:
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (choices, granted)
        self._line.append(entry)
        self.waiting += choices
        self._idle.clear()
        try:
            await granted
        except asyncio.CancelledError:
            if not granted.cancelled():
                self._leave(choices)
            elif entry in self._line:
                self._line.remove(entry)
                self.waiting -= choices
                self._advance()
            raise

    def _take(self, choices: int) -> None:
        self.running += choices
        self._idle.clear()

    def _leave(self, choices: int) -> None:
        self.running -= choices
        self._advance()

    def _advance(self) -> None:
        """Grant slots to the head of the line while they suffice; nobody overtakes."""
        while self._line and self.running + self._line[0][0] <= self.slots:
            choices, granted = self._line.popleft()
            self.waiting -= choices
            # A waiter that is being cancelled has not had its turn to leave the line yet.
            if not granted.cancelled():
                self._take(choices)
                granted.set_result(None)
        if not self.running and not self._line:
            self._idle.set()
