"""F10: training whose worker or driver is killed, or that is told to stop, goes on to the last bit."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.fault.record import at_most, conclude, equal
from tests.fault.scenario import wait_until
from tests.private_ray import MARK
from unmask.manifest import Manifest
from unmask.training.training_log import read_log
from unmask.trajectories import write_shard
from unmask.types import Trajectory

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]
STEPS = 300
CHECKPOINT_S = 0.3
WRITING = "The newest checkpoint was still being written: training goes on meanwhile."
RECIPE = """
run_dir: {run_dir}
target: {{model: {target}, max_model_len: 256}}
draft: {{num_layers: 1, block_size: 4, num_target_features: 2}}
distill:
  max_seconds: null
  max_steps: {steps}
  sequences_per_step: 2
  anchors_per_sequence: 8
  precision: float32
  head_negatives: 256
  checkpoint_every_s: {checkpoint_s}
  log_every_steps: 1
  threads_per_worker: 1
"""


def write_run(run_dir: Path, target: Path) -> Path:
    """A run with a few made-up trajectories: training does not mind what they say."""
    rows = [
        Trajectory(
            sample_id=str(i),
            prompt_ids=[1, 40 + i, 50, 60],
            response_ids=[100 + (i * j) % 7 for j in range(24)],
            finish_reason="length",
            num_forwards=24,
            teacher="made-up",
            teacher_revision="0",
            decode_config="0",
        )
        for i in range(16)
    ]
    Manifest({0: write_shard(run_dir / "trajectories", 0, rows, [])}).save(run_dir / "trajectories")
    recipe = run_dir / "recipe.yaml"
    recipe.write_text(RECIPE.format(run_dir=run_dir, target=target, steps=STEPS, checkpoint_s=CHECKPOINT_S))
    return recipe


def start(recipe: Path, address: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.distill", str(recipe)],
        env=os.environ | {"RAY_ADDRESS": address, "HF_HUB_OFFLINE": "1"},
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def finish(driver: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and standard error."""
    _, errors = driver.communicate(timeout=280)
    return driver.returncode, errors


@pytest.fixture(scope="module")
def address(ray_cluster: None) -> str:
    import ray

    return ray.get_runtime_context().gcs_address


@pytest.fixture(scope="module")
def losses(address: str, target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the undisturbed run, by step."""
    run_dir = tmp_path_factory.mktemp("whole")
    code, errors = finish(start(write_run(run_dir, target_dir), address))
    assert code == 0, errors
    log = read_log(run_dir / "draft")
    assert [record["step"] for record in log] == list(range(1, STEPS + 1))
    return {record["step"]: record["loss"] for record in log}


def workers() -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if "RayTrainWorker" in _name(process)]


def kill_worker(driver: subprocess.Popen[str]) -> None:
    [worker] = workers()
    worker.kill()


def kill_driver(driver: subprocess.Popen[str]) -> None:
    driver.kill()


def stop(driver: subprocess.Popen[str]) -> None:
    driver.send_signal(signal.SIGTERM)


def _name(process: psutil.Process) -> str:
    try:
        return "".join(process.cmdline()) if process.environ().get(MARK) == str(os.getpid()) else ""
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "strike"),
    [
        ("SIGKILL of the worker", kill_worker),
        ("SIGKILL of the driver", kill_driver),
        ("SIGTERM to the driver", stop),
    ],
)
def test_losses_are_those_of_the_undisturbed_run(
    address: str,
    target_dir: Path,
    losses: dict[int, float],
    tmp_path: Path,
    event: str,
    strike: Callable[[subprocess.Popen[str]], None],
) -> None:
    recipe = write_run(tmp_path, target_dir)
    draft = tmp_path / "draft"
    driver = start(recipe, address)
    wait_until(
        lambda: ((draft / "checkpoints").is_dir() and len(steps_in(draft)) > 50) or driver.poll() is not None, 200
    )
    assert driver.poll() is None, "it ended before anything happened"
    struck_at = max(steps_in(draft))
    struck = workers()
    strike(driver)
    # Until then it may have finished one checkpoint more.
    _, alive = psutil.wait_procs(struck, 120)
    assert not alive
    newest, findings = newest_checkpoint(draft), []
    code, errors = finish(driver)
    if strike is stop:
        findings += [
            equal("exit code of the stopped run", code, 130),
            equal("steps lost", max(steps_in(draft)) - newest_checkpoint(draft), 0),
        ]
    if strike is not kill_worker:
        code, errors = finish(start(recipe, address))
    assert code == 0, errors
    log = read_log(draft)
    resumed_at = next((i for i in range(1, len(log)) if log[i]["step"] != log[i - 1]["step"] + 1), None)
    again = 0 if resumed_at is None else log[resumed_at - 1]["step"] - log[resumed_at]["step"] + 1
    a_step = (log[-1]["seconds"] - log[0]["seconds"]) / STEPS
    if strike is not stop:
        # A stopped training saves its last step: nothing of it is taken again.
        # One that is struck right behind a checkpoint takes none again either.
        findings += [
            equal("times that its first step was taken", sum(record["step"] == 1 for record in log), 1),
            equal("it was struck before its end", struck_at < STEPS, True),
            at_most("lost training time", again * a_step, CHECKPOINT_S, reason=WRITING),
        ]
        if resumed_at is not None:
            # No more than what came after the newest checkpoint.
            findings.append(equal("checkpoint gone on from", log[resumed_at]["step"] - 1, newest))
    findings += [
        equal("steps in the log", len({record["step"] for record in log}), STEPS),
        equal("losses that differ in any bit", sum(record["loss"] != losses[record["step"]] for record in log), 0),
        equal("steps taken", json.loads((draft / "summary.json").read_text())["steps"], STEPS),
    ]
    scale = f"{STEPS} steps, {again} taken twice (a checkpoint every {CHECKPOINT_S / a_step:.0f})"
    conclude("F10", event, scale, findings)


def steps_in(draft: Path) -> list[int]:
    return [record["step"] for record in read_log(draft)]


def newest_checkpoint(draft: Path) -> int:
    """0 is none."""
    paths = (draft / "checkpoints").glob("step-*")
    return max((int(re.sub(r"\D", "", path.name)) for path in paths), default=0)
