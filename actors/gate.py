"""A gate that many pass together or one passes alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    """Lets shards share an engine, and gives it to one shard alone where a crash must be blamed on one row.

    One that waits to be alone holds back newcomers, so that it is not starved.
    """

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._inside = 0
        self._alone = 0

    @asynccontextmanager
    async def together(self) -> AsyncIterator[None]:
        """Enter when nobody is, or waits to be, alone."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._alone)
            self._inside += 1
        try:
            yield
        finally:
            await self._leave()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Enter when nobody is inside, and keep everybody out."""
        async with self._changed:
            self._alone += 1
            await self._changed.wait_for(lambda: not self._inside)
            self._inside += 1
        try:
            yield
        finally:
            self._alone -= 1
            await self._leave()

    async def _leave(self) -> None:
        async with self._changed:
            self._inside -= 1
            self._changed.notify_all()
