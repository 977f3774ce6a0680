"""Distillation under Ray Train: SIGKILL in the middle, resumed from the last checkpoint; two workers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unmask.checkpoints import check_pairing
from unmask.manifest import Manifest
from unmask.targets import describe_target, resolve_target
from unmask.training.training_log import read_log
from unmask.trajectories import write_shard
from unmask.types import Trajectory

RECIPE = """
target: {max_model_len: 256}
draft: {num_layers: 1, block_size: 4, num_target_features: 2}
distill:
  max_seconds: null
  sequences_per_step: 1
  anchors_per_sequence: 4
  precision: float32
  head_negatives: 64
  checkpoint_every_s: 0.2
  log_every_steps: 1
  threads_per_worker: 1
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a few made-up trajectories: training does not mind what they say."""
    directory = tmp_path_factory.mktemp("run")
    rows = [
        Trajectory(
            sample_id=str(i),
            prompt_ids=[1, 40 + i, 50, 60],
            response_ids=[100 + (i * j) % 7 for j in range(12)],
            finish_reason="length",
            num_forwards=12,
            teacher="made-up",
            teacher_revision="0",
            decode_config="0",
        )
        for i in range(8)
    ]
    manifest = Manifest({0: write_shard(directory / "trajectories", 0, rows, [])})
    manifest.save(directory / "trajectories")
    (directory / "recipe.yaml").write_text(f"run_dir: {directory}\n{RECIPE}")
    return directory


def command(run_dir: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "pipelines.distill", str(run_dir / "recipe.yaml"), *overrides]


@pytest.mark.slow
def test_a_killed_training_goes_on_where_it_was(run_dir: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    steps = "distill.max_steps=400"
    victim = subprocess.Popen(command(run_dir, steps), env=environment, start_new_session=True)
    checkpoints = run_dir / "draft" / "checkpoints"
    deadline = time.monotonic() + 180
    while not list(checkpoints.glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert victim.poll() is None, "it ended before it could be killed"
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    saved = max(int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*"))
    assert 0 < saved < 400
    before = {record["step"]: record["loss"] for record in read_log(run_dir / "draft")}
    finished = subprocess.run(
        command(run_dir, steps), env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr
    log = read_log(run_dir / "draft")
    resumed = log[len(before) :]
    steps_seen = [record["step"] for record in log]
    assert steps_seen[-1] == 400
    first_again = steps_seen[len(before)]
    assert saved < first_again <= max(before) + 1 or first_again == saved + 1
    # Steps that were taken twice came out the same to the last bit.
    twice = [record for record in resumed if record["step"] in before]
    assert all(record["loss"] == before[record["step"]] for record in twice)
    assert json.loads((run_dir / "draft" / "summary.json").read_text())["steps"] == 400
    record = describe_target(resolve_target("embedded:smollm2-135m-instruct"))
    check_pairing(run_dir / "draft" / "final", record)


@pytest.mark.slow
def test_two_workers_train_one_draft(run_dir: Path) -> None:
    finished = subprocess.run(
        command(run_dir, "distill.max_steps=6", "distill.num_workers=2", "distill.sequences_per_step=2", "--fresh"),
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert [record["step"] for record in read_log(run_dir / "draft")] == [1, 2, 3, 4, 5, 6]
    summary = json.loads((run_dir / "draft" / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["sequences"] == 8


def test_another_setting_is_refused_by_name(run_dir: Path) -> None:
    steps = "distill.max_steps=6"
    begun = subprocess.run(command(run_dir, steps, "--fresh"), capture_output=True, text=True, check=False)
    assert begun.returncode == 0, begun.stderr
    finished = subprocess.run(command(run_dir, steps, "distill.seed=9"), capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1].startswith("error: distill.seed: is 9, but")


def test_a_training_that_diverges_ends_and_says_so(run_dir: Path) -> None:
    given = "distill.max_steps=40", "distill.log_every_steps=5", "distill.learning_rate=1e30", "distill.max_failures=0"
    finished = subprocess.run(command(run_dir, *given, "--fresh"), capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    said = finished.stderr.splitlines()[-1]
    assert re.match(
        r"error: distill\.learning_rate: (loss|grad_norm) is (nan|inf) by step \d+: the training diver", said
    )
    assert not (run_dir / "draft" / "final").exists()
