"""Signs of life of a generation, for a driver that sees no row and few tasks: one file that all actors touch."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

_NAME = "heartbeat"
_LOOK_S = 5.0


class Heartbeat:
    """Says now and then that a row has been finished, or that a shard or a part of one has been begun.

    How often something can be begun is bounded, so that engines that only die fall silent in the end.

    Args:
        directory: the run's `trajectories` folder.
        every_s: least seconds between two beats.
    """

    def __init__(self, directory: Path, every_s: float) -> None:
        self._path, self._every_s = directory / _NAME, every_s
        self._due = time.monotonic()

    def beat(self) -> None:
        """Touch the file if that is due. Raises OSError if the store fails."""
        if (now := time.monotonic()) >= self._due:
            self._path.touch()
            self._due = now + self._every_s


class Watch:
    """Listens to the actors of a run.

    Args:
        directory: the run's `trajectories` folder.
        limit_s: silence beyond which nothing is expected any more.
        clock: gives seconds.
    """

    def __init__(self, directory: Path, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_s = limit_s
        self._path, self._clock = directory / _NAME, clock
        self._looked = self._heard = clock()
        self._seen = self._touched()

    def is_silent(self) -> bool:
        """Whether no actor has been heard within the limit. Cheap enough to be asked all the time."""
        now = self._clock()
        if now - self._looked >= min(_LOOK_S, self.limit_s / 4):
            self._looked = now
            if (seen := self._touched()) != self._seen:
                self._seen, self._heard = seen, now
        return now - self._heard > self.limit_s

    def _touched(self) -> int:
        """A change is what counts: clocks of nodes and store need not agree."""
        try:
            return self._path.stat().st_mtime_ns
        except OSError:
            # Not there yet, or the store does not answer: nothing is heard, and what that means the limit says.
            return 0
