"""Training on made-up trajectories for a `Trial`: it does not mind what they say."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from tests.fault.job import Job, exit_codes, finish, start
from tests.fault.record import Finding, equal
from tests.fault.trial import Trial
from unmask.manifest import Manifest
from unmask.training.training_log import read_log
from unmask.trajectories import write_shard
from unmask.types import Trajectory


def training(run_dir: Path, target: Path, address: str, lengths: Sequence[int], **distill: object) -> Job:
    """A training that has not begun.

    Args:
        lengths: tokens of each trajectory's response.
        distill: the recipe's section of that name, besides what is the same in all tests.
    """
    rows = [
        Trajectory(
            sample_id=str(i),
            prompt_ids=[1, 40 + i, 50, 60],
            response_ids=[100 + (i * j) % 7 for j in range(length)],
            finish_reason="length",
            num_forwards=length,
            teacher="made-up",
            teacher_revision="0",
            decode_config="0",
        )
        for i, length in enumerate(lengths)
    ]
    Manifest({0: write_shard(run_dir / "trajectories", 0, rows, [])}).save(run_dir / "trajectories")
    tree = {
        "run_dir": str(run_dir),
        "target": {"model": str(target), "max_model_len": 256},
        "draft": {"num_layers": 1, "block_size": 4, "num_target_features": 2},
        "distill": {
            "max_seconds": None,
            "precision": "float32",
            "head_negatives": 256,
            "log_every_steps": 1,
            "threads_per_worker": 1,
            **distill,
        },
    }
    path = run_dir / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return Job(module="pipelines.distill", recipe=path, run_dir=run_dir, address=address)


def log_of(job: Job) -> list[dict]:
    """Its log; steps that were taken again stand in it twice."""
    path = job.run_dir / "draft"
    return read_log(path) if (path / "log.jsonl").is_file() else []


def undisturbed_losses(job: Job) -> dict[int, float]:
    """Run it to its end; its losses by step."""
    [ended] = Trial(events=[start, finish], checks=[exit_codes([0])]).play(job)
    assert ended.met, ended
    log = log_of(job)
    assert [record["step"] for record in log] == list(range(1, len(log) + 1))
    return {record["step"]: record["loss"] for record in log}


def all_steps(count: int) -> Callable[[Job], list[Finding]]:
    """Check: every step is in the log, and the summary knows them."""

    def check(job: Job) -> list[Finding]:
        summary = json.loads((job.run_dir / "draft" / "summary.json").read_text())
        return [
            equal("steps in the log", len({record["step"] for record in log_of(job)}), count),
            equal("steps taken", summary["steps"], count),
        ]

    return check
