"""What a draft did for each request that is traced."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from unmask.pairing.request_numbers import TRACED

MAX_REQUESTS = 4096


@dataclass(slots=True, kw_only=True)
class DraftedRequest:
    """One request. Times are seconds since the epoch, of the first and the last step that it was in."""

    number: int
    begun_s: float
    ended_s: float
    steps: int = 0
    proposed_tokens: int = 0
    compute_s: float = 0.0
    """Of the steps that it was in, which other requests were in too."""


class RequestLog:
    """Filled by the engine's thread and emptied by another. Beyond `MAX_REQUESTS` no more are taken up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[int, DraftedRequest] = {}

    def note(self, numbers: np.ndarray, counts: np.ndarray, begun_s: float, ended_s: float) -> None:
        """A step has been answered.

        Args:
            numbers: uint64 [R] of its requests.
            counts: tokens proposed for each [R].
            begun_s, ended_s: when.
        """
        traced = np.flatnonzero(numbers >= TRACED)
        if not len(traced):
            return
        with self._lock:
            for number, count in zip(numbers[traced].tolist(), counts[traced].tolist(), strict=True):
                request = self._requests.get(number)
                if request is None:
                    if len(self._requests) >= MAX_REQUESTS:
                        continue
                    request = DraftedRequest(number=number, begun_s=begun_s, ended_s=ended_s)
                    self._requests[number] = request
                request.ended_s = ended_s
                request.steps += 1
                request.proposed_tokens += count
                request.compute_s += ended_s - begun_s

    def take(self, before_s: float) -> list[DraftedRequest]:
        """Remove and return the requests whose last step was before a time: they are taken to have ended."""
        with self._lock:
            ended = [request for request in self._requests.values() if request.ended_s < before_s]
            for request in ended:
                del self._requests[request.number]
        return ended
