"""F5 and F6: Serve's own processes die under load."""

from __future__ import annotations

import subprocess
import sys
import time

import httpx
import pytest

from tests.fault.load import Load, Reply
from tests.fault.record import Finding, at_most, conclude, equal
from tests.fault.scenario import (
    Scenario,
    Stage,
    kill_actor,
    no_failures,
    nothing_left,
    pause,
    play,
    same_text,
    slowest_answer,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Answers = dict[str, tuple[str, int]]
ENDLESS = 100_000
WAITS = "Two cores also start a controller: it imports Ray Serve while eight clients are served."


def test_a_killed_controller_is_not_seen(stage: Stage, expected: Answers) -> None:
    wait_until(stage.is_whole, 120)
    served = set(stage.pids("target"))

    def same_replicas(stage: Stage, _: list[Reply]) -> list[Finding]:
        return [equal("target replicas that the new controller replaced", len(served - set(stage.pids("target"))), 0)]

    findings = play(
        stage,
        Scenario(
            load=Load(requests=ENDLESS, stream=True),
            events=[kill_actor("ServeController"), pause(30)],
            until_events_end=True,
            checks=[no_failures, same_text(expected), same_replicas, slowest_answer(15, reason=WAITS), nothing_left],
        ),
    )
    conclude("F5", "SIGKILL Serve's controller", "8 clients, 30 s", findings)


def test_a_killed_proxy_heals(stage: Stage, expected: Answers) -> None:
    wait_until(stage.is_whole, 120)
    outage = 0.0

    def heal(stage: Stage) -> None:
        nonlocal outage
        wait_until(lambda: httpx.get(f"{stage.service.url}/health", timeout=5).status_code == 200, 120)
        outage = time.monotonic() - stage.struck_at

    def broken(_: Stage, replies: list[Reply]) -> list[Finding]:
        # Clients of a proxy that dies lose what it carried; a second proxy takes their next try (below).
        silent = sum(reply.status == 200 and not reply.complete and not reply.error for reply in replies)
        return [
            at_most("answers again after", outage, 35),
            Finding(what="streams cut without an error", required="<= 8", measured=str(silent), met=silent <= 8),
        ]

    findings = play(
        stage,
        Scenario(
            load=Load(requests=ENDLESS, stream=True),
            events=[kill_actor("ProxyActor"), heal, pause(3)],
            until_events_end=True,
            checks=[broken, same_text(expected), nothing_left],
        ),
    )
    conclude("F6", "SIGKILL the only proxy", "8 clients", findings)


def test_a_second_proxy_takes_the_next_try() -> None:
    command = [sys.executable, "-m", "tests.fault.two_proxies"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
