"""F14: a draft that is killed, comes back broken, or talks nonsense costs speed, never a token."""

from __future__ import annotations

import itertools
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from ray import serve

from serve_app.backend import ReplicaReport
from serve_app.directory import DraftEndpoint
from serve_app.settings import APPLICATION
from tests.fault.load import Load, Reply
from tests.fault.record import Finding, conclude, equal
from tests.fault.scenario import (
    Scenario,
    Stage,
    corrupt_draft,
    kill,
    no_failures,
    nothing_left,
    pause,
    play,
    recovers,
    restore_draft,
    same_text,
    wait_until,
)
from tests.impostor_draft import Impostor, altered
from unmask.checkpoints import load_draft
from unmask.pairing.channel import Channel
from unmask.pairing.hello import hello_of
from unmask.pairing.wire import Proposals
from unmask.targets import describe_target

SLOW_START = "Presumed, not measured apart: the draft starts on two cores that serve 8 clients meanwhile."

pytestmark = pytest.mark.timeout(600)

Answers = dict[str, tuple[str, int]]


def test_a_killed_draft_costs_no_token(stage: Stage, expected: Answers) -> None:
    findings = play(
        stage,
        Scenario(
            load=Load(requests=20, stream=True),
            events=[kill("draft")],
            checks=[no_failures, same_text(expected), recovers(60, reason=SLOW_START), nothing_left],
        ),
    )
    conclude("F14", "SIGKILL the draft", "8 clients x 20 streams", findings)


@pytest.mark.slow
def test_a_draft_that_comes_back_broken(stage: Stage, expected: Answers) -> None:
    def speculation_is_off(stage: Stage, _: list[Reply]) -> list[Finding]:
        return [equal("unmask_speculation_enabled", stage.metric("unmask_speculation_enabled"), 0.0)]

    findings = play(
        stage,
        Scenario(
            load=Load(requests=40, stream=True),
            events=[corrupt_draft(), kill("draft"), pause(5)],
            checks=[no_failures, same_text(expected), speculation_is_off, lambda *_: mended(stage)],
        ),
    )
    conclude("F14", "SIGKILL the draft, its weights cut", "8 clients x 40 streams", findings)


def mended(stage: Stage) -> list[Finding]:
    """With its weights back the draft comes up by itself."""
    restore_draft()(stage)
    seconds = wait_until(stage.is_whole, 180)
    return [Finding(what="drafts again once mended after", required="any time", measured=f"{seconds:.0f} s", met=True)]


def nonsense() -> Iterator[object]:
    """Ways to misbehave, in turn."""

    def garbage(channel: Channel, _: Proposals) -> None:
        channel._socket.sendall(secrets.token_bytes(200))

    def hang_up(channel: Channel, _: Proposals) -> None:
        channel.shutdown()

    def strangers(channel: Channel, reply: Proposals) -> None:
        altered(tokens=np.full_like(reply.tokens, 2**30))(channel, reply)

    return itertools.cycle([altered(), garbage, hang_up, strangers, altered(epoch=7), altered(draft_version=1)])


@dataclass(slots=True)
class Imposture:
    """A draft that knows the application's secret, tells the directory of itself, and talks nonsense."""

    target: Path
    gone: threading.Event = field(default_factory=threading.Event)

    def begin(self, stage: Stage) -> None:
        directory = serve.get_deployment_handle("Directory", APPLICATION)
        secret = directory.agree_on_secret.remote(None).result(timeout_s=30)
        ways = nonsense()
        liar = Impostor(
            lambda channel, reply: next(ways)(channel, reply),
            hello_of(load_draft(stage.draft), 1, describe_target(self.target)),
            secret.encode(),
        )
        report = ReplicaReport(role="draft", replica="impostor", pids=(0,))
        endpoint = DraftEndpoint(address=liar.address, version=1, pid=0)

        def announce() -> None:
            while not self.gone.wait(0.5):
                directory.note_draft.remote(report, endpoint).result(timeout_s=30)
            liar.stop()

        threading.Thread(target=announce).start()


@pytest.mark.slow
def test_nonsense_on_the_wire_changes_no_token(stage: Stage, expected: Answers, target_dir: Path) -> None:
    wait_until(stage.is_whole, 120)
    failures = stage.metric("unmask_link_failures_total")

    def was_heard(stage: Stage, _: list[Reply]) -> list[Finding]:
        seen = stage.metric("unmask_link_failures_total") - failures
        return [Finding(what="steps with nonsense", required=">= 1", measured=f"{seen:.0f}", met=seen >= 1)]

    imposture = Imposture(target_dir)
    try:
        findings = play(
            stage,
            Scenario(
                load=Load(requests=20, stream=True),
                events=[imposture.begin],
                checks=[no_failures, same_text(expected), was_heard, nothing_left],
            ),
        )
    finally:
        imposture.gone.set()
    conclude("F14", "garbage, lies and hang-ups on the wire", "8 clients x 20 streams", findings)
