"""What the marks of a target's steps come to."""

from __future__ import annotations

import itertools

import pytest
import torch

from engines.step_times import StepTimes

REMOTE = ["collected", "begun", "features", "sent", "answered", "taken", "end"]
IN_TURNS = ["collected", "begun", "features", "sent", "end"]
NATIVE = ["end"]


@pytest.mark.parametrize(
    ("marks", "parts"),
    [
        (REMOTE, {"period": 8, "verify": 1, "late_wait": 1, "features": 3, "wait": 1, "reply": 2}),
        (IN_TURNS, {"period": 6, "verify": 1, "late_wait": 1, "features": 3}),
        (NATIVE, {"period": 2, "verify": 1, "draft": 1}),
    ],
)
def test_a_step_has_the_parts_that_were_marked(
    marks: list[str], parts: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A mark each millisecond.
    monkeypatch.setattr("time.perf_counter", itertools.count(step=0.001).__next__)
    times = StepTimes(torch.device("cpu"), wanted=4)
    for _ in range(3):
        times.begin(4)
        for name in marks:
            times(name)
    assert times.summary() == pytest.approx(parts)


def test_steps_of_other_sizes_and_what_precedes_them_do_not_count() -> None:
    times = StepTimes(torch.device("cpu"), wanted=4)
    for size in (4, 3, 4):
        times.begin(size)
        for name in REMOTE:
            times(name)
    assert times.summary() == {}
