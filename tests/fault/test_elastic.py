"""F13: training whose second node goes and comes back: 2, then 1, then 2 workers, at the losses of 1 throughout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

from tests.fault.record import conclude, equal
from tests.fault.scenario import wait_until
from tests.private_ray import MARK
from unmask.manifest import Manifest
from unmask.training.training_log import read_log
from unmask.trajectories import write_shard
from unmask.types import Trajectory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
STEPS, SEQUENCES, PER_STEP = 600, 64, 8
RECIPE = """
run_dir: {run_dir}
target: {{model: {target}, max_model_len: 256}}
draft: {{num_layers: 1, block_size: 4, num_target_features: 2}}
distill:
  max_seconds: null
  max_steps: {steps}
  sequences_per_step: {per_step}
  anchors_per_sequence: 32
  precision: float32
  head_negatives: 256
  learning_rate: 1.0e-4
  checkpoint_every_s: 1.0
  log_every_steps: 1
  threads_per_worker: 1
  num_workers: {workers}
  min_workers: 1
  cpus_per_worker: 2
  labels: {{role: train}}
"""


class Nodes:
    """A head without room for a worker, and nodes that have room for one each."""

    def __init__(self) -> None:
        os.environ.update(ENVIRONMENT)
        os.environ[MARK] = str(os.getpid())
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self.address = self._cluster.address
        self._nodes = [self._new() for _ in range(2)]

    def _new(self):
        return self._cluster.add_node(num_cpus=2, labels={"role": "train"})

    def add(self) -> None:
        """One more node."""
        self._nodes.append(self._new())

    def end(self, *, with_notice: bool) -> None:
        """End the newest node: SIGKILL all that runs on it, or SIGTERM its raylet, as before a spot node is taken."""
        self._cluster.remove_node(self._nodes.pop(), allow_graceful=with_notice)

    def shutdown(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.shutdown()


def write_run(run_dir: Path, target: Path, workers: int) -> Path:
    rows = [
        Trajectory(
            sample_id=str(i),
            prompt_ids=[1, 40 + i, 50, 60],
            response_ids=[100 + (i * j) % 7 for j in range(20 + i)],
            finish_reason="length",
            num_forwards=20 + i,
            teacher="made-up",
            teacher_revision="0",
            decode_config="0",
        )
        for i in range(SEQUENCES)
    ]
    Manifest({0: write_shard(run_dir / "trajectories", 0, rows, [])}).save(run_dir / "trajectories")
    recipe = run_dir / "recipe.yaml"
    recipe.write_text(RECIPE.format(run_dir=run_dir, target=target, steps=STEPS, per_step=PER_STEP, workers=workers))
    return recipe


def start(recipe: Path, address: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines.distill", str(recipe)]
    return subprocess.Popen(
        command, env=os.environ | {"RAY_ADDRESS": address}, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


@pytest.fixture(scope="module")
def losses(nodes: Nodes, target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Of one worker, by step."""
    run_dir = tmp_path_factory.mktemp("whole")
    whole = start(write_run(run_dir, target_dir, workers=1), nodes.address)
    _, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors
    return {record["step"]: record["loss"] for record in read_log(run_dir / "draft")}


@pytest.mark.parametrize("event", ["SIGKILL", "SIGTERM"])
def test_a_node_goes_and_comes_back(
    nodes: Nodes, losses: dict[int, float], target_dir: Path, tmp_path: Path, event: str
) -> None:
    driver = start(write_run(tmp_path / "parts", target_dir, workers=2), nodes.address)
    draft = tmp_path / "parts" / "draft"

    def wait_for(sizes: list[int], steps: int) -> None:
        def reached() -> bool:
            if driver.poll() is not None:
                return True
            found = groups(draft)
            return [size for size, _ in found] == sizes and found[-1][1] >= steps

        wait_until(reached, 200)
        assert driver.poll() is None, f"it ended before anything happened: {groups(draft)}"

    wait_for([2], 40)
    nodes.end(with_notice=event == "SIGTERM")
    wait_for([2, 1], 40)
    nodes.add()
    _, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors
    log = read_log(draft)
    differing = [record for record in log if abs(record["loss"] / losses[record["step"]] - 1) > 1e-6]
    worst = max(abs(record["loss"] / losses[record["step"]] - 1) for record in log)
    summary = json.loads((draft / "summary.json").read_text())
    findings = [
        equal("workers, one after another", [size for size, _ in groups(draft)], [2, 1, 2]),
        equal("steps in the log", len({record["step"] for record in log}), STEPS),
        equal("steps taken", summary["steps"], STEPS),
        equal("losses that differ by more than 1e-6 of their size", len(differing), 0),
    ]
    again = len(log) - STEPS
    scale = f"{STEPS} steps of {PER_STEP} sequences, {again} taken twice, largest difference {worst:.0e}"
    conclude("F13", f"{event} of a node, and another in its place", scale, findings)


def groups(draft: Path) -> list[tuple[int, int]]:
    """How many workers trained, one size after another, and for how many records."""
    log = read_log(draft) if (draft / "log.jsonl").is_file() else []
    return [(int(size), len(list(records))) for size, records in groupby(record["workers"] for record in log)]
