"""How many tokens to draft: one controller for the scheduler's K and the draft's row count.

A step of n requests yields n * tau(K) tokens and costs the target's forward over n * (K + 1) rows plus the exchange
with the draft over as many. Under load rows cost time, so that the K with the highest rate falls; a draft that is
often right raises it. Costs and acceptance are moving estimates of what the steps themselves show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

Part = Literal["verify", "draft"]

_BUCKETS_PER_OCTAVE = 4
_COST_WEIGHT = 0.1
_MAX_COST_EVIDENCE = 32.0
_OUTLIER = 4.0
"""A pause of the host is no property of the row count: a cost counts at most this many times the estimate, the first of
a bucket at most this many times what its neighbours make likely."""
_ACCEPTANCE_DECAY = 0.98
_PRIOR_ACCEPTANCE = 0.7
_PRIOR_EVIDENCE = 4.0
_MAX_CHANCE = 0.9
"""Asked of a drafted row at most, however dear the target's rows seem."""


class CostCurve:
    """Seconds that one part of a step takes, by its rows.

    Measurements are averaged in buckets of nearly equal row counts and read as a non-decreasing curve. Beyond the
    measured range half the cost is taken to be fixed: hopeful enough that a K outside it is tried, and then measured.
    """

    def __init__(self) -> None:
        self._rows: dict[int, float] = {}
        self._seconds: dict[int, float] = {}
        self._evidence: dict[int, float] = {}

    def observe(self, rows: int, seconds: float) -> None:
        """Take in one measurement of at least one row."""
        bucket = _bucket(rows)
        if bucket not in self._rows:
            likely = self.seconds(np.array([rows]))
            if likely is not None:
                seconds = min(seconds, _OUTLIER * float(likely[0]))
            self._rows[bucket], self._seconds[bucket], self._evidence[bucket] = float(rows), seconds, 1.0
            return
        seconds = min(seconds, _OUTLIER * self._seconds[bucket])
        # A plain mean at first: what the first of them was must not weigh more than the next ones.
        weight = max(_COST_WEIGHT, 1 / (self._evidence[bucket] + 1))
        self._rows[bucket] += weight * (rows - self._rows[bucket])
        self._seconds[bucket] += weight * (seconds - self._seconds[bucket])
        self._evidence[bucket] = min(self._evidence[bucket] + 1, _MAX_COST_EVIDENCE)

    def evidence(self, rows: int) -> float:
        """Measurements that the estimate for so many rows rests on, the older of which have faded."""
        return self._evidence.get(_bucket(rows), 0.0)

    def seconds(self, rows: np.ndarray) -> np.ndarray | None:
        """Estimates for row counts [N]; None before the first measurement."""
        if not self._rows:
            return None
        buckets = sorted(self._rows)
        known = np.array([self._rows[b] for b in buckets])
        cost = non_decreasing(
            np.array([self._seconds[b] for b in buckets]), np.array([self._evidence[b] for b in buckets])
        )
        nearest = np.clip(rows, known[0], known[-1])
        return np.interp(rows, known, cost) * (0.5 + 0.5 * rows / nearest)


def _bucket(rows: int) -> int:
    return round(_BUCKETS_PER_OCTAVE * math.log2(rows))


class Acceptance:
    """Chance that the draft at each position of a block is accepted, given that those before it were.

    Evidence fades by the step, and where it is thin a position is taken to do as well as the one before it: a block
    that has been cut short for long is judged by what is still seen of it.
    """

    def __init__(self, max_k: int) -> None:
        self._reached = np.zeros(max_k)
        self._accepted = np.zeros(max_k)

    def observe(self, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """Take in one step: how many tokens were drafted for each request, and how many of them were accepted."""
        self._reached *= _ACCEPTANCE_DECAY
        self._accepted *= _ACCEPTANCE_DECAY
        for k, length in zip(drafted, accepted, strict=True):
            self._reached[: min(length + 1, k)] += 1
            self._accepted[:length] += 1

    def rates(self) -> np.ndarray:
        """Conditional acceptance [max K]."""
        rates = np.empty(len(self._reached))
        before = _PRIOR_ACCEPTANCE
        for i, (reached, accepted) in enumerate(zip(self._reached, self._accepted, strict=True)):
            before = rates[i] = (accepted + _PRIOR_EVIDENCE * before) / (reached + _PRIOR_EVIDENCE)
        return rates

    def lengths(self) -> np.ndarray:
        """Expected tokens a target forward for K = 0 .. max K, the target's own included: [max K + 1]."""
        return 1 + np.concatenate([[0.0], np.cumsum(np.cumprod(self.rates()))])


class KController:
    """Chooses K step by step.

    Args:
        ks: values that K may take, none above the draft's block size - 1; on a GPU those that graphs exist for.
        margin: a new K is taken up only if it promises this much more tokens a second.
        dwell: steps that a K is kept at least.

    Raises:
        ValueError: no value, or a negative one.
    """

    def __init__(self, ks: Sequence[int], *, margin: float = 0.03, dwell: int = 16) -> None:
        if not ks or min(ks) < 0:
            raise ValueError(f"K must take values of at least 0, not {list(ks)}")
        self.ks = np.array(sorted(set(ks)))
        self.acceptance = Acceptance(int(self.ks[-1]))
        self.costs: dict[Part, CostCurve] = {"verify": CostCurve(), "draft": CostCurve()}
        self._margin = margin
        self._dwell = dwell
        self._current = len(self.ks) - 1
        self._kept = 0

    def observe_acceptance(self, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """Take in the verification of one step (see `Acceptance.observe`)."""
        self.acceptance.observe(drafted, accepted)

    def forget_acceptance(self) -> None:
        """Another draft is asked from now on."""
        self.acceptance = Acceptance(int(self.ks[-1]))

    def observe_cost(self, part: Part, rows: int, seconds: float) -> None:
        """Take in what one part of a step took; `draft` is the whole exchange, transport and waiting included."""
        if rows > 0:
            self.costs[part].observe(rows, seconds)

    def choose(self, batch_size: int) -> int:
        """K for a step of `batch_size` requests."""
        rates = self.rates(batch_size)
        self._kept += 1
        best = int(rates.argmax())
        if self._kept > self._dwell and rates[best] > (1 + self._margin) * rates[self._current]:
            self._current, self._kept = best, 0
        return int(self.ks[self._current])

    def min_chance(self, batch_size: int) -> float:
        """The least chance of acceptance at which a drafted row of a step of `batch_size` requests is worth verifying.

        With chance p a row adds p tokens and takes the target the seconds s of one row more. It raises the rate R of
        tokens a second where p / s > R (Dinkelbach's condition), so that the bound is s * R; without measurements 0.
        """
        most = batch_size * (int(self.ks[self._current]) + 1)
        seconds = self.costs["verify"].seconds(np.array([batch_size, most]))
        if seconds is None or most == batch_size:
            return 0.0
        of_a_row = (seconds[1] - seconds[0]) / (most - batch_size)
        return float(min(of_a_row * self.rates(batch_size)[self._current], _MAX_CHANCE))

    def table(self, max_batch_size: int) -> list[int]:
        """The best K for each batch size 0 .. `max_batch_size`, without hysteresis."""
        return [int(self.ks[self.rates(max(n, 1)).argmax()]) for n in range(max_batch_size + 1)]

    def rates(self, batch_size: int) -> np.ndarray:
        """Expected tokens a second for each of `ks`; without measurements, tokens a step."""
        rows = batch_size * (self.ks + 1)
        parts = [curve.seconds(rows) for curve in self.costs.values()]
        seconds = sum(part for part in parts if part is not None)
        tokens = batch_size * self.acceptance.lengths()[self.ks]
        return tokens / seconds if any(part is not None for part in parts) else tokens


def non_decreasing(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The non-decreasing sequence nearest to `values` in weighted least squares (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (v1, w1, n1), (v2, w2, n2) = pools[-2:]
            pools[-2:] = [((v1 * w1 + v2 * w2) / (w1 + w2), w1 + w2, n1 + n2)]
    return np.concatenate([np.full(count, value) for value, _, count in pools])
