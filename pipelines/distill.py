"""Trajectories to a draft: `python -m pipelines.distill recipe.yaml [section.field=value ...]`.

Ray Train places the workers and restarts them; every restart goes on from the newest sound checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from actors.cluster import connect, explain
from pipelines.cli import Invocation, run_pipeline
from unmask.config import Recipe
from unmask.provenance import check_same_run, write_run
from unmask.recipe import to_tree
from unmask.targets import describe_target, resolve_target, unused_special_token
from unmask.trajectories import trajectories_directory

_SECTIONS = ("target", "draft", "distill")
_MAY_CHANGE = frozenset(
    f"distill.{name}"
    for name in ("num_workers", "cpus_per_worker", "use_gpu", "threads_per_worker", "feature_cache_gb",
                 "checkpoint_every_s", "log_every_steps", "max_failures", "max_steps", "max_seconds")
)  # fmt: skip
"""Fields that a resumed run may change: they set where and how long it runs, not what it learns from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillReport:
    """A finished training. `seconds` is optimiser time, resumed parts included."""

    steps: int
    loss_first: float
    loss_last: float
    seconds: float
    sequences: int
    draft: str


def distill(recipe: Recipe, run_dir: Path, *, fresh: bool = False) -> DistillReport:
    """Train the draft of a recipe on `<run_dir>/trajectories` into `<run_dir>/draft/final`.

    Raises:
        UserError: no trajectories, an earlier run with other settings, or a draft that does not fit the target.
        FaultError: workers died more than `distill.max_failures` times.
    """
    directory = run_dir / "draft"
    tree = {name: value for name, value in to_tree(recipe).items() if name in _SECTIONS} | {"run_dir": recipe.run_dir}
    trajectories_directory(run_dir)
    if fresh:
        shutil.rmtree(directory, ignore_errors=True)
    check_same_run(directory, tree, ignore=_MAY_CHANGE)
    write_run(directory, tree)
    _train(recipe, run_dir)
    summary = json.loads((directory / "summary.json").read_text())
    return DistillReport(**summary, draft=str(directory / "final"))


def _train(recipe: Recipe, run_dir: Path) -> None:
    # Ray's default of two seconds between polls would hold back every report for that long.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    config = recipe.distill
    # Before anything of Ray is imported: it reads its authentication mode once.
    connect(
        num_cpus=config.num_workers * config.cpus_per_worker + 1, num_gpus=config.num_workers if config.use_gpu else 0
    )
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    from actors.learner import learn

    spec = _spec(recipe, run_dir)
    trainer = TorchTrainer(
        learn,
        train_loop_config={"spec": spec},
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker, **({"GPU": 1} if config.use_gpu else {})},
        ),
        run_config=RunConfig(
            name="ray_train",
            storage_path=str((run_dir / "draft").absolute()),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:  # It wraps what a worker raised; only the cause tells mistake from fault.
        raise explain(error) from error


def _spec(recipe: Recipe, run_dir: Path):
    from transformers import AutoConfig, AutoTokenizer

    from actors.learner import LearnerSpec
    from unmask.models.draft_start import draft_sizes

    target_path = resolve_target(recipe.target.model, recipe.target.revision)
    tokenizer = AutoTokenizer.from_pretrained(target_path, local_files_only=True)
    mask = recipe.draft.mask_token_id
    mask = unused_special_token(tokenizer) if mask is None else mask
    sizes = draft_sizes(AutoConfig.from_pretrained(target_path, local_files_only=True), recipe.draft, mask)
    tree = to_tree(recipe) | {"run_dir": str(run_dir.absolute())}
    return LearnerSpec(
        recipe=tree,
        target_path=str(target_path),
        target_record=describe_target(target_path),
        draft=sizes,
        run_dir=str(run_dir.absolute()),
    )


def placement(recipe: Recipe) -> str:
    """What `--plan` says of this stage."""
    config = recipe.distill
    kind = "1 GPU" if config.use_gpu else "no GPU"
    return f"# distill: {config.num_workers} workers, each {config.cpus_per_worker:g} CPUs and {kind}\n"


def main(invocation: Invocation) -> str:
    """Run the stage; the last line to print."""
    report = distill(invocation.recipe, Path(invocation.recipe.run_dir), fresh=invocation.fresh)
    return (
        f"{report.steps} steps in {report.seconds:.0f} s, loss {report.loss_first:.3f} to {report.loss_last:.3f}; "
        f"draft in {report.draft}"
    )


if __name__ == "__main__":
    sys.exit(run_pipeline(main, description=(__doc__ or "").splitlines()[0], plan=placement))
