"""Signs of life: a run whose actors finish rows is heard, one that hangs is not."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from actors.heartbeat import Heartbeat, Watch


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def beat(directory: Path, stamp: int) -> None:
    """A touch by a node whose clock is another."""
    Heartbeat(directory, 0.0).beat()
    os.utime(directory / "heartbeat", (stamp, stamp))


def test_a_run_that_is_heard_goes_on(tmp_path: Path, clock: Clock) -> None:
    watch = Watch(tmp_path, 60, clock)
    for n in range(20):
        clock.now += 50
        beat(tmp_path, 7 + n)
        assert not watch.is_silent()


def test_a_run_that_hangs_is_silent(tmp_path: Path, clock: Clock) -> None:
    beat(tmp_path, 7)
    watch = Watch(tmp_path, 60, clock)
    silent = []
    for _ in range(14):
        clock.now += 5
        silent.append(watch.is_silent())
    assert silent == [False] * 12 + [True] * 2, "what an earlier driver's actors said does not count"


def test_a_run_that_never_began_is_silent_too(tmp_path: Path, clock: Clock) -> None:
    watch = Watch(tmp_path / "not" / "there", 60, clock)
    assert not watch.is_silent()
    clock.now += 61
    assert watch.is_silent()


def test_without_a_limit_nothing_is_silent(tmp_path: Path, clock: Clock) -> None:
    watch = Watch(tmp_path, math.inf, clock)
    clock.now += 1e9
    assert not watch.is_silent()


def test_beats_are_few(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 3600)
    heartbeat.beat()
    (tmp_path / "heartbeat").unlink()
    heartbeat.beat()
    assert not (tmp_path / "heartbeat").exists()
