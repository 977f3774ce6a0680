"""Ray clusters that tests start by `ray start`: token, folder and ports of their own, ended by process id."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

_MARK = "UNMASK_TEST_CLUSTER"
_HEAD_ID = "f" * 51 + "00000"
"""The node id that Ray's fake provider expects of a head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A running head node, and how clients reach it."""

    address: str
    dashboard: str
    folder: Path
    environment: dict[str, str]
    """Of a client process that has the token."""

    def processes(self) -> list[int]:
        """Every process that this cluster has started, by the mark that all inherit."""
        mark = f"{_MARK}={self.folder}".encode()
        return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if mark in read(path)]


@contextmanager
def ray_head(*options: str, environment: Mapping[str, str] | None = None, ports: Mapping[str, int] | None = None):
    """A head with token authentication on loopback ports; all its processes are killed at the end.

    Args:
        options: more of `ray start`.
        environment: more variables for the cluster's processes.
        ports: of `port` and `dashboard-port`, where they must be known before.
    """
    folder = Path(tempfile.mkdtemp(prefix="u"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port", "metrics-export-port")
    ports = {name: free_port() for name in names} | dict(ports or {})
    client = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    head = Head(
        address=f"127.0.0.1:{ports['port']}",
        dashboard=f"http://127.0.0.1:{ports['dashboard-port']}",
        folder=folder,
        environment=client,
    )
    command = [str(BIN / "ray"), "start", "--head", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats", *options]
    try:
        # Ray gives a node 30 seconds to appear, which is short on a machine that others load.
        for _ in range(3):
            started = subprocess.run(
                command,
                env=client | {_MARK: str(folder), "RAY_memory_monitor_refresh_ms": "0"} | dict(environment or {}),
                check=False,
                capture_output=True,
                text=True,
                timeout=200,
            )
            if started.returncode == 0:
                break
            kill(head)
        assert started.returncode == 0, started.stdout + started.stderr
        yield head
    finally:
        kill(head)
        shutil.rmtree(folder, ignore_errors=True)


def kill(head: Head) -> None:
    """Kill what the cluster has started, until nothing is left."""
    while left := head.processes():
        for process in left:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)


@contextmanager
def fake_cluster(node_types: Mapping[str, Mapping[str, Any]], *, idle_s: float) -> Iterator[Head]:
    """A head without CPUs whose autoscaler adds fake nodes (raylets on this machine) of the given types.

    Args:
        node_types: as in a file of Ray's launcher.
        idle_s: after which an idle node is given back.
    """
    port = free_port()
    config = {
        "cluster_name": "fake",
        "max_workers": 8,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": idle_s / 60,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "head_node_id": _HEAD_ID,
            "gcs_address": f"127.0.0.1:{port}",
            "launch_multiple": True,
        },
        # The fake provider knows its head by this name alone.
        "available_node_types": {"ray.head.default": {"resources": {"CPU": 0}, "node_config": {}}} | dict(node_types),
        "head_node_type": "ray.head.default",
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    } | {
        f"{name}_commands": []
        for name in ("setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray", "initialization")
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config, file)
        file.flush()
        with ray_head(
            "--num-cpus=0",
            "--num-gpus=0",
            "--include-dashboard=false",
            f"--autoscaling-config={file.name}",
            environment={
                "RAY_FAKE_CLUSTER": "1",
                "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            },
            ports={"port": port},
        ) as head:
            yield head


def wait_until(condition: Callable[[], Any], seconds: float) -> Any:
    """The condition's first truthy value; fails after the time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited for {seconds} s")
        time.sleep(0.2)
    return value


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def read(path: Path) -> bytes:
    """A file of /proc, which may be gone."""
    try:
        return path.read_bytes()
    except OSError:
        return b""
