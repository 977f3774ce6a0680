"""A Ray cluster on this machine whose nodes can go: each has a raylet of its own."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.private_ray import MARK

ROOT = Path(__file__).parents[2]
_ENVIRONMENT = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}


class Nodes:
    """A head without room for the work, and two nodes of a role that have it.

    Args:
        role: the nodes' label `role`.
        cpus: of each node.
        foreign: nodes of another role, as large, which stay.
        environment: of the cluster's processes, besides the usual.
    """

    def __init__(self, role: str, cpus: int, *, foreign: int = 0, **environment: str) -> None:
        os.environ.update(_ENVIRONMENT, **environment)
        os.environ[MARK] = str(os.getpid())
        from ray.cluster_utils import Cluster

        self._role, self._cpus = role, cpus
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self.address = self._cluster.address
        for _ in range(foreign):
            self._new(f"not-{role}")
        self._nodes = [self._new(role) for _ in range(2)]

    def _new(self, role: str):
        return self._cluster.add_node(num_cpus=self._cpus, labels={"role": role})

    def add(self) -> None:
        """One more node."""
        self._nodes.append(self._new(self._role))

    def end(self, *, with_notice: bool) -> None:
        """End the newest node: SIGKILL all that runs on it, or SIGTERM its raylet, as before a spot node is taken."""
        self._cluster.remove_node(self._nodes.pop(), allow_graceful=with_notice)

    def replace_one(self, actors: Sequence[psutil.Process], chance: random.Random) -> None:
        """SIGKILL the raylet of a node that has some of the actors, and put another node in its place."""
        raylets = {node.all_processes["raylet"][0].process.pid: node for node in self._nodes}
        pid = chance.choice([pid for pid in (actor.ppid() for actor in actors) if pid in raylets])
        os.kill(pid, signal.SIGKILL)
        self._cluster.remove_node(raylets[pid], allow_graceful=False)
        self._nodes.remove(raylets[pid])
        self.add()

    def shutdown(self) -> None:
        """End all nodes."""
        self._cluster.shutdown()
