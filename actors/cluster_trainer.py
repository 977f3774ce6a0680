"""Ray Train's trainer as a pipeline drives it: with our policies of workers, and an end in order when interrupted."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from actors.stop_request import StopRequest
from actors.worker_policy import require_hook, worker_policy
from unmask.placement import Demand

_ABORT_S = 5.0
"""A controller that waits for nodes answers nobody."""


class ClusterTrainer(TorchTrainer):
    """Trains with workers on the nodes of a demand.

    Args:
        demand: what the workers ask for; Ray's own options must say the same.
        request: a stop asked for while no worker runs ends the run.
        options: of TorchTrainer.

    Raises:
        ConfigError: this Ray is not the one that this was written for.
    """

    def __init__(self, *args: Any, demand: Demand, request: StopRequest, **options: Any) -> None:
        require_hook(TorchTrainer, "_initialize_and_run_controller", ["self", "controller_init_kwargs"])
        require_hook(TorchTrainer, "_register_sigint_handler", ["self", "controller"])
        super().__init__(*args, **options)
        self._demand, self._request = demand, request
        self._controller: Any = None

    def abort(self) -> None:
        """End the run at once. What came after its last checkpoint is lost."""
        if self._controller is None:
            return
        with suppress(RayActorError):  # That is how it says that it has ended.
            try:
                ray.get(self._controller.abort.remote(), timeout=_ABORT_S)
            except GetTimeoutError:
                ray.kill(self._controller)

    def _initialize_and_run_controller(self, **controller_init_kwargs: Any) -> Any:
        given = controller_init_kwargs["scaling_policy"]
        controller_init_kwargs["scaling_policy"] = worker_policy(given, self._demand, self._request)
        return super()._initialize_and_run_controller(**controller_init_kwargs)

    def _register_sigint_handler(self, controller: Any) -> None:
        # In place of Ray's handler, which ends the process with 0 or 1, and waits for ever for a controller that does
        # not answer: KeyboardInterrupt reaches the driver, which calls `abort`.
        self._controller = controller
