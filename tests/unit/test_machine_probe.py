"""Which answers of a benchmark others on the machine had no part in."""

from typing import NamedTuple

import psutil

from benchmarks.machine_probe import AFTER_S, Probe, undisturbed
from tests.fault.load import Reply


class Times(NamedTuple):
    """Of all cores, in seconds, as `psutil.cpu_times` tells them."""

    user: float
    steal: float
    idle: float


def test_answers_during_and_soon_after_a_disturbance_are_left_out():
    disturbances = [(100.0, 102.0)]
    replies = [
        Reply(prompt=f"{begun}", begun=begun, total_s=3.0) for begun in (96.0, 98.0, 101.0, 102.5, 103 + AFTER_S)
    ]
    assert [reply.prompt for reply in undisturbed(replies, disturbances)] == ["96.0", f"{103 + AFTER_S}"]
    assert undisturbed(replies, []) == replies


def test_the_probe_tells_what_serving_took_and_what_others_had(monkeypatch):
    # At its start, before and after the only interval, at its end.
    readings = iter([Times(0, 0, 0), Times(10, 0, 90), Times(15, 1, 94), Times(20, 2, 178)])
    monkeypatch.setattr(psutil, "cpu_times", lambda: next(readings))
    served = iter([2.0, 5.5])
    probe = Probe(lambda: next(served))
    found = probe.end()
    assert found["served_s"] == 3.5
    assert found["stolen"] == 0.01
    assert len(probe.disturbances) == 1
