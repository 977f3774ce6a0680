"""What the stages that train have in common: one run directory, resumed; one report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from actors.training_run import connect_for, run_training
from unmask.config import Recipe
from unmask.errors import ConfigError
from unmask.files import write_json
from unmask.placement import PLACING, stage_demands
from unmask.provenance import check_same_run, write_run
from unmask.recipe import to_tree

if TYPE_CHECKING:
    from actors.learner import TrainingJob

_BUDGET = frozenset({"max_steps", "max_seconds"})
"""A training that is gone on with may go on for longer."""
_TEXTS = "texts.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingReport:
    """A finished training. `seconds` is optimiser time, resumed parts included."""

    steps: int
    loss_first: float
    loss_last: float
    seconds: float
    sequences: int
    checkpoint: str

    def __str__(self) -> str:
        return (
            f"{self.steps} steps in {self.seconds:.0f} s, loss {self.loss_first:.3f} to {self.loss_last:.3f}; "
            f"checkpoint in {self.checkpoint}"
        )


def train(
    recipe: Recipe,
    stage: str,
    directory: Path,
    sections: tuple[str, ...],
    make_job: Callable[[], TrainingJob],
    *,
    fresh: bool,
    texts: str | None = None,
) -> TrainingReport:
    """Train into `<directory>/final`, going on from the newest sound checkpoint in `<directory>/checkpoints`.

    Args:
        stage: its name in `stage_demands`.
        sections: of the recipe, which a resumed run may not change but for placement and budget of the last one.
        make_job: called with Ray connected and the run's records written.
        fresh: delete an earlier training first.
        texts: digest of the trajectories that it trains on, which a resumed run may not change.

    Raises:
        UserError: an earlier run with other settings or trajectories, and what `make_job` and the workers raise.
        FaultError: workers died more than `max_failures` times.
        StoppedError: SIGTERM came, and the state was saved.
    """
    tree = {name: value for name, value in to_tree(recipe).items() if name in sections} | {"run_dir": recipe.run_dir}
    if fresh:
        shutil.rmtree(directory, ignore_errors=True)
    may_change = PLACING[sections[-1]] | _BUDGET
    check_same_run(directory, tree, ignore=frozenset(f"{sections[-1]}.{name}" for name in may_change))
    if texts is not None:
        _check_same_texts(directory, texts)
    write_run(directory, tree)
    [demand] = stage_demands(recipe)[stage]
    connect_for(demand)
    run_training(make_job(), demand)
    summary = json.loads((directory / "summary.json").read_text())
    return TrainingReport(**summary, checkpoint=str(directory / "final"))


def _check_same_texts(directory: Path, digest: str) -> None:
    """Refuse to go on with a training on other trajectories, which would tell of a draft that has not seen them."""
    path = directory / _TEXTS
    before = json.loads(path.read_text())["trajectories"] if path.is_file() else None
    if before not in (None, digest):
        raise ConfigError(
            f"its trajectories are others than those that '{directory}' was begun with; put them back, or pass "
            "--fresh to start over",
            field="run_dir",
        )
    directory.mkdir(parents=True, exist_ok=True)
    write_json(path, {"trajectories": digest})
