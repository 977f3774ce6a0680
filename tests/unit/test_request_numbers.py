from __future__ import annotations

import numpy as np
import pytest

from unmask.pairing.request_log import MAX_REQUESTS, RequestLog
from unmask.pairing.request_numbers import TRACED, RequestNumbers, traced_name

SPAN = 0xFEDCBA9876543210


def test_a_number_stays_until_its_request_has_ended():
    numbers = RequestNumbers()
    assert [numbers.of(name) for name in ("a", "b", "a")] == [1, 2, 1]
    assert numbers.forget(["a", "unknown"]) == [1]
    assert numbers.of("a") == 3
    assert sorted(numbers.forget_all_but({"b": None})) == [3]
    assert numbers.of("b") == 2


@pytest.mark.parametrize("appended", ["", "-1a2b3c4d"])
def test_a_traced_request_has_the_number_of_its_span(appended: str):
    numbers = RequestNumbers()
    assert numbers.of(traced_name("x-0-0", SPAN) + appended) == SPAN


@pytest.mark.parametrize("name", ["x~0000", "x~fedcba98765432100-1", "x~0000000000000007", "fedcba9876543210"])
def test_what_only_looks_like_a_span_is_counted(name: str):
    assert RequestNumbers().of(name) == 1


def test_the_log_adds_up_the_steps_of_traced_requests():
    log = RequestLog()
    log.note(np.array([1, SPAN, TRACED], dtype=np.uint64), np.array([9, 3, 0]), 10.0, 10.5)
    log.note(np.array([SPAN], dtype=np.uint64), np.array([4]), 11.0, 11.25)
    [ended] = log.take(11.0)
    assert (ended.number, ended.steps, ended.proposed_tokens) == (TRACED, 1, 0)
    [ended] = log.take(12.0)
    assert (ended.number, ended.steps, ended.proposed_tokens, ended.compute_s) == (SPAN, 2, 7, 0.75)
    assert (ended.begun_s, ended.ended_s) == (10.0, 11.25)
    assert log.take(99.0) == []


def test_the_log_is_bounded():
    log = RequestLog()
    numbers = np.arange(TRACED, TRACED + MAX_REQUESTS + 5, dtype=np.uint64)
    log.note(numbers, np.ones(len(numbers), dtype=np.uint8), 0.0, 1.0)
    assert len(log.take(2.0)) == MAX_REQUESTS


def test_no_two_ever_have_one_number():
    """The choices of one prompt are of one span, and the end of one may be told when another has begun."""
    numbers = RequestNumbers()
    first, second = (traced_name(name, SPAN) for name in ("0_x", "1_x"))
    assert [numbers.of(name) for name in (first, second, first, second)] == [SPAN, 1, SPAN, 1]
    assert numbers.forget([first]) == [SPAN]
    assert numbers.of(second) == 1
    assert numbers.of(traced_name("2_x", SPAN)) == 2
