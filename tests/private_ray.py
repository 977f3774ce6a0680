"""A Ray of this process's own, on which a service is tested or measured."""

from __future__ import annotations

import os
from pathlib import Path

from actors.cluster import RAY_ENVIRONMENT

ROOT = Path(__file__).parents[1]

MARK = "UNMASK_FAULT_TEST"
"""An environment variable of every process that a test has started, so that no other is ever touched."""


def start_private_ray() -> None:
    """Start it, with more CPUs than there are: nothing under test waits for one. `ray.shutdown` ends it."""
    mark = str(os.getpid())
    # Other work on this machine may fill its memory; that shall not end replicas under test.
    os.environ.update(RAY_ENVIRONMENT, RAY_AUTH_MODE="disabled", RAY_memory_monitor_refresh_ms="0", **{MARK: mark})
    import ray

    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: mark}},
    )
