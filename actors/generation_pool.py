"""The pool of generation actors, scaled by Ray Data between the recipe's bounds."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from actors.cluster import connect, explain
from engines.offline_engine import OfflineEngine
from unmask.config import Recipe
from unmask.types import TargetRecord

_MAX_TASKS = 10_000
"""Shards are grouped into at most this many Ray tasks, whose bookkeeping is the driver's main cost."""

_ENGINE_SEQUENCES = 256
"""Sequences that vLLM runs at once unless `target.engine.max_num_seqs` says otherwise."""


def run_shards(
    recipe: Recipe,
    directory: Path,
    record: TargetRecord,
    shards: list[int],
    engine_factory: Callable[..., Any] = OfflineEngine,
) -> Iterator[dict[str, Any]]:
    """Finish shards on a pool of `actors.generator.Generator`; yield the summary of each, as they finish.

    A task whose actor died is retried without end on another actor; the actors themselves count attempts and
    quarantine a row that keeps killing its engine. Half an hour without a finished task (Ray Data's
    `RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S`) is a fault.

    Args:
        directory: the run's `trajectories` folder, with staged prompts.
        shards: numbers of the shards to finish; not empty.

    Raises:
        UserError: an actor found the recipe impossible on its node.
        FaultError: actors could not be started, or failed for a reason that retries do not mend.
    """
    config = recipe.generate
    connect(num_cpus=config.min_actors * config.cpus_per_actor, num_gpus=config.min_actors * config.gpus_per_actor)
    import ray

    from actors.generator import Generator

    num_tasks = min(len(shards), _MAX_TASKS)
    in_flight = _tasks_in_flight(recipe, math.ceil(len(shards) / num_tasks))
    dataset = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=num_tasks).map_batches(
        Generator,
        fn_constructor_kwargs={
            "recipe": recipe,
            "directory": str(directory.absolute()),
            "record": record,
            "engine_factory": engine_factory,
        },
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(
            min_size=config.min_actors,
            max_size=config.max_actors,
            max_concurrent_calls_per_actor=in_flight,
            max_tasks_in_flight_per_actor=in_flight,
        ),
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor,
        udf_modifying_row_count=False,
    )
    dataset.context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield from dataset.iter_rows()
    except (ray.exceptions.RayError, ray.data.exceptions.ExecutionTimeoutError) as error:
        raise explain(error) from error


def _tasks_in_flight(recipe: Recipe, shards_per_task: int) -> int:
    """Enough tasks per actor to keep its engine's batch full while shards at their end drain."""
    sequences = recipe.target.engine.get("max_num_seqs") or _ENGINE_SEQUENCES
    return max(2, math.ceil(1.5 * sequences / (recipe.generate.rows_per_shard * shards_per_task)))
