"""A causal LM to a masked-diffusion LM: `python -m pipelines.adapt recipe.yaml [section.field=value ...]`.

The target learns to denoise the responses of `adapt.data`, under attention that is bidirectional (a teacher) or
block-causal. Every restart goes on from the newest sound checkpoint.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.cli import Invocation, run_pipeline
from pipelines.placement import placement
from pipelines.training import TrainingReport, train
from unmask.config import AdaptConfig, Recipe
from unmask.errors import CheckpointError, ConfigError
from unmask.prompt_rows import check_source
from unmask.recipe import to_tree
from unmask.targets import describe_target, resolve_target, unused_special_token

if TYPE_CHECKING:
    from actors.diffusion_jobs import AdaptJob


def adapt(recipe: Recipe, run_dir: Path, *, fresh: bool = False) -> TrainingReport:
    """Train `target.model` into `<run_dir>/teacher/final`.

    Raises:
        UserError: no `adapt` section, data that cannot be used, an earlier run with other settings, or a target of a
            shape that cannot be adapted.
        FaultError: workers died more than `adapt.max_failures` times.
        StoppedError: SIGTERM came, and the state was saved.
    """
    config = recipe.adapt
    if config is None:
        raise ConfigError("the recipe has no such section; give it, if only as `adapt: {}`", field="adapt")
    check_source(config.data)
    run_dir = run_dir.absolute()
    job = functools.partial(_job, recipe, config, run_dir)
    return train(recipe, "adapt", run_dir / "teacher", ("target", "adapt"), job, fresh=fresh)


def _job(recipe: Recipe, config: AdaptConfig, run_dir: Path) -> AdaptJob:
    from transformers import AutoTokenizer

    from actors.diffusion_jobs import TEXTS, AdaptJob
    from unmask.models import families
    from unmask.prompts import PromptBuilder
    from unmask.training.texts import stage_texts

    source = resolve_target(recipe.target.model, recipe.target.revision)
    network = families.read(source)
    if network.attention != "causal":
        raise CheckpointError("is a diffusion LM already; leave the adapt section out", field="target.model")
    if not network.eos_ids:
        raise CheckpointError(f"the config.json of '{source}' names no eos_token_id", field="target.model")
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    mask = unused_special_token(tokenizer) if config.mask_token_id is None else config.mask_token_id
    builder = PromptBuilder(
        tokenizer,
        config.data,
        max_prompt_len=recipe.target.max_model_len - config.response_length,
        mask_token_id=mask,
    )
    job = AdaptJob(
        recipe_tree=to_tree(recipe) | {"run_dir": str(run_dir)},
        run_dir=str(run_dir),
        source=str(source),
        record=describe_target(source),
        mask_id=mask,
    )
    stage_texts(config, builder, tokenizer, job.directory / TEXTS)
    return job


def main(invocation: Invocation) -> str:
    """Run the stage; the last line to print."""
    return str(adapt(invocation.recipe, Path(invocation.recipe.run_dir), fresh=invocation.fresh))


if __name__ == "__main__":
    sys.exit(
        run_pipeline(main, description=(__doc__ or "").splitlines()[0], plan=lambda recipe: placement(recipe, "adapt"))
    )
