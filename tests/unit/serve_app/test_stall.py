from __future__ import annotations

from serve_app.stall import Stall
from tests.unit.serve_app.test_directory import Clock


def test_only_work_without_steps_counts():
    clock = Clock()
    stall = Stall(clock)
    assert stall.seconds(0, 1) == 0
    clock.now = 5.0
    assert stall.seconds(0, 1) == 5
    assert stall.seconds(1, 1) == 0, "a step"
    clock.now = 50.0
    assert stall.seconds(1, 0) == 0, "nothing to do"
    clock.now = 52.0
    assert stall.seconds(1, 2) == 2
