"""Room on the running cluster for what a stage asks for: found, waited for, or refused by name.

Ray queues what it cannot place and says so in a log alone; a stage that no node can ever take would wait for ever.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from actors.cluster import FaultError
from unmask.errors import ConfigError
from unmask.placement import Demand, NodeType, misfit, shortage

logger = logging.getLogger(__name__)

_JOIN_S = 30.0
"""Nodes of a cluster without an autoscaler may still be joining for this long."""

_VERDICT_S = 15.0
"""How long the autoscaler must call a demand infeasible: its first word may be of an earlier state."""

_TELL_S = 30.0
"""How often the log says what is waited for."""

_POLL_S = 1.0


def require_room(demands: Sequence[Demand]) -> None:
    """Return when a live node fits each demand, waiting for nodes that an autoscaler can bring up.

    Ray must have been initialised. Without an autoscaler the nodes must also suffice for the least of all demands.

    Raises:
        ConfigError: a private cluster, of this machine alone, does not suffice.
        FaultError: no node and no node type fits a demand, known within a minute.
    """
    begun = time.monotonic()
    while problem := _problem(demands):
        if _autoscaler_state() is not None:
            _wait_for_autoscaler(demands)
            return
        if not os.environ.get("RAY_ADDRESS"):
            raise ConfigError(f"{problem}; this machine is all there is: set RAY_ADDRESS to a cluster, or ask for less")
        if time.monotonic() - begun > _JOIN_S:
            raise FaultError(problem)
        time.sleep(_POLL_S)


def live_nodes() -> list[NodeType]:
    """The live nodes of the cluster, each as a type of its own, with all that they hold."""
    import ray

    return [
        NodeType(name=node["NodeManagerAddress"], resources=node["Resources"], labels=node["Labels"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def _problem(demands: Sequence[Demand]) -> str | None:
    return shortage([replace(demand, most=demand.least) for demand in demands], live_nodes())


def _wait_for_autoscaler(demands: Sequence[Demand]) -> None:
    """Show the autoscaler the least of all demands, until the nodes that are up suffice or it gives up."""
    probes = [_probe(demand) for demand in demands if demand.resources for _ in range(demand.least)]
    feasible_at = told_at = time.monotonic() - _TELL_S
    try:
        while problem := _problem(demands):
            now = time.monotonic()
            if now - told_at >= _TELL_S:
                logger.info("waiting for nodes: %s", problem)
                told_at = now
            infeasible = [demand for demand in demands if _is_infeasible(demand) or _is_homeless(demand, demands)]
            if not infeasible:
                feasible_at = now
            elif now - feasible_at > _VERDICT_S:
                raise FaultError(_why_never(infeasible[0], problem))
            time.sleep(_POLL_S)
    finally:
        _end(probes)


def _is_homeless(demand: Demand, demands: Sequence[Demand]) -> bool:
    """Whether a process that takes no CPU waits for a label that no node has, nor one that others wait for may have.

    The autoscaler brings up nothing for it alone: it asks for no resource.
    """
    nodes = live_nodes()
    if demand.resources or not misfit([demand], nodes):
        return False
    awaited = [other for other in demands if other.resources and misfit([other], nodes)]
    return not any(not other.labels or other.labels.items() >= demand.labels.items() for other in awaited)


def _why_never(lacking: Demand, problem: str) -> str:
    if not lacking.resources:
        return f"{misfit([lacking], live_nodes())}, and no node type is brought up for a process that takes no CPU"
    if misfit([lacking], live_nodes()):
        return f"{lacking.name}: needs {lacking}; no node and no node type of the autoscaler has that"
    return f"{problem}; the autoscaler brings up no more nodes"


def _probe(demand: Demand) -> Any:
    """A pending actor of the demand's shape, which the autoscaler sees as it will see the stage's own."""
    import ray

    options = {"num_cpus": demand.resources.get("CPU", 0), "num_gpus": demand.resources.get("GPU", 0)}
    return ray.remote(_Probe).options(**options, label_selector=dict(demand.labels)).remote()


class _Probe:
    """Takes up room, and does nothing."""


def _end(probes: list[Any]) -> None:
    import ray

    for probe in probes:
        ray.kill(probe)


def _is_infeasible(demand: Demand) -> bool:
    state = _autoscaler_state()
    return state is not None and any(_is_of(demand, request) for request in state.infeasible_resource_requests)


def _is_of(demand: Demand, request: Any) -> bool:
    labels = {
        constraint.label_key: list(constraint.label_values)
        for selector in request.label_selectors
        for constraint in selector.label_constraints
    }
    wanted = {name: [value] for name, value in demand.labels.items()}
    return dict(request.resources_bundle) == dict(demand.resources) and labels == wanted


def _autoscaler_state() -> Any:
    """What the autoscaler (version 2, which all our cluster files ask for) last said of itself; None without one."""
    import ray._private.worker
    from ray.core.generated import autoscaler_pb2

    worker: Any = ray._private.worker.global_worker
    messages: Any = autoscaler_pb2
    reply = messages.GetClusterStatusReply()
    reply.ParseFromString(worker.gcs_client.get_cluster_status(timeout_s=10))
    return reply.autoscaling_state if reply.autoscaling_state.autoscaler_state_version else None
