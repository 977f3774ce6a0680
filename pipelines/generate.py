"""Prompts to trajectories: `python -m pipelines.generate recipe.yaml [section.field=value ...]`.

The rows of the source are cut into shards once. Actors turn shards into files; the driver sees one small
summary a shard and keeps the manifest, so that a killed job goes on where it was.
"""

from __future__ import annotations

import functools
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from actors.generation_pool import run_shards
from actors.suspects import forget_finished
from engines.engine_options import DIFFUSION_PLACEMENT, PLACEMENT, check_engine_options
from pipelines.cli import Invocation, run_pipeline
from pipelines.placement import placement
from pipelines.progress import GenerationProgress
from unmask.config import Recipe
from unmask.errors import UserError
from unmask.files import write_json, write_text
from unmask.manifest import RUN_ID, Manifest, ManifestSaver, ShardEntry, delete_run, read_run_id
from unmask.placement import PLACING
from unmask.prompt_rows import check_source
from unmask.provenance import RUN_YAML, check_same_run, write_run
from unmask.recipe import to_tree
from unmask.staged_prompts import stage_prompts
from unmask.targets import describe_target, resolve_target
from unmask.teachers import WRITER, check_teacher, check_writer, with_teacher
from unmask.trajectories import inspect_shard
from unmask.types import TargetRecord

_MAY_CHANGE = frozenset(f"generate.{name}" for name in PLACING["generate"]) | frozenset(
    f"target.engine.{name}" for name in PLACEMENT | DIFFUSION_PLACEMENT
)
"""Fields that a resumed run may change: no response depends on them."""

_SECTIONS = ("target", "prompts", "generate")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateReport:
    """A finished generation. Rates and seconds are of this process, rows and tokens of the whole run."""

    rows: int
    quarantined: int
    tokens: int
    tokens_per_second: float
    seconds: float
    resumed_shards: int


def generate(
    recipe: Recipe,
    run_dir: Path,
    *,
    fresh: bool = False,
    engine_factory: Callable[..., Any] | None = None,
) -> GenerateReport:
    """Generate the trajectories of a recipe into `<run_dir>/trajectories`, going on with what is there.

    Args:
        run_dir: the run's folder, on storage that all nodes share.
        fresh: delete earlier trajectories of this run first.
        engine_factory: builds the engine of each actor (see `actors.generator.Generator`).

    Raises:
        UserError: a source, target, option or earlier run that does not fit, or a source with no usable row.
        FaultError: actors could not be started, or failed for a reason that retries do not mend.
    """
    directory = run_dir / "trajectories"
    tree = {name: value for name, value in to_tree(recipe).items() if name in _SECTIONS}
    check_source(recipe.prompts)
    if recipe.generate.decoder is None:
        check_engine_options(recipe.target.engine)
    if fresh:
        delete_run(directory)
    check_same_run(directory, tree, ignore=_MAY_CHANGE)
    recipe = with_teacher(recipe, run_dir)
    teacher = resolve_target(recipe.target.model, recipe.target.revision)
    check_teacher(teacher, recipe.generate.decoder)
    record = describe_target(teacher)
    check_writer(directory, record)
    run_id = _run_id(directory)
    write_run(directory, tree)
    write_json(directory / WRITER, asdict(record))
    staged = stage_prompts(
        recipe.prompts,
        directory / "prompts",
        max(1, recipe.generate.rows_per_shard // recipe.generate.samples_per_prompt),
    )
    manifest = Manifest.load(directory)
    manifest.reconcile(directory, functools.partial(inspect_shard, run_id=run_id))
    forget_finished(directory, manifest.entries.keys())
    resumed = len(manifest.entries)
    pending = manifest.pending(range(staged.num_shards))
    summaries = run_shards(_pinned(recipe, record), directory, record, pending, engine_factory) if pending else iter(())
    done = sum(entry.rows + entry.quarantined for entry in manifest.entries.values())
    total = staged.num_rows * recipe.generate.samples_per_prompt
    with GenerationProgress(total, done, recipe.generate.progress_every_s) as progress:
        _record(summaries, manifest, directory, progress)
    return _report(manifest, progress, resumed)


def _run_id(directory: Path) -> str:
    """The run's id: a new one for a run that begins now, none for one that began when runs had none."""
    if not (directory / RUN_ID).exists() and not (directory / RUN_YAML).exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / RUN_ID, uuid.uuid4().hex)
    return read_run_id(directory)


def _pinned(recipe: Recipe, record: TargetRecord) -> Recipe:
    """The recipe with a branch or tag of a hub model replaced by the commit that the driver found."""
    if record.revision.startswith("sha256:"):
        return recipe
    return replace(recipe, target=replace(recipe.target, revision=record.revision))


def _record(
    summaries: Iterator[dict[str, Any]], manifest: Manifest, directory: Path, progress: GenerationProgress
) -> None:
    """Enter shards into the manifest as they finish, saving it now and then and at the end."""
    saver = ManifestSaver(manifest, directory, every_s=5.0)
    try:
        for summary in summaries:
            entry = ShardEntry(**{field.name: summary[field.name] for field in fields(ShardEntry)})
            manifest.entries[summary["shard"]] = entry
            progress.add(entry.rows + entry.quarantined, entry.tokens)
            saver.save_if_due()
    finally:
        manifest.save(directory)


def _report(manifest: Manifest, progress: GenerationProgress, resumed_shards: int) -> GenerateReport:
    entries = manifest.entries.values()
    report = GenerateReport(
        rows=sum(entry.rows for entry in entries),
        quarantined=sum(entry.quarantined for entry in entries),
        tokens=sum(entry.tokens for entry in entries),
        tokens_per_second=progress.tokens_per_second,
        seconds=progress.seconds,
        resumed_shards=resumed_shards,
    )
    if not report.rows:
        raise UserError(
            f"all {report.quarantined} rows were refused; the quarantine files hold the reasons", field="prompts.source"
        )
    return report


def main(invocation: Invocation) -> str:
    """Run the stage; the last line to print."""
    report = generate(invocation.recipe, Path(invocation.recipe.run_dir), fresh=invocation.fresh)
    return (
        f"{report.rows} trajectories, {report.quarantined} quarantined, {report.tokens} tokens "
        f"({report.tokens_per_second:.0f} tokens/s, {report.seconds:.0f} s, {report.resumed_shards} shards resumed) "
        f"in {invocation.recipe.run_dir}/trajectories"
    )


if __name__ == "__main__":
    sys.exit(
        run_pipeline(
            main, description=(__doc__ or "").splitlines()[0], plan=lambda recipe: placement(recipe, "generate")
        )
    )
