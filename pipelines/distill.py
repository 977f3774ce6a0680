"""Trajectories to a draft or a student: `python -m pipelines.distill recipe.yaml [section.field=value ...]`.

With a `student` section a diffusion LM is distilled from its own trajectories (certainty forcing, or discrete
forcing); without one, a DFlash draft from its target's. Every restart goes on from the newest sound checkpoint.
"""

from __future__ import annotations

import functools
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.cli import Invocation, run_pipeline
from pipelines.placement import placement
from pipelines.training import TrainingReport, train
from unmask.config import Recipe
from unmask.errors import ConfigError
from unmask.recipe import to_tree
from unmask.targets import describe_target, resolve_target, unused_special_token
from unmask.teachers import check_writer, with_teacher
from unmask.trajectories import trajectories_digest, trajectories_directory

if TYPE_CHECKING:
    from actors.diffusion_jobs import StudentJob
    from actors.draft_job import DraftJob


logger = logging.getLogger(__name__)


def distill(recipe: Recipe, run_dir: Path, *, fresh: bool = False) -> TrainingReport:
    """Train on `<run_dir>/trajectories` into `<run_dir>/draft/final`, or `<run_dir>/student/final`.

    Raises:
        UserError: no trajectories, or those of another model; an earlier run with other settings or trajectories, or a
            draft or student that does not fit.
        FaultError: workers died more than `max_failures` times.
        StoppedError: SIGTERM came, and the state was saved.
    """
    texts = trajectories_digest(run_dir)
    run_dir = run_dir.absolute()
    if recipe.student is None:
        job, folder, sections = _draft_job, "draft", ("target", "draft", "distill")
        if recipe.draft.go_on_from:
            # What the recipe leaves open is recorded as it is trained.
            recipe = replace(recipe, distill=recipe.distill.further())
    else:
        job, folder, sections = _student_job, "student", ("target", "student")
    make_job = functools.partial(job, recipe, run_dir)
    return train(recipe, "distill", run_dir / folder, sections, make_job, fresh=fresh, texts=texts)


def _draft_job(recipe: Recipe, run_dir: Path) -> DraftJob:
    from transformers import AutoConfig, AutoTokenizer

    from actors.draft_job import DraftJob
    from unmask.checkpoints import load_confidence
    from unmask.models.draft_start import draft_sizes

    target_path = resolve_target(recipe.target.model, recipe.target.revision)
    record = describe_target(target_path)
    check_writer(trajectories_directory(run_dir), record)
    tokenizer = AutoTokenizer.from_pretrained(target_path, local_files_only=True)
    start = recipe.draft.go_on_from
    if start and not recipe.distill.confidence_weight and load_confidence(start) is not None:
        logger.warning("the confidence head of '%s' is left out: distill.confidence_weight is 0", start)
    mask = recipe.draft.mask_token_id
    mask = unused_special_token(tokenizer) if mask is None else mask
    return DraftJob(
        recipe_tree=to_tree(recipe) | {"run_dir": str(run_dir)},
        target_path=str(target_path),
        target_record=record,
        draft=draft_sizes(AutoConfig.from_pretrained(target_path, local_files_only=True), recipe.draft, mask),
        run_dir=str(run_dir),
    )


def _student_job(recipe: Recipe, run_dir: Path) -> StudentJob:
    from actors.diffusion_jobs import StudentJob
    from unmask.models import families

    target = with_teacher(recipe, run_dir).target
    teacher = resolve_target(target.model, target.revision)
    if families.read(teacher).attention != "bidirectional":
        raise ConfigError(f"'{teacher}' is no bidirectional diffusion LM; adapt one first", field="student.teacher")
    record = describe_target(teacher)
    check_writer(trajectories_directory(run_dir), record)
    return StudentJob(
        recipe_tree=to_tree(recipe) | {"run_dir": str(run_dir)},
        run_dir=str(run_dir),
        source=str(teacher),
        record=record,
    )


def main(invocation: Invocation) -> str:
    """Run the stage; the last line to print."""
    return str(distill(invocation.recipe, Path(invocation.recipe.run_dir), fresh=invocation.fresh))


if __name__ == "__main__":
    sys.exit(
        run_pipeline(
            main, description=(__doc__ or "").splitlines()[0], plan=lambda recipe: placement(recipe, "distill")
        )
    )
