"""A training on the cluster, driven from here: Ray Train places the workers and restarts them."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from actors.cluster import connect, explain
from actors.placement import live_nodes, require_room
from actors.stop_request import StoppedError, StopRequest
from unmask.placement import Demand, shortage

logger = logging.getLogger(__name__)

_MAX_STARTS = 10
"""How often a group of workers that could not be started is tried; Ray would try for ever."""

_LOOK_S = 5.0
_LOOKS_TO_TELL = 6
"""How often it is looked whether the nodes suffice, and after how many looks the log says again that they do not."""


def connect_for(demand: Demand) -> None:
    """Join or start the cluster that a training runs on. Call it before anything else of Ray is imported.

    Raises:
        ConfigError, FaultError: see `connect` and `require_room`.
    """
    # Ray's default of two seconds between polls would hold back every report for that long.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    cpus, gpus = demand.resources.get("CPU", 0), demand.resources.get("GPU", 0)
    connect(num_cpus=demand.most * cpus + 1, num_gpus=demand.most * gpus)
    require_room([demand])


def run_training(job, demand: Demand) -> None:
    """Run a `actors.learner.TrainingJob` to the end of its budget, going on with what is there.

    While the nodes do not suffice for the least of workers the training waits, and the log says for what.

    Raises:
        UserError: what a worker found wrong with recipe or data.
        ConfigError: the installed Ray is not the one that this was written for.
        FaultError: workers died more than `max_failures` times.
        StoppedError: SIGTERM came, and the state was saved or, where no worker ran, is that of the last checkpoint.
        KeyboardInterrupt: Ctrl-C or a second SIGTERM came; the state is that of the last checkpoint.
    """
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    from actors.cluster_trainer import ClusterTrainer
    from actors.learner import SUMMARY, learn

    request = StopRequest(job.directory)
    trainer = ClusterTrainer(
        learn,
        demand=demand,
        request=request,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=demand.most if demand.least == demand.most else (demand.least, demand.most),
            use_gpu="GPU" in demand.resources,
            # A resize goes back to the last checkpoint: no use in looking for nodes more often than one is saved.
            elastic_resize_monitor_interval_s=job.config.checkpoint_every_s,
            label_selector=dict(demand.labels) or None,
            resources_per_worker=dict(demand.resources),
        ),
        run_config=RunConfig(
            name="ray_train",
            storage_path=str(job.directory),
            failure_config=FailureConfig(max_failures=job.config.max_failures, controller_failure_limit=_MAX_STARTS),
        ),
    )
    request.clear()
    (job.directory / SUMMARY).unlink(missing_ok=True)
    with request.by_sigterm(), _shortage_told(demand):
        try:
            trainer.fit()
        except TrainingFailedError as error:  # It wraps what a worker raised; only the cause tells mistake from fault.
            if not isinstance(getattr(error, "controller_failure", None), StoppedError):
                raise explain(error) from error
        except KeyboardInterrupt:
            trainer.abort()
            raise
    if request.is_made() and not (job.directory / SUMMARY).is_file():
        raise StoppedError(f"stopped; the state is in '{job.directory}'")


@contextmanager
def _shortage_told(demand: Demand) -> Iterator[None]:
    """Inside, the log says what nodes lack for the least of a demand: Ray's controller says it where nobody reads."""
    over = threading.Event()
    teller = threading.Thread(target=_tell_shortage, args=(demand, over), name="shortage", daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join(_LOOK_S)


def _tell_shortage(demand: Demand, over: threading.Event) -> None:
    least, looks = replace(demand, most=demand.least), 0
    while not over.wait(_LOOK_S):
        problem = shortage([least], live_nodes())
        if problem is None:
            looks = 0
            continue
        if looks % _LOOKS_TO_TELL == 0:
            logger.info("waiting for nodes: %s; SIGTERM ends it", problem)
        looks += 1
