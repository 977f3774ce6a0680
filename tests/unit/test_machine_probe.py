"""Which answers of a benchmark others on the machine had no part in."""

from benchmarks.machine_probe import AFTER_S, Probe, undisturbed
from tests.fault.load import Reply


def test_answers_during_and_soon_after_a_disturbance_are_left_out():
    disturbances = [(100.0, 102.0)]
    replies = [
        Reply(prompt=f"{begun}", begun=begun, total_s=3.0) for begun in (96.0, 98.0, 101.0, 102.5, 103 + AFTER_S)
    ]
    assert [reply.prompt for reply in undisturbed(replies, disturbances)] == ["96.0", f"{103 + AFTER_S}"]
    assert undisturbed(replies, []) == replies


def test_the_probe_tells_its_speed_and_what_serving_took():
    served = iter([2.0, 5.5])
    probe = Probe(lambda: next(served))
    found = probe.end()
    assert found["served_s"] == 3.5
    assert found["disturbed_s"] == 0.0
    assert 0 <= found["stolen"] <= 1
