"""Faults as events and checks: `Scenario(load, events, checks)` on a running service."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from serve_app.handle import ServeHandle
from tests.fault.load import Load, Reply, Running, percentile, start
from tests.fault.record import Finding, at_most, equal
from tests.private_ray import MARK


@dataclass(slots=True, kw_only=True)
class Stage:
    """A running service, and what has been done to it."""

    service: ServeHandle
    draft: Path | None = None
    targets: int = 2
    drafts: int = 1
    victims: list[int] = field(default_factory=list)
    struck_at: float = 0.0
    whole_after: float = 0.0
    """Seconds from the last signal until every replica was there again."""

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels."""
        text = httpx.get(f"{self.service.url}/metrics", timeout=60).text
        return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE))

    def pids(self, role: str) -> list[int]:
        """Processes of a role's replicas that are alive."""
        return [report.pids[0] for report in self.service.reports() if report.role == role and alive(report.pids[0])]

    def is_whole(self) -> bool:
        """Whether every replica is there and every target has its draft."""
        return (
            len(self.pids("target")) == self.targets
            and len(self.pids("draft")) == self.drafts
            and self.metric("unmask_link_drafts_connected") == max(self.targets, self.drafts)
            and self.metric("unmask_speculation_enabled") == self.targets
        )


Event = Callable[[Stage], None]
Check = Callable[[Stage, list[Reply]], list[Finding]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Load, what happens during it, and what must hold afterwards. Events begin when the first replies are there."""

    load: Load
    events: Sequence[Event]
    checks: Sequence[Check]
    after_replies: int = 8
    until_events_end: bool = False
    """End the load when the events are over, in place of waiting until it has asked for everything."""


def play(stage: Stage, scenario: Scenario) -> list[Finding]:
    """Play a scenario to its end."""
    wait_until(stage.is_whole, 120)
    running = start(stage.service.url, scenario.load)
    wait_until(lambda: len(running.replies) >= scenario.after_replies or done(running), 120)
    assert not done(running), "the load ended before anything happened"
    begun, stage.whole_after = time.monotonic(), 0.0
    for event in scenario.events:
        event(stage)
    if stage.struck_at > begun:
        threading.Thread(target=_note_recovery, args=(stage,), daemon=True).start()
    replies = running.stop() if scenario.until_events_end else running.wait()
    return [finding for check in scenario.checks for finding in check(stage, replies)]


def _note_recovery(stage: Stage) -> None:
    """Measure while the load goes on: it may end long after the replicas are back, or before."""
    with contextlib.suppress(AssertionError):
        wait_until(lambda: stage.is_whole() and not any(map(alive, stage.victims)), 300)
        stage.whole_after = time.monotonic() - stage.struck_at


def done(running: Running) -> bool:
    """Whether every client has ended."""
    return all(one.done() for one in running.work)


def kill(role: str, which: int = 0) -> Event:
    """SIGKILL a replica."""
    return _signal(role, which, signal.SIGKILL)


def stop(role: str, which: int = 0) -> Event:
    """SIGSTOP a replica: alive, and silent."""
    return _signal(role, which, signal.SIGSTOP)


def resume() -> Event:
    """SIGCONT what was stopped last."""
    return lambda stage: os.kill(stage.victims[-1], signal.SIGCONT)


def kill_actor(name: str) -> Event:
    """SIGKILL a process of Serve's own by the name that it shows."""

    def strike(stage: Stage) -> None:
        [process] = ours(name)
        stage.victims.append(process.pid)
        stage.struck_at = time.monotonic()
        process.kill()

    return strike


def pause(seconds: float) -> Event:
    """Let the load run on."""
    return lambda _: time.sleep(seconds)


def corrupt_draft(kept: float = 0.5) -> Event:
    """Cut the draft's weights, as an interrupted copy would leave them."""

    def strike(stage: Stage) -> None:
        weights = stage.draft / "model.safetensors"
        weights.rename(weights.with_suffix(".whole"))
        content = weights.with_suffix(".whole").read_bytes()
        weights.write_bytes(content[: int(kept * len(content))])

    return strike


def restore_draft() -> Event:
    """Put the draft's weights back."""

    def mend(stage: Stage) -> None:
        weights = stage.draft / "model.safetensors"
        weights.with_suffix(".whole").replace(weights)

    return mend


def no_failures(_: Stage, replies: list[Reply]) -> list[Finding]:
    """Every client got every answer."""
    failed = [reply for reply in replies if reply.failed]
    seen = f"{len(failed)} of {len(replies)}" + (f", such as {failed[0].status} {failed[0].error}" if failed else "")
    return [Finding(what="failures seen by clients", required="0", measured=seen, met=not failed)]


def same_text(expected: dict[str, tuple[str, int]]) -> Check:
    """Every complete answer is the undisturbed one, to the token."""

    def check(_: Stage, replies: list[Reply]) -> list[Finding]:
        whole = [reply for reply in replies if reply.complete]
        differing = sum((reply.text, reply.tokens) != expected[reply.prompt] for reply in whole)
        return [equal("differing answers", f"{differing} of {len(whole)}", f"0 of {len(whole)}")]

    return check


def slowest_answer(limit_s: float, reason: str = "") -> Check:
    """No answer took longer."""
    return lambda _, replies: [at_most("slowest answer", max(r.total_s for r in replies), limit_s, reason=reason)]


def longest_gap(limit_s: float, reason: str = "") -> Check:
    """No stream paused longer between two events."""
    return lambda _, replies: [at_most("longest pause", max(r.longest_gap_s for r in replies), limit_s, reason=reason)]


def recovers(limit_s: float, reason: str = "") -> Check:
    """All replicas are there again and every target drafts."""

    def check(stage: Stage, _: list[Reply]) -> list[Finding]:
        wait_until(lambda: stage.whole_after > 0, 180)
        return [at_most("whole again after", stage.whole_after, limit_s, reason=reason)]

    return check


def nothing_left(stage: Stage, _: list[Reply]) -> list[Finding]:
    """No request is left running, and the processes of the victims have gone."""
    names = ("unmask_requests_running", "unmask_requests_waiting", "vllm:num_requests_running")

    def left() -> float:
        return sum(stage.metric(name) for name in names)

    with contextlib.suppress(AssertionError):
        wait_until(lambda: left() == 0 and not any(map(alive, stage.victims)), 60)
    return [
        equal("requests left in ingress and engines", left(), 0.0),
        equal("victims left", sum(map(alive, stage.victims)), 0),
    ]


def time_to_first(replies: Sequence[Reply], share: float) -> float:
    """Percentile of the time to first token of the answers that were given."""
    return percentile([reply.first_s for reply in replies if not reply.failed], share)


def wait_until(condition: Callable[[], object], limit_s: float, every_s: float = 0.2) -> float:
    """Seconds until the condition held; it may fail with a transport error meanwhile."""
    started = time.monotonic()
    while time.monotonic() - started < limit_s:
        try:
            if condition():
                return time.monotonic() - started
        except httpx.HTTPError:
            pass
        time.sleep(every_s)
    raise AssertionError(f"did not hold within {limit_s:g} s")


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not yet waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_ours(process: psutil.Process) -> bool:
    """Whether this test process has started it, directly or through Ray."""
    try:
        return process.environ().get(MARK) == str(os.getpid())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def ours(name: str) -> list[psutil.Process]:
    """Processes that this test process has started and whose command line says `name`."""
    return [process for process in psutil.process_iter() if is_ours(process) and name in _command(process)]


def _command(process: psutil.Process) -> str:
    try:
        return "".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _signal(role: str, which: int, number: int) -> Event:
    def strike(stage: Stage) -> None:
        pid = stage.pids(role)[which]
        if number == signal.SIGKILL:
            # What it has started must not outlive it: a target's engine holds the GPU.
            stage.victims += [child.pid for child in psutil.Process(pid).children(recursive=True)]
        stage.victims.append(pid)
        stage.struck_at = time.monotonic()
        os.kill(pid, number)

    return strike
