"""How many workers a training has, and whether it waits for any: Ray Train's policies, with labels and a stop."""

from __future__ import annotations

import inspect
import time

import ray
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ScalingDecision,
    ScalingPolicy,
)
from ray.train.v2.api.config import ScalingConfig

from actors.placement import live_nodes
from actors.stop_request import StoppedError, StopRequest
from unmask.errors import ConfigError
from unmask.placement import Demand

_WAIT_S = 1.0
"""Between two decisions not to start workers: Ray's controller would ask again at once, all the time."""

_OVERRIDDEN = {
    (FixedScalingPolicy, "make_decision_for_non_running_worker_group"): ["self"],
    (ElasticScalingPolicy, "make_decision_for_non_running_worker_group"): ["self"],
    (ElasticScalingPolicy, "_count_possible_workers"): ["self", "reserved_resources"],
}
"""What of Ray is replaced here, with its parameters; Ray promises none of it."""


def worker_policy(given: ScalingPolicy, demand: Demand, request: StopRequest) -> ScalingPolicy:
    """What takes the place of a policy that Ray has chosen.

    Raises:
        ConfigError: this Ray decides otherwise than the one that this was written for.
    """
    for (owner, name), parameters in _OVERRIDDEN.items():
        require_hook(owner, name, parameters)
    if type(given) is FixedScalingPolicy:
        return FixedWorkers(given.scaling_config, demand, request)
    if type(given) is ElasticScalingPolicy:
        return ElasticWorkers(given.scaling_config, demand, request)
    raise unknown_ray(type(given).__name__)


def require_hook(owner: type, name: str, parameters: list[str]) -> None:
    """Make sure that a method which is overridden is still the one that is meant.

    Raises:
        ConfigError: it is gone, or takes something else: Ray would go on without what is put in its place.
    """
    method = getattr(owner, name, None)
    if method is None or list(inspect.signature(method).parameters) != parameters:
        raise unknown_ray(f"{owner.__name__}.{name}")


def unknown_ray(what: str) -> ConfigError:
    """The error that refuses this version of Ray for something of it that is not as expected."""
    return ConfigError(
        f"Ray {ray.__version__} cannot train here: its '{what}' is not that of Ray 2.60; install 'ray==2.60.*'"
    )


class _Stoppable(ScalingPolicy):
    """No workers are started for a training that is to stop: none of them runs that could answer the request."""

    def __init__(self, scaling_config: ScalingConfig, demand: Demand, request: StopRequest) -> None:
        super().__init__(scaling_config)
        self._demand, self._request = demand, request

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """See ScalingPolicy.

        Raises:
            StoppedError: a stop was asked for; it ends the controller in order.
        """
        if self._request.is_made():
            raise StoppedError("stopped while no worker ran")
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            time.sleep(_WAIT_S)
        return decision


class FixedWorkers(_Stoppable, FixedScalingPolicy):
    """As many workers as are asked for, or none."""


class ElasticWorkers(_Stoppable, ElasticScalingPolicy):
    """As many workers as the nodes with the right labels have room for.

    Ray reserves room for workers on any node and places them by their labels: with nodes of other roles it decides on
    workers that no node may take, and on them again when they could not be placed.
    """

    def _count_possible_workers(self, reserved_resources) -> int:
        if not self._demand.labels:
            return super()._count_possible_workers(reserved_resources)
        # All that a node holds counts, as with Ray: what is taken may be the workers' own of the moment.
        return int(min(sum(node.room(self._demand) for node in live_nodes()), self._demand.most))
