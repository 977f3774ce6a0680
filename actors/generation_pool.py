"""The pool of generation actors, scaled by Ray Data between the recipe's bounds."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.cluster import connect, explain
from actors.heartbeat import Watch
from actors.placement import require_room
from unmask.config import Recipe
from unmask.manifest import read_run_id
from unmask.placement import stage_demands
from unmask.types import TargetRecord

_WAVE_TASKS = 2_500
"""Tasks of one execution: of each one Ray Data keeps 40 kB in the driver until the execution ends."""

_TASK_ROWS = 4_096
"""Shards share a task up to this many rows: a task reports, and is retried, as a whole."""

_BATCHES_IN_FLIGHT = 3
"""Rows that an actor has in hand, in batches of its engine. A shard ends with its longest response, so that up to half
of the rows in hand are done already: with one and a half batches the engine's ran a quarter empty."""

_TOKEN_S = 1.0
"""The longest that a token of a response may take: an engine that is slower than that counts as one that hangs."""

_BEAT_S = 30.0
"""How often an actor says that it goes on: all touch one file."""

_DECIMALS = 10**5

_FULL_SHARE = 0.9
"""Of what all actors may have in hand: from there on another is started. Ray Data's own 1.75 counts tasks that queue in
front of an actor; here all that an actor has been given it runs."""

_ENGINE_SEQUENCES = 256
"""Sequences that vLLM runs at once unless `target.engine.max_num_seqs` says otherwise."""

_ENGINE_ROWS = 32
"""Rows that a diffusion engine runs at once unless `target.engine.max_rows` says otherwise."""


def run_shards(
    recipe: Recipe,
    directory: Path,
    record: TargetRecord,
    shards: list[int],
    engine_factory: Callable[..., Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Finish shards on a pool of `actors.generator.Generator`; yield the summary of each, as they finish.

    More shards than one execution's tasks may hold are run in waves, each with new actors.

    A task whose actor died is retried without end on another actor; the actors themselves count attempts and
    quarantine a row that keeps killing its engine. It is a fault if on no actor a row is finished for as long as Ray
    Data's `RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S` (half an hour; -1 for ever) and the time of a slow response.

    Args:
        directory: the run's `trajectories` folder, with staged prompts.
        shards: numbers of the shards to finish; not empty.

    Raises:
        UserError: an actor found the recipe impossible on its node.
        FaultError: actors could not be started, or failed for a reason that retries do not mend.
    """
    config = recipe.generate
    connect(num_cpus=config.min_actors * config.cpus_per_actor, num_gpus=config.min_actors * config.gpus_per_actor)
    require_room(stage_demands(recipe)["generate"])
    limit_s = _silence_limit(config.max_new_tokens)
    arguments = {
        "recipe": recipe,
        "directory": str(directory.absolute()),
        "record": record,
        "run_id": read_run_id(directory),
        # Far more often than it would be missed.
        "beat_every_s": min(_BEAT_S, limit_s / 10),
        "engine_factory": engine_factory,
    }
    shards_per_task = shards_of_a_task(len(shards), config.rows_per_shard)
    for start in range(0, len(shards), _WAVE_TASKS * shards_per_task):
        wave = shards[start : start + _WAVE_TASKS * shards_per_task]
        yield from _run_wave(recipe, arguments, wave, shards_per_task, Watch(directory, limit_s))


def shards_of_a_task(num_shards: int, rows_per_shard: int) -> int:
    """Shards that share a task: as few as one wave allows, and no more rows than a task may hold."""
    return max(1, min(math.ceil(num_shards / _WAVE_TASKS), _TASK_ROWS // rows_per_shard))


def _run_wave(
    recipe: Recipe, arguments: dict[str, Any], shards: list[int], shards_per_task: int, watch: Watch
) -> Iterator[dict[str, Any]]:
    """One execution of Ray Data."""
    import ray

    from actors.generator import Generator

    config = recipe.generate
    num_tasks = math.ceil(len(shards) / shards_per_task)
    in_flight = _tasks_in_flight(recipe, shards_per_task)
    dataset = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=num_tasks).map_batches(
        Generator,
        fn_constructor_kwargs=arguments,
        # Ray Data demands a number where there are GPUs; one above a block's rows would join blocks.
        batch_size=len(shards) // num_tasks,
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
    # Ray Data's own guard sees a task when it ends, and one may take hours.
    dataset.context.execution_no_progress_timeout_s = -1
    dataset.context.custom_execution_callback_classes = [_listening(watch)]
    # Of the whole execution, not of the actors alone: Ray Data also asks the autoscaler for nodes on its own account.
    dataset.context.execution_options.label_selector = config.labels or None
    dataset.context.autoscaling_config = replace(
        dataset.context.autoscaling_config, actor_pool_util_upscaling_threshold=_FULL_SHARE
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield from dataset.iter_rows()
    except (ray.exceptions.RayError, ray.data.exceptions.ExecutionTimeoutError) as error:
        raise explain(error) from error


def _silence_limit(max_new_tokens: int) -> float:
    """Seconds without a sign of life after which no actor works any more: a wait for nodes, and a slow response."""
    from ray.data import DataContext

    allowed = DataContext.get_current().execution_no_progress_timeout_s
    return allowed + _TOKEN_S * max_new_tokens if allowed > 0 else math.inf


def _listening(watch: Watch) -> type[Any]:
    """What Ray Data makes one of for an execution and asks at each step; what it raises ends the execution."""
    from ray.data._internal.execution.execution_callback import ExecutionCallback
    from ray.data.exceptions import ExecutionTimeoutError

    class Listening(ExecutionCallback):
        def on_execution_step(self, executor: object) -> None:
            if watch.is_silent():
                raise ExecutionTimeoutError(
                    f"no actor has finished a row for {watch.limit_s:.0f} s; the logs of the actors may say why, "
                    "and RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S allows more"
                )

    return Listening


def _tasks_in_flight(recipe: Recipe, shards_per_task: int) -> int:
    """Tasks per actor that keep its engine's batch full."""
    options = recipe.target.engine
    if recipe.generate.decoder is None:
        sequences = options.get("max_num_seqs") or _ENGINE_SEQUENCES
    else:
        sequences = options.get("max_rows") or _ENGINE_ROWS
    rows = recipe.generate.rows_per_shard * recipe.generate.samples_per_prompt * shards_per_task
    return _divisor_from(max(2, math.ceil(_BATCHES_IN_FLIGHT * sequences / rows)))


def _divisor_from(wanted: int) -> int:
    """The least number from `wanted` on that divides an actor evenly.

    Ray Data rounds what a task of an actor takes of a node to five decimals, and floors what the pool needs: with a
    third for each of three tasks it asks for 1.99998 actors where it wants two, and never gets the second.
    """
    return next(number for number in itertools.count(wanted) if _DECIMALS % number == 0 or number > _DECIMALS)
