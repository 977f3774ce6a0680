"""How threads look at shared memory until something changes."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

_PR_SET_TIMERSLACK = 29
_MANY_CORES = 8
_LONG_S = 0.05
"""A wait of this length is a pause, and tells nothing of the next."""
_LATE_S = 1e-3
SHORT_REST_S = 2e-5
"""Between two looks while something is due. A thread that never rested would keep others from running."""


def sharpen_timer() -> None:
    """Let short sleeps of the calling thread end on time: Linux adds up to 50 microseconds otherwise."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1), 0, 0, 0)


def usable_cores(limit_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """Cores that this process may use, by its affinity and by the limit of its container."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = limit_file.read_text().split()
        return min(cores, int(quota) / int(period))
    except (OSError, ValueError):
        # No cgroup, none of the second version, or "max".
        return cores


class Attention:
    """Waits for what comes about as late as it did before: rests at first, and looks without rest when it is due.

    Looking without rest takes a core, so it is done for a part of the time only, and where there are many.

    Args:
        rest_s: between two looks.
        spins: whether to look without rest when it is due; None where the process may use many cores.
    """

    def __init__(self, rest_s: float = SHORT_REST_S, *, spins: bool | None = False) -> None:
        self._rest_s = rest_s
        self._spins = usable_cores() >= _MANY_CORES if spins is None else spins
        self._usual_s = 0.0
        self._begun = 0.0

    def begin(self) -> None:
        """The wait begins."""
        self._begun = time.monotonic()

    @property
    def is_close(self) -> bool:
        """Whether to go on looking, in place of being woken when it comes."""
        return self._spins and time.monotonic() - self._begun < 2 * self._usual_s + _LATE_S

    def rest(self) -> None:
        """Between two looks."""
        if not self._spins:
            time.sleep(self._rest_s)
            return
        waited = time.monotonic() - self._begun
        soon = 0.8 * self._usual_s - 1e-4
        if waited < soon:
            time.sleep(min(soon - waited, 1e-3))
        elif waited < 2 * self._usual_s + _LATE_S:
            # Lets other threads run, of this process too; a sleep of no time would take fifty microseconds.
            os.sched_yield()
        else:
            # What is very late is looked for at rest.
            time.sleep(self._rest_s)

    def came(self) -> None:
        """It has come."""
        waited = time.monotonic() - self._begun
        if waited < _LONG_S:
            self._usual_s += 0.2 * (waited - self._usual_s)
