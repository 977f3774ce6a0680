"""A training on the cluster, driven from here: Ray Train places the workers and restarts them."""

from __future__ import annotations

import os

from actors.cluster import connect, explain
from actors.placement import require_room
from actors.stop_request import StoppedError, StopRequest
from unmask.placement import Demand

_MAX_STARTS = 10
"""How often a group of workers that could not be started is tried; Ray would try for ever."""


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

    Raises:
        UserError: what a worker found wrong with recipe or data.
        FaultError: workers died more than `max_failures` times.
        StoppedError: SIGTERM came, and the state was saved.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    from actors.learner import SUMMARY, learn

    trainer = TorchTrainer(
        learn,
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
    request = StopRequest(job.directory)
    request.clear()
    (job.directory / SUMMARY).unlink(missing_ok=True)
    with request.by_sigterm():
        try:
            trainer.fit()
        except TrainingFailedError as error:  # It wraps what a worker raised; only the cause tells mistake from fault.
            raise explain(error) from error
    if request.is_made() and not (job.directory / SUMMARY).is_file():
        raise StoppedError(f"stopped; the state is in '{job.directory}'")
