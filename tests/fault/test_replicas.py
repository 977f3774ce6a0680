"""F1 to F4 and F7: target replicas that are killed or hang under load."""

from __future__ import annotations

import time

import psutil
import pytest

from serve_app.backend import ReplicaReport
from tests.fault.load import Load, Reply
from tests.fault.record import Finding, at_most, conclude, equal
from tests.fault.scenario import (
    Scenario,
    Stage,
    kill,
    longest_gap,
    no_failures,
    nothing_left,
    pause,
    play,
    recovers,
    same_text,
    slowest_answer,
    stop,
    wait_until,
)

pytestmark = pytest.mark.timeout(600)

Answers = dict[str, tuple[str, int]]

SLOW_START = (
    "A replica takes as long as F4 shows without load; here it starts beside replicas that serve, on two cores."
)

KINDS = {
    "F1": ("requests", Load(requests=100), slowest_answer(15)),
    "F2": ("streams", Load(requests=100, stream=True), longest_gap(2)),
    "F1, F2": ("requests, half of them streams", Load(requests=10, half=True), longest_gap(2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("row", KINDS)
def test_a_killed_target_is_not_seen(stage: Stage, expected: Answers, row: str) -> None:
    kind, load, in_time = KINDS[row]
    checks = [no_failures, same_text(expected), in_time, recovers(60, reason=SLOW_START), nothing_left]
    findings = play(stage, Scenario(load=load, events=[kill("target")], checks=checks))
    conclude(row, "SIGKILL one of two targets", f"8 clients x {load.requests} {kind}", findings)


@pytest.mark.slow
def test_a_killed_target_is_back_soon(stage: Stage) -> None:
    """Without load, so that the seconds are those of the start alone."""
    wait_until(stage.is_whole, 120)
    before, begun = set(stage.pids("target")), time.time()
    kill("target")(stage)

    def successor() -> ReplicaReport | None:
        new = [report for report in stage.service.reports() if report.role == "target" and report.pids[0] not in before]
        return new[0] if new else None

    ready = wait_until(successor, 120)
    report = successor()
    assert report is not None
    engine = max(psutil.Process(pid).create_time() for pid in report.pids[1:]) - begun
    whole = ready + wait_until(stage.is_whole, 60)
    reason = (
        f"The replica imports vLLM, which after {engine:.0f} s started the engine's process, which imports it again; "
        "weights and warm-up are the smaller part. Only a replica in reserve would be there sooner."
    )
    findings = [
        at_most("ready again after", ready, 10, reason=reason),
        at_most("drafts again after", whole, 10, reason=reason),
    ]
    conclude("F4", "SIGKILL one of two targets", "no load", findings)


@pytest.mark.slow
def test_a_stream_that_cannot_go_on_says_so(stage: Stage) -> None:
    """The engine alone knows what a penalty has counted, so such a stream is not continued elsewhere."""
    findings = play(
        stage,
        Scenario(
            load=Load(stream=True, requests=4, fields={"presence_penalty": 0.5, "max_tokens": 64}),
            events=[kill("target")],
            checks=[errors_are_events, recovers(60), nothing_left],
        ),
    )
    conclude("F3", "SIGKILL a target, streams that cannot be continued", "8 clients x 4 streams", findings)


def errors_are_events(_: Stage, replies: list[Reply]) -> list[Finding]:
    """A stream ends with `[DONE]` or with an error event, and only those of the victim do the latter."""
    silent = [reply for reply in replies if not reply.complete and reply.error != "503 service_unavailable"]
    told = [reply for reply in replies if reply.error == "503 service_unavailable"]
    return [
        equal("streams that end silently", len(silent), 0),
        Finding(
            what="streams that end with an error event",
            required="1 to 8",
            measured=str(len(told)),
            met=1 <= len(told) <= 8,
        ),
    ]


@pytest.mark.slow
def test_a_hung_target_is_replaced(stage: Stage, expected: Answers) -> None:
    findings = play(
        stage,
        Scenario(
            load=Load(requests=100_000),
            events=[stop("target"), pause(25)],
            until_events_end=True,
            checks=[no_failures, same_text(expected), slowest_answer(15), recovers(90), nothing_left],
        ),
    )
    conclude("F7", "SIGSTOP one of two targets", "8 clients, 25 s", findings)
