"""Waits that look without rest only when what they wait for is due."""

from __future__ import annotations

import pytest

from unmask.pairing import polling
from unmask.pairing.polling import Attention, usable_cores


def test_a_containers_limit_counts(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(polling.os, "sched_getaffinity", lambda _: range(64))
    limit = tmp_path / "cpu.max"
    assert usable_cores(limit) == 64
    for text, cores in (("max 100000\n", 64), ("250000 100000\n", 2.5), ("9900000 100000\n", 64), ("", 64)):
        limit.write_text(text)
        assert usable_cores(limit) == cores


class Clock:
    """Time that only sleeping moves."""

    def __init__(self) -> None:
        self.now, self.rests = 0.0, []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.rests.append(seconds)
        self.now += max(seconds, 1e-6)

    def sched_yield(self) -> None:
        self.rests.append(0.0)
        # What a look takes.
        self.now += 1e-6


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(polling, "time", clock)
    monkeypatch.setattr(polling.os, "sched_yield", clock.sched_yield)
    return clock


def wait(attention: Attention, clock: Clock, seconds: float) -> list[float]:
    clock.rests = []
    end = clock.now + seconds
    attention.begin()
    while clock.now < end:
        attention.rest()
    attention.came()
    return clock.rests


def test_without_cores_to_spare_it_rests_all_the_time(clock) -> None:
    attention = Attention(1e-4, spins=False)
    for _ in range(5):
        assert set(wait(attention, clock, 0.005)) == {1e-4}


def test_it_looks_without_rest_when_what_it_waits_for_is_due(clock) -> None:
    attention = Attention(spins=True)
    for _ in range(40):
        rests = wait(attention, clock, 0.005)
    # Rested for the most part of the wait, in a few sleeps, and spun for the last of it.
    assert 0.003 < sum(rests) < 0.0045
    assert rests.count(0) > 500
    assert all(rest == 0 for rest in rests[10:])


def test_what_is_very_late_is_looked_for_at_rest(clock) -> None:
    attention = Attention(2e-5, spins=True)
    for _ in range(40):
        wait(attention, clock, 0.001)
    assert set(wait(attention, clock, 1.0)[-1000:]) == {2e-5}
    assert not attention.is_close
    # A pause says nothing of the next wait.
    assert sum(rest == 0 for rest in wait(attention, clock, 0.001)) < 1000
