"""Where the time of a target's steps goes, measured on its stream without waiting for it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

PARTS = ("verify", "late_wait", "features", "wait", "reply")
"""Of a step with a remote draft: the target's forward and sampling, the wait for the other half's tokens where halves
take turns, projection and packing, from the doorbell to the reply, and the tokens' way in."""

Moment = Callable[[], float]
"""Milliseconds since an arbitrary time, once it is known."""


class StepTimes:
    """Collects the marks of `MailboxTarget.propose` for consecutive steps.

    Args:
        device: whose stream is meant; on a CPU the clock is read.
        wanted: batch size whose steps count.
    """

    def __init__(self, device: torch.device, wanted: int) -> None:
        self._on_gpu = device.type == "cuda"
        self.wanted = wanted
        self._steps: list[dict[str, torch.cuda.Event | float]] = []

    def begin(self, batch_size: int) -> None:
        """A step is about to be proposed for."""
        self._steps.append({})
        if batch_size == self.wanted:
            self("start")

    def __call__(self, name: str) -> None:
        """A mark of the current step."""
        if not self._on_gpu:
            self._steps[-1][name] = 1000 * time.perf_counter()
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._steps[-1][name] = event

    def summary(self) -> dict[str, float]:
        """Medians in ms of the parts and of `period`, from the start of a step to the start of the next; {} if no two
        consecutive full steps were seen. Waits for the stream."""
        if self._on_gpu:
            torch.cuda.synchronize()
        parts: dict[str, list[float]] = {}
        for step, following in zip(self._steps, self._steps[1:], strict=False):
            if not {"start", "end"} <= step.keys() or "start" not in following:
                continue
            spans = {"period": (step["start"], following["start"]), "verify": (step["end"], following["start"])}
            if "sent" in step:
                spans["late_wait"] = step["start"], step["collected"]
                spans["features"] = step["collected"], step["sent"]
            if "taken" in step:
                spans["wait"] = step["sent"], step["answered"]
                spans["reply"] = step["answered"], step["end"]
            elif "sent" not in step:
                spans["draft"] = step["start"], step["end"]
            for name, (a, b) in spans.items():
                parts.setdefault(name, []).append(_between(a, b))
        return {name: statistics.median(values) for name, values in parts.items()}


class _NoTimes:
    """Nobody measures."""

    def begin(self, batch_size: int) -> None:
        """See `StepTimes.begin`."""

    def __call__(self, name: str) -> None:
        """A mark that nobody takes."""


NO_TIMES = _NoTimes()


def _between(first: torch.cuda.Event | float, last: torch.cuda.Event | float) -> float:
    if isinstance(first, float) or isinstance(last, float):
        return float(last) - float(first)  # type: ignore[arg-type]
    return first.elapsed_time(last)
