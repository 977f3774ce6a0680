"""A Ray of this process's own, on which a service is tested or measured."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from actors.cluster import RAY_ENVIRONMENT

ROOT = Path(__file__).parents[1]

MARK = "UNMASK_FAULT_TEST"
"""An environment variable of every process that a test has started, so that no other is ever touched."""


def use_direct_ingress() -> str:
    """Let the next private Ray's ingress replicas listen themselves; the URL of the first one."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    os.environ |= {
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(port + 8),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }
    return f"http://127.0.0.1:{port}"


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
