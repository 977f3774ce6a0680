"""A pipeline's job for a `Trial`: the drivers that run it one after another, and what may happen to them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.fault.record import Finding
from tests.fault.scenario import ours, wait_until

ROOT = Path(__file__).parents[2]
_ACTORS = ("MapWorker", "RayTrainWorker")
"""What Ray calls the processes in which pipelines work; they outlive a driver for a while."""


@dataclass(slots=True, kw_only=True)
class Job:
    """`python -m <module> <recipe>` on a cluster."""

    module: str
    recipe: Path
    run_dir: Path
    address: str
    driver: subprocess.Popen[bytes] | None = None
    exits: list[int] = field(default_factory=list)
    """Exit codes of the drivers that have ended; minus the signal's number for one that was killed."""
    noted: dict[str, Any] = field(default_factory=dict)
    """What events have seen and checks compare."""

    def start(self) -> None:
        """Start a driver."""
        with self._said(len(self.exits)).open("wb") as said:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", self.module, str(self.recipe)],
                env=os.environ | {"RAY_ADDRESS": self.address, "HF_HUB_OFFLINE": "1"},
                stdout=subprocess.DEVNULL,
                stderr=said,
                cwd=ROOT,
            )

    def finish(self, limit_s: float = 300) -> None:
        """Wait for the driver's end."""
        self.exits.append(self.driver.wait(limit_s))
        self.driver = None

    def end(self) -> None:
        """End its driver if that still runs, and wait for the end of the processes that worked for it."""
        if self.driver is None:
            return
        self.driver.kill()
        self.finish()
        wait_until(lambda: not any(map(ours, _ACTORS)), 120)

    def wait_for(self, condition: Callable[[], object], limit_s: float) -> None:
        """Let it run until the condition holds, which must be before its end."""
        wait_until(lambda: condition() or self.driver.poll() is not None, limit_s)
        assert self.driver.poll() is None, f"it ended before anything happened: {self.said(len(self.exits))[-2000:]}"

    def said(self, which: int) -> str:
        """Standard error of a driver, the first one being 0."""
        return self._said(which).read_text(errors="replace")

    def _said(self, which: int) -> Path:
        return self.recipe.parent / f"driver-{which}.log"


def start(job: Job) -> None:
    """Event: the job is begun, or the same command is given again."""
    job.start()


def finish(job: Job) -> None:
    """Event: its driver ends of itself."""
    job.finish()


def kill_driver(job: Job) -> None:
    """Event: SIGKILL of the driver."""
    job.driver.kill()
    job.finish()


def stop_driver(job: Job) -> None:
    """Event: SIGTERM to the driver."""
    job.driver.send_signal(signal.SIGTERM)


def kill_one(name: str, chance: random.Random) -> Callable[[Job], None]:
    """Event: SIGKILL of a process whose command line says `name`."""
    return lambda _: chance.choice(ours(name)).kill()


def note_processes(name: str) -> Callable[[Job], None]:
    """Event: the processes whose command line says `name` are noted under it."""

    def note(job: Job) -> None:
        job.noted[name] = ours(name)

    return note


def one_gone(name: str, limit_s: float = 60) -> Callable[[Job], None]:
    """Event: one of the processes that were noted comes to its end."""
    return lambda job: job.wait_for(lambda: not all(process.is_running() for process in job.noted[name]), limit_s)


def all_gone(name: str, limit_s: float = 120) -> Callable[[Job], None]:
    """Event: the processes whose command line says `name` come to their end."""
    return lambda _: wait_until(lambda: not ours(name), limit_s) and None


def those_gone(noted: str, limit_s: float = 120) -> Callable[[Job], None]:
    """Event: the processes that were noted come to their end, whether others have taken their place or not."""

    def wait(job: Job) -> None:
        _, alive = psutil.wait_procs(job.noted[noted], limit_s)
        assert not alive

    return wait


def exit_codes(required: Sequence[int]) -> Callable[[Job], list[Finding]]:
    """Check: how its drivers ended."""

    def check(job: Job) -> list[Finding]:
        wrong = next((i for i, code in enumerate(job.exits) if [code] != list(required[i : i + 1])), None)
        said = "" if wrong is None else f": {job.said(wrong)[-500:]}"
        met = job.exits == list(required)
        name = "exit codes" if len(required) > 1 else "exit code"
        shown, wanted = ", ".join(map(str, job.exits)), ", ".join(map(str, required))
        return [Finding(what=name, required=wanted, measured=shown + said, met=met)]

    return check
