"""How many target and draft replicas there should be, each decided from its own load.

A replica is added when the load is more than `HIGH` of what the replicas carry, and given back when the fewer would
carry it at less than `LOW`. Load that moves between these bounds changes nothing; Serve's delays come on top.

Serve's controller loads this module by value, so it imports nothing of the project.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

HIGH, LOW = 0.8, 0.5
"""Shares of a replica's capacity."""


def decide(current: int, load: float, least: int, most: int) -> int:
    """The number of replicas for a load.

    Args:
        current: replicas there are, or will be when those that start have started.
        load: of all replicas together, in units of what one can carry.
    """
    grown, shrunk = math.ceil(load / HIGH), math.ceil(load / LOW)
    wanted = grown if grown > current else min(current, shrunk)
    return max(least, min(most, wanted))


class TargetPolicy:
    """Scales the target by the requests that run and wait, and by the tokens that they get.

    Args:
        requests: that one replica runs at the same time.
        tokens_per_second: that one replica is to generate at most; None looks at requests alone.
    """

    def __init__(self, requests: int, tokens_per_second: float | None = None) -> None:
        self._requests = requests
        self._tokens_per_second = tokens_per_second

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas for Serve's `AutoscalingContext`."""
        load = context.total_num_requests / self._requests
        if self._tokens_per_second is not None:
            load = max(load, _total(context, "tokens_per_second") / self._tokens_per_second)
        return _decide(context, load), {}


class DraftPolicy:
    """Scales the draft by the time that its engines compute: its requests do not pass through Serve."""

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas for Serve's `AutoscalingContext`."""
        return _decide(context, _total(context, "busy")), {}


class Rate:
    """Turns a counter into its rise per second between two looks at it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: tuple[float, float] | None = None

    def of(self, count: float) -> float:
        """Rise per second since the last call; 0 at the first."""
        now, before = self._clock(), self._last
        self._last = (now, count)
        if before is None or now <= before[0]:
            return 0.0
        return (count - before[1]) / (now - before[0])


def _decide(context: Any, load: float) -> int:
    return decide(
        context.target_num_replicas,
        load,
        context.capacity_adjusted_min_replicas,
        context.capacity_adjusted_max_replicas,
    )


def _total(context: Any, name: str) -> float:
    """A metric that replicas report, summed over them; those that start have none yet."""
    return sum((context.aggregated_metrics or {}).get(name, {}).values())
