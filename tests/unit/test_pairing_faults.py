"""What a benchmark reads from the steps of a target whose draft went away."""

from __future__ import annotations

import pytest

from benchmarks.pairing_faults import back, rate
from benchmarks.pairing_load import Steps


def steps_at(*pieces: tuple[float, float, int]) -> Steps:
    """Steps of a tenth of a second from a time to a time, with so many tokens each."""
    return [(start + i / 10, n) for start, end, n in pieces for i in range(round(10 * (end - start)))]


def test_the_speed_is_back_with_the_first_second_that_has_it() -> None:
    steps = steps_at((0, 4, 100), (4, 8.5, 30), (8.5, 12, 100))
    assert rate(steps, 2, 4) == pytest.approx(1000)
    found = back(steps, 1000.0, began=4, ended=8, last=11.5)
    assert found["back_s"] == pytest.approx(0.5)
    assert found["tokens_per_second_without"] == pytest.approx(300)
    assert found["pause_ms"] == pytest.approx(100)


def test_a_speed_that_never_comes_back_is_none() -> None:
    steps = steps_at((0, 4, 100), (4, 12, 30))
    assert back(steps, 1000.0, began=4, ended=8, last=11.5)["back_s"] is None


def test_a_pause_that_outlasts_the_rest_is_told() -> None:
    steps = steps_at((0, 4, 100), (14, 15, 100))
    assert back(steps, 1000.0, began=4, ended=8, last=12)["pause_ms"] == pytest.approx(10100)
