"""F10: training whose worker or driver is killed, or that is told to stop, goes on to the last bit."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.fault.job import Job, exit_codes, finish, kill_driver, kill_one, start, stop_driver, those_gone
from tests.fault.record import Finding, conclude, equal
from tests.fault.scenario import ours
from tests.fault.training_job import all_steps, log_of, training, undisturbed_losses
from tests.fault.trial import Trial

pytestmark = pytest.mark.timeout(600)

STEPS = 300
CHECKPOINT_S = 0.3
WORKER = "RayTrainWorker"


def interrupted(run_dir: Path, target: Path, address: str) -> Job:
    """A training with a checkpoint every few steps that has not begun."""
    return training(
        run_dir,
        target,
        address,
        [24] * 16,
        max_steps=STEPS,
        sequences_per_step=2,
        anchors_per_sequence=8,
        checkpoint_every_s=CHECKPOINT_S,
    )


@pytest.fixture(scope="module")
def address(ray_cluster: None) -> str:
    import ray

    return ray.get_runtime_context().gcs_address


@pytest.fixture(scope="module")
def losses(address: str, target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the undisturbed run, by step."""
    return undisturbed_losses(interrupted(tmp_path_factory.mktemp("whole"), target_dir, address))


def last_step(job: Job) -> int:
    return max((record["step"] for record in log_of(job)), default=0)


def newest_checkpoint(job: Job) -> int:
    """Steps that it holds; 0 is none."""
    paths = (job.run_dir / "draft" / "checkpoints").glob("step-*")
    return max((int(re.sub(r"\D", "", path.name)) for path in paths), default=0)


def taken_again(log: list[dict]) -> int:
    """Steps that were taken a second time after a resume."""
    resumed = next((i for i in range(1, len(log)) if log[i]["step"] != log[i - 1]["step"] + 1), None)
    return 0 if resumed is None else log[resumed - 1]["step"] - log[resumed]["step"] + 1


def step_s(log: list[dict]) -> float:
    """Seconds a step."""
    return (log[-1]["seconds"] - log[0]["seconds"]) / STEPS


def trained_s(log: list[dict]) -> float:
    """Seconds in which it took its steps."""
    return log[-1]["seconds"] if log else 0.0


def some_steps(count: int) -> Callable[[Job], None]:
    """Event: it is in the middle of its steps, behind a first checkpoint and with time for several more."""

    def reached(job: Job) -> bool:
        log = log_of(job)
        return len(log) > count and trained_s(log) > 4 * CHECKPOINT_S and newest_checkpoint(job) > 0

    def reach(job: Job) -> None:
        job.wait_for(lambda: reached(job), 200)
        job.noted["workers"] = ours(WORKER)

    return reach


def hang(job: Job) -> None:
    """Event: the worker answers nothing and nobody any more."""
    for worker in job.noted["workers"]:
        worker.suspend()


def stop_driver_twice(job: Job) -> None:
    """Event: SIGTERM to the driver, and another when the first one has had no effect."""
    stop_driver(job)
    job.wait_for((job.run_dir / "draft" / "stop").is_file, 60)
    stop_driver(job)


def note_what_is_kept(job: Job) -> None:
    """Event: how far the log and the newest checkpoint reach is noted. A dead worker adds nothing to either."""
    job.noted["last step"], job.noted["checkpoint"] = last_step(job), newest_checkpoint(job)


def goes_on_from_the_newest_checkpoint(job: Job) -> list[Finding]:
    """Check: what came after the newest checkpoint is done again, no more and no less."""
    log, left = log_of(job), STEPS - job.noted["last step"]
    return [
        Finding(what="steps left when it was struck", required="> 0", measured=str(left), met=left > 0),
        equal("times that its first step was taken", sum(record["step"] == 1 for record in log), 1),
        equal("steps taken twice", taken_again(log), job.noted["last step"] - job.noted["checkpoint"]),
    ]


def at_most_one_interval_is_lost(job: Job) -> list[Finding]:
    """Check: of the training's own time no more is lost than checkpoints are apart, and a step.

    A record tells the time of all steps before it. A checkpoint is due at a step that begins so long after the last
    one, and is saved when that step ends: only the last step may be one that it was due at. A slow machine is slow on
    both sides.
    """
    last, kept = job.noted["last step"], job.noted["checkpoint"]
    begun = [record["seconds"] for record in log_of(job)[kept:last]]  # of each step that the checkpoint does not hold
    due = sum(seconds - begun[0] > CHECKPOINT_S for seconds in begun[:-1])
    return [equal("steps before the last at which a checkpoint was due", due, 0)]


def nothing_is_lost(job: Job) -> list[Finding]:
    """Check: a training that is told to stop saves its last step first."""
    return [equal("steps lost", job.noted["last step"] - job.noted["checkpoint"], 0)]


def losses_as(undisturbed: dict[int, float]) -> Callable[[Job], list[Finding]]:
    """Check: the losses are the undisturbed run's, bit for bit."""

    def check(job: Job) -> list[Finding]:
        differing = sum(record["loss"] != undisturbed[record["step"]] for record in log_of(job))
        return [equal("losses that differ in any bit", differing, 0)]

    return check


STRUCK = [those_gone("workers"), note_what_is_kept]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "strike", "codes"),
    [
        ("SIGKILL of the worker", [kill_one(WORKER, random.Random(0)), *STRUCK], [0]),
        ("SIGKILL of the driver", [kill_driver, *STRUCK, start], [-9, 0]),
        ("SIGTERM to the driver", [stop_driver, *STRUCK, finish, start], [130, 0]),
        (
            "SIGTERM twice to the driver of a worker that hangs",
            [hang, stop_driver_twice, *STRUCK, finish, start],
            [130, 0],
        ),
    ],
)
def test_losses_are_those_of_the_undisturbed_run(
    address: str,
    target_dir: Path,
    losses: dict[int, float],
    tmp_path: Path,
    event: str,
    strike: Sequence[Callable[[Job], None]],
    codes: list[int],
) -> None:
    job = interrupted(tmp_path, target_dir, address)
    checks = [exit_codes(codes), goes_on_from_the_newest_checkpoint, at_most_one_interval_is_lost]
    checks += [all_steps(STEPS), losses_as(losses)]
    if stop_driver in strike:
        checks.append(nothing_is_lost)
    findings = Trial(events=[start, some_steps(50), *strike, finish], checks=checks).play(job)
    log = log_of(job)
    every = CHECKPOINT_S / step_s(log)
    scale = f"{STEPS} steps, {taken_again(log)} taken twice (a checkpoint every {every:.0f})"
    conclude("F10", event, scale, findings)
