"""What the marks of a target's steps come to."""

from __future__ import annotations

import time

import pytest
import torch

from engines.step_times import StepTimes

REMOTE = ["collected", "begun", "features", "sent", "answered", "taken", "end"]
IN_TURNS = ["collected", "begun", "features", "sent", "end"]
NATIVE = ["end"]


@pytest.mark.parametrize(
    ("marks", "parts"),
    [
        (REMOTE, {"period", "verify", "late_wait", "features", "wait", "reply"}),
        (IN_TURNS, {"period", "verify", "late_wait", "features"}),
        (NATIVE, {"period", "verify", "draft"}),
    ],
)
def test_a_step_has_the_parts_that_were_marked(marks: list[str], parts: set[str]) -> None:
    times = StepTimes(torch.device("cpu"), wanted=4)
    for _ in range(3):
        times.begin(4)
        for name in marks:
            time.sleep(0.001)
            times(name)
        time.sleep(0.001)
    found = times.summary()
    assert found.keys() == parts
    assert min(found.values()) >= 1
    # They are the whole period.
    assert sum(found.values()) == pytest.approx(2 * found["period"], rel=0.5)


def test_steps_of_other_sizes_and_what_precedes_them_do_not_count() -> None:
    times = StepTimes(torch.device("cpu"), wanted=4)
    for size in (4, 3, 4):
        times.begin(size)
        for name in REMOTE:
            times(name)
    assert times.summary() == {}
