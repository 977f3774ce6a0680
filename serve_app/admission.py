"""How much work the service takes on: a bounded number of choices running, a bounded number waiting, keys in turn."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from serve_app import errors


@dataclass(slots=True, eq=False)
class _Waiter:
    choices: int
    arrival: int
    granted: asyncio.Future[None]


@dataclass(slots=True)
class _Line:
    """The waiters of one key, in order of arrival."""

    waiters: deque[_Waiter] = field(default_factory=deque)

    @property
    def choices(self) -> int:
        return sum(waiter.choices for waiter in self.waiters)


class Admission:
    """Slots for running choices. Keys take turns, and each key's requests are served in order of arrival.

    A free slot goes to the key with the fewest running choices, among equals to the one that was served least recently.
    When the queue is full, a newcomer takes the place of the last waiter of the key that waits for most, if its own key
    waits for less: a flood is refused, not those beside it.

    Args:
        slots: choices that run at the same time, and the most that one request may ask for.
        queue: choices that may wait for a slot.
        retry_after_s: told to refused clients.
    """

    def __init__(self, slots: int, queue: int, *, retry_after_s: float = 1.0) -> None:
        self.slots = self._most = slots
        self.queue = queue
        self.waiting = 0
        self._retry_after_s = retry_after_s
        self._running: Counter[str] = Counter()
        self._lines: dict[str, _Line] = {}
        self._served: dict[str, int] = {}
        self._clock = 0
        self.closed = False
        """Whether new requests are refused because the service is going down."""
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def running(self) -> int:
        """Choices that hold a slot."""
        return self._running.total()

    def resize(self, slots: int) -> None:
        """From now on, run this many choices at the same time; those that run are not ended."""
        self.slots = slots
        self._advance()

    @asynccontextmanager
    async def admit(self, choices: int, key: str = "") -> AsyncIterator[None]:
        """Hold slots for the choices of one request.

        Args:
            key: whose request it is; requests without a key share one.

        Raises:
            ApiError: 400 when the request could never be admitted, 429 when the queue is full, 503 when draining.
        """
        await self._enter(choices, key)
        try:
            yield
        finally:
            self._leave(choices, key)

    async def drain(self) -> None:
        """Refuse new requests from now on, and wait until those admitted or waiting are done."""
        self.closed = True
        await self._idle.wait()

    def check(self, choices: int, key: str = "") -> None:
        """Raise what `admit` would raise at this moment, before any work goes into the request."""
        if self.closed:
            raise errors.unavailable("the service is shutting down")
        if choices > self._most:
            raise errors.invalid(f"asks for {choices} choices; this service runs at most {self._most} at a time", "n")
        if not self._has_room(choices):
            self._in_the_way(choices, key)

    def _has_room(self, choices: int) -> bool:
        return not self._lines and self.running + choices <= self.slots

    async def _enter(self, choices: int, key: str) -> None:
        self.check(choices, key)
        if self._has_room(choices):
            self._take(choices, key)
            return
        self._make_room(choices, key)
        await self._wait(choices, key)

    def _make_room(self, choices: int, key: str) -> None:
        """Let go of those who wait in the newcomer's place. Raises ApiError: 429."""
        for last, line in self._in_the_way(choices, key):
            self._forget(last, line)
            if not last.granted.cancelled():
                last.granted.set_exception(errors.overloaded(self._retry_after_s))

    def _in_the_way(self, choices: int, key: str) -> list[tuple[_Waiter, str]]:
        """The last waiters of the longest lines, as long as the newcomer's is shorter. Raises ApiError: 429."""
        own = self._lines[key].choices if key in self._lines else 0
        lengths = {name: line.choices for name, line in self._lines.items()}
        ends = {name: len(line.waiters) for name, line in self._lines.items()}
        excess, found = self.waiting + choices - self.queue, []
        while excess > 0:
            longest = max(lengths, key=lengths.__getitem__, default=key)
            if longest == key or lengths[longest] <= own + choices:
                raise errors.overloaded(self._retry_after_s)
            ends[longest] -= 1
            last = self._lines[longest].waiters[ends[longest]]
            lengths[longest] -= last.choices
            excess -= last.choices
            found.append((last, longest))
        return found

    async def _wait(self, choices: int, key: str) -> None:
        waiter = _Waiter(choices, self._tick(), asyncio.get_running_loop().create_future())
        self._lines.setdefault(key, _Line()).waiters.append(waiter)
        self.waiting += choices
        self._idle.clear()
        try:
            await waiter.granted
        except asyncio.CancelledError:
            if not waiter.granted.cancelled() and waiter.granted.exception() is None:
                self._leave(choices, key)
            elif key in self._lines and waiter in self._lines[key].waiters:
                self._forget(waiter, key)
                self._advance()
            raise

    def _forget(self, waiter: _Waiter, key: str) -> None:
        self._lines[key].waiters.remove(waiter)
        self.waiting -= waiter.choices
        if not self._lines[key].waiters:
            del self._lines[key]

    def _take(self, choices: int, key: str) -> None:
        self._running[key] += choices
        self._served[key] = self._tick()
        self._idle.clear()

    def _leave(self, choices: int, key: str) -> None:
        self._running[key] -= choices
        if not self._running[key]:
            del self._running[key]
        self._advance()

    def _advance(self) -> None:
        """Grant slots to the keys in turn while they suffice; the one whose turn it is is never overtaken."""
        while self._lines:
            key = min(self._lines, key=self._turn)
            waiter = self._lines[key].waiters[0]
            if self.running + waiter.choices > self.slots:
                break
            self._forget(waiter, key)
            # A waiter that is being cancelled has not had its turn to leave the line yet.
            if not waiter.granted.cancelled():
                self._take(waiter.choices, key)
                waiter.granted.set_result(None)
        if not self._running and not self._lines:
            self._served.clear()
            self._idle.set()

    def _turn(self, key: str) -> tuple[int, int, int]:
        return self._running[key], self._served.get(key, -1), self._lines[key].waiters[0].arrival

    def _tick(self) -> int:
        self._clock += 1
        return self._clock
