"""What else goes on on a machine while a benchmark runs: its speed, and the time that others have of its cores."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import psutil

from tests.fault.load import Reply, percentile

EVERY_S = 2.0
ROUNDS = 40_000
"""Some milliseconds of one core."""
DISTURBED = 0.05
"""Share of all cores' time that others have in a disturbed interval."""
AFTER_S = 10.0
"""What a disturbance has left waiting is worked off by then."""


class Probe:
    """Measures the machine beside the service: a fixed piece of work every two seconds, time stolen by others, and what
    all that serves takes of the cores.

    Args:
        served_s: seconds of a core that serving has had so far.
    """

    def __init__(self, served_s: Callable[[], float]) -> None:
        self.disturbances: list[tuple[float, float]] = []
        """From when until when others had the cores; monotonic seconds."""
        self._seconds: list[float] = []
        self._stolen, self._served_s, self._ended = psutil.cpu_times(), served_s, threading.Event()
        self._served = served_s()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self) -> dict[str, float]:
        """Milliseconds that the piece of work took of a core, the share of all cores' time that others had, and seconds
        of a core that serving took."""
        self._ended.set()
        self._thread.join()
        return {
            "work_ms_p50": round(1000 * percentile(self._seconds, 0.5), 3),
            "work_ms_p90": round(1000 * percentile(self._seconds, 0.9), 3),
            "stolen": round(_stolen(self._stolen, psutil.cpu_times()), 4),
            "disturbed_s": round(sum(end - start for start, end in self.disturbances), 1),
            "served_s": round(self._served_s() - self._served, 2),
        }

    def _run(self) -> None:
        at, before = time.monotonic(), psutil.cpu_times()
        ended = False
        while not ended:
            begun = time.thread_time()
            for _ in range(ROUNDS):
                pass
            self._seconds.append(time.thread_time() - begun)
            ended = self._ended.wait(EVERY_S)
            now, after = time.monotonic(), psutil.cpu_times()
            if _stolen(before, after) > DISTURBED:
                self.disturbances.append((at, now))
            at, before = now, after


def undisturbed(replies: Sequence[Reply], disturbances: Sequence[tuple[float, float]]) -> list[Reply]:
    """Replies during which, and shortly before which, nobody else had the cores."""
    return [
        reply
        for reply in replies
        if not any(start < reply.begun + reply.total_s and reply.begun < end + AFTER_S for start, end in disturbances)
    ]


def _stolen(before: Sequence[float], after: Sequence[float]) -> float:
    """Share of all cores' time between two readings of `psutil.cpu_times`."""
    passed = sum(after) - sum(before)
    return (after.steal - before.steal) / passed if passed else 0.0
