"""An engine that hangs looks alive: its process runs, and nothing comes of it."""

from __future__ import annotations

import time
from collections.abc import Callable


class Stall:
    """For how long nothing has come of an engine that has work."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._steps = -1
        self._since = clock()

    def seconds(self, steps: int, running: int) -> float:
        """Seconds without a step.

        Args:
            steps: that the engine has made so far.
            running: requests that wait for one; without any, no time is counted.
        """
        now = self._clock()
        if steps != self._steps or not running:
            self._steps, self._since = steps, now
        return now - self._since
