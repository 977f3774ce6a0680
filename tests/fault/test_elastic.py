"""F13: training whose second node goes and comes back: 2, then 1, then 2 workers, at the losses of 1 throughout.

A node of another role, as large, stays all the time: it is no room for the training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import pytest

from tests.fault.job import Job, exit_codes, finish, start, stop_driver
from tests.fault.nodes import Nodes
from tests.fault.record import Finding, conclude, equal
from tests.fault.training_job import all_steps, log_of, training, undisturbed_losses
from tests.fault.trial import Trial

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, SEQUENCES, PER_STEP = 600, 64, 8


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    nodes = Nodes("train", 2, foreign=1)
    yield nodes
    nodes.shutdown()


def elastic(run_dir: Path, target: Path, address: str, workers: int) -> Job:
    """A training on responses of different lengths, by as many workers as there is room for, that has not begun."""
    return training(
        run_dir,
        target,
        address,
        [20 + i for i in range(SEQUENCES)],
        max_steps=STEPS,
        sequences_per_step=PER_STEP,
        anchors_per_sequence=32,
        learning_rate=1e-4,
        checkpoint_every_s=1.0,
        num_workers=workers,
        min_workers=1,
        cpus_per_worker=2,
        labels={"role": "train"},
    )


@pytest.fixture(scope="module")
def losses(nodes: Nodes, target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Of one worker, by step."""
    return undisturbed_losses(elastic(tmp_path_factory.mktemp("whole"), target_dir, nodes.address, workers=1))


def groups(job: Job) -> list[tuple[int, int]]:
    """How many workers trained, one size after another, and for how many records."""
    return [(int(size), len(list(records))) for size, records in groupby(record["workers"] for record in log_of(job))]


def trained_by(sizes: list[int], steps: int) -> Callable[[Job], None]:
    """Event: so many workers have trained, one size after another, and the last ones for some steps."""

    def reached(job: Job) -> bool:
        found = groups(job)
        return [size for size, _ in found] == sizes and found[-1][1] >= steps

    return lambda job: job.wait_for(lambda: reached(job), 200)


def end_node(nodes: Nodes, *, with_notice: bool) -> Callable[[Job], None]:
    """Event: a node goes."""
    return lambda _: nodes.end(with_notice=with_notice)


def add_node(nodes: Nodes) -> Callable[[Job], None]:
    """Event: a node comes."""
    return lambda _: nodes.add()


def says(text: str) -> Callable[[Job], None]:
    """Event: the driver has said that."""
    return lambda job: job.wait_for(lambda: text in job.said(len(job.exits)), 60)


def worker_counts(sizes: list[int]) -> Callable[[Job], list[Finding]]:
    """Check: how many workers trained, one size after another."""
    return lambda job: [equal("workers, one after another", [size for size, _ in groups(job)], sizes)]


def differences(job: Job, losses: dict[int, float]) -> list[float]:
    """Of its losses from others, relative."""
    return [abs(record["loss"] / losses[record["step"]] - 1) for record in log_of(job)]


def losses_near(losses: dict[int, float], tolerance: float) -> Callable[[Job], list[Finding]]:
    """Check: the losses are those of one worker."""

    def check(job: Job) -> list[Finding]:
        differing = sum(difference > tolerance for difference in differences(job, losses))
        return [equal(f"losses that differ by more than {tolerance:g} of their size", differing, 0)]

    return check


@pytest.mark.parametrize("event", ["SIGKILL", "SIGTERM"])
def test_a_node_goes_and_comes_back(
    nodes: Nodes, losses: dict[int, float], target_dir: Path, tmp_path: Path, event: str
) -> None:
    going = [trained_by([2], 40), end_node(nodes, with_notice=event == "SIGTERM")]
    coming = [trained_by([2, 1], 40), add_node(nodes)]
    trial = Trial(
        events=[start, *going, *coming, finish],
        checks=[exit_codes([0]), worker_counts([2, 1, 2]), all_steps(STEPS), losses_near(losses, 1e-6)],
    )
    job = elastic(tmp_path / "parts", target_dir, nodes.address, workers=2)
    findings = trial.play(job)
    again, worst = len(log_of(job)) - STEPS, max(differences(job, losses))
    scale = f"{STEPS} steps of {PER_STEP} sequences, {again} taken twice, largest difference {worst:.0e}"
    conclude("F13", f"{event} of a node, and another in its place", scale, findings)


def test_a_training_without_nodes_waits_and_can_be_stopped(nodes: Nodes, target_dir: Path, tmp_path: Path) -> None:
    gone = [end_node(nodes, with_notice=False)] * 2
    waiting = says("waiting for nodes: distill: no node is labelled role=train; SIGTERM ends it")
    back = [add_node(nodes)] * 2
    trial = Trial(
        events=[start, trained_by([2], 40), *gone, waiting, stop_driver, finish, *back, start, finish],
        checks=[exit_codes([130, 0]), worker_counts([2]), all_steps(STEPS)],
    )
    findings = trial.play(elastic(tmp_path, target_dir, nodes.address, workers=2))
    conclude(
        "F13", "SIGKILL of all nodes, SIGTERM to the driver, and others in their place", f"{STEPS} steps", findings
    )
