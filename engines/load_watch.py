"""K by load on the V2 runner: what steps cost and what is accepted, measured without waiting for the GPU.

A sampled step leaves events on the stream and a copy of its accepted counts; they are read some steps later, when the
stream has long passed them. `KController` turns them into a table of K by batch size, for scheduler and draft alike.
What lies between the proposals of one step and those of the next is laid to the charge of the next one's rows, for it
is these that the target verified in it.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unmask.pairing.policy import KController

_EVERY = 4
"""Steps between two samples."""
_TABLE_EVERY = 32
"""Samples between two tables."""
_MOST_PENDING = 16
_MARGIN = 1.03
"""A K is given up for another that promises this much more."""
_TRIED = 16.0
"""Measurements of a row count after which its cost is known."""
_TRIALS = 2
"""How often a K is tried, at most, for the sizes of a span."""
_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)

Mark = torch.cuda.Event | float


@dataclass(slots=True)
class _Sample:
    batch_size: int
    verified: int
    drafted: int
    sampled: Tensor
    marks: list[Mark]
    """The proposals of the step before were there, this one's rows are verified, its own proposals are there."""


class LoadWatch:
    """All calls from the thread that drives the stream.

    Args:
        ks: that graphs exist for.
        table: K for each batch size 0 .. max_num_seqs, as the engine was configured.
        device: of the stream; on a CPU the clock is read.
    """

    def __init__(self, ks: Sequence[int], table: Sequence[int], device: torch.device) -> None:
        self.controller = KController(sorted(set(ks)))
        self.table = list(table)
        self._on_gpu = device.type == "cuda"
        self._steps = self._samples = 0
        most = len(self.table) - 1
        self._sizes = [*(n for n in _SIZES if n < most), most]
        self._seen: set[int] = set()
        self._trials: Counter[tuple[int, int]] = Counter()
        self._answered: Mark | None = None
        self._open: _Sample | None = None
        self._pending: deque[_Sample] = deque()

    def begin(self, num_scheduled: np.ndarray, k: int, num_sampled: Tensor) -> None:
        """A step is about to be proposed for.

        Args:
            num_scheduled: tokens of each request that the target has run [R].
            k: that will be drafted for each.
            num_sampled: of them, those that were kept, and the new one [R].
        """
        self._steps += 1
        before, self._answered = self._answered, None
        batch_size, verified = len(num_scheduled), int(num_scheduled[0]) - 1
        # Steps that hold prompts cost what no K can change.
        is_plain = verified in self.controller.ks and bool((num_scheduled == num_scheduled[0]).all())
        if before is None or not is_plain or len(self._pending) >= _MOST_PENDING:
            return
        copied = num_sampled[:batch_size].to("cpu", non_blocking=self._on_gpu, copy=True)
        self._open = _Sample(batch_size, verified, k, copied, [before, self._mark()])

    def answered(self) -> None:
        """The proposals of that step are there."""
        sample, self._open = self._open, None
        if sample is not None:
            sample.marks.append(self._mark())
            self._pending.append(sample)
        if (self._steps + 1) % _EVERY == 0:
            self._answered = self._mark()

    def skip(self) -> None:
        """A step is not asked about: what lies between two that are says nothing."""
        self._open = self._answered = None

    def poll(self) -> list[int] | None:
        """Take in what has been measured; the new table of K by batch size, if there is one."""
        while self._pending and self._is_past(self._pending[0].marks[-1]):
            self._learn(self._pending.popleft())
            self._samples += 1
            if self._samples % _TABLE_EVERY == 0:
                return self._new_table()
        return None

    def _learn(self, sample: _Sample) -> None:
        before, begun, answered = sample.marks
        controller, n = self.controller, sample.batch_size
        self._seen.add(n)
        controller.observe_cost("draft", n * (sample.drafted + 1), _seconds(begun, answered))
        controller.observe_cost("verify", n * (sample.verified + 1), _seconds(before, begun))
        if sample.verified:
            accepted = (sample.sampled - 1).clamp(0, sample.verified).tolist()
            controller.observe_acceptance([sample.verified] * n, accepted)

    def _new_table(self) -> list[int] | None:
        """The best K for the batch sizes that were seen; a K stays while none is clearly better. Before it does, the
        next larger one is tried until its cost is known: nobody measures what is never chosen."""
        ks, table = self.controller.ks.tolist(), list(self.table)
        for first, size in itertools.pairwise([0, *self._sizes]):
            seen = [n for n in self._seen if first < n <= size]
            if not seen:
                continue
            kept = self.table[size]
            rates = self.controller.rates(size)
            best = ks[int(rates.argmax())]
            if kept in ks and rates.max() <= _MARGIN * rates[ks.index(kept)]:
                best = self._on_trial(kept, max(seen), size) or kept
            table[first + 1 : size + 1] = [best] * (size - first)
        self._seen.clear()
        if table == self.table:
            return None
        self.table = table
        return table

    def _on_trial(self, kept: int, batch_size: int, size: int) -> int | None:
        """The next larger K, if little is known of what it costs."""
        larger = next((int(k) for k in self.controller.ks if k > kept), None)
        if larger is None or self.controller.costs["verify"].evidence(batch_size * (larger + 1)) >= _TRIED:
            return None
        lengths = self.controller.acceptance.lengths()
        if lengths[larger] <= _MARGIN * lengths[kept]:
            # Not even if its rows cost nothing.
            return None
        self._trials[larger, size] += 1
        return larger if self._trials[larger, size] <= _TRIALS else None

    def _mark(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def _is_past(mark: Mark) -> bool:
        return isinstance(mark, float) or mark.query()


def _seconds(first: Mark, last: Mark) -> float:
    if isinstance(first, float) or isinstance(last, float):
        return float(last) - float(first)  # type: ignore[arg-type]
    return first.elapsed_time(last) / 1000
