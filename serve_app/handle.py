"""A running service in the hands of the process that started it."""

from __future__ import annotations

import http
import http.client
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.cluster import FaultError
from actors.placement import require_room
from serve_app.app import build_application
from serve_app.backend import ReplicaReport
from serve_app.settings import APPLICATION, DRAIN_S, AppConfig
from unmask.checkpoints import read_config
from unmask.config import Recipe
from unmask.errors import ConfigError
from unmask.placement import serve_demands

logger = logging.getLogger(__name__)

_READY_S = 20.0
_LAST_WORDS_S = 3.0
"""In which requests that have not ended are told so."""
_REFUSED = "unmask_draft_swaps_refused_total"


@dataclass(frozen=True, slots=True)
class ServeHandle:
    """A served pairing."""

    url: str
    """`http://host:port`, without `/v1`."""
    ingress: DeploymentHandle

    def reports(self, role: str | None = None) -> list[ReplicaReport]:
        """What the live replicas last said of themselves; those of a role, if one is given."""
        reports = self.ingress.reports.remote().result(timeout_s=10)
        return [report for report in reports if role in (None, report.role)]

    def target_pids(self) -> list[int]:
        """Processes of the target replicas; the engines are their children."""
        return self._pids("target")

    def draft_pids(self) -> list[int]:
        """Processes of the draft replicas."""
        return self._pids("draft")

    def diffusion_pids(self) -> list[int]:
        """Processes of the diffusion LM's replicas."""
        return self._pids("diffusion")

    def killer(self, replica: ReplicaReport) -> Callable[[], None]:
        """SIGKILL of a replica from its own node, which may be another one than this process's.

        What sends it is up when this returns, so that the signal follows the call at once.
        """
        actor: Any = ray.remote(num_cpus=0)(_Killer)
        killer = actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(replica.node, soft=False)).remote()
        ray.get(killer.__ray_ready__.remote())
        return lambda: ray.get(killer.kill.remote(replica.pids[0]))

    def swap_draft(self, path: Path, timeout_s: float = 120.0) -> None:
        """Make a published draft live under load: no replica restarts, no request fails, texts stay the same.

        Args:
            path: directory of the draft, on storage that the draft replicas share.

        Raises:
            CheckpointError: not a draft.
            FaultError: replicas refused it (their log says why) or did not take it in time; each serves on with the
                draft that it has.
        """
        read_config(path)
        wanted = str(path.absolute())
        refused_before = sum(report.stats[_REFUSED] for report in self.reports("draft"))
        self.ingress.want_draft.remote(wanted).result(timeout_s=10)
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            drafts = self.reports("draft")
            if drafts and all(report.checkpoint == wanted for report in drafts):
                return
            if sum(report.stats[_REFUSED] for report in drafts) > refused_before:
                raise FaultError(f"the draft replicas refused '{path}'; their logs say why")
            time.sleep(0.5)
        raise FaultError(f"not every draft replica has taken '{path}' within {timeout_s:g} s")

    def shutdown(self, drain_s: float = DRAIN_S) -> None:
        """Refuse new requests, let the running ones finish for up to `drain_s`, then end every replica.

        Serve itself ends with its last application. A service that has ended already is left alone.
        """
        if APPLICATION not in serve.status().applications:
            return
        try:
            self.ingress.drain.remote(drain_s).result(timeout_s=drain_s + _LAST_WORDS_S)
        except (TimeoutError, RayError, RayServeException) as error:
            logger.warning("the service was not drained: %s", type(error).__name__)
        _delete()

    def _pids(self, role: str) -> list[int]:
        return [report.pids[0] for report in self.reports(role)]


class _Killer:
    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)


def serve_pairing(recipe: Recipe) -> ServeHandle:
    """Serve the target of a recipe, with its draft if `serve.draft` names one, and the diffusion LM of
    `serve.diffusion`, beside the target or in its place; returns when requests are answered.

    Ray must have been initialised. The proxies listen on `serve.host` and `serve.port`, 0 picking a free port.

    Raises:
        UserError: a recipe, target or draft that cannot be served.
        FaultError: the replicas could not be started.
    """
    if not ray.is_initialized():
        raise ConfigError("join or start a Ray cluster first (see actors.cluster.connect)")
    application = build_application(AppConfig(target=recipe.target, serve=recipe.serve))
    require_room(serve_demands(recipe.serve, has_draft=recipe.serve.draft is not None))
    host, port = recipe.serve.host, recipe.serve.port or _free_port(recipe.serve.host)
    serve.start(http_options={"host": host, "port": port})
    try:
        ingress = serve.run(application, name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        reason = _why_not()
        _delete()
        raise FaultError(f"the service did not start: {reason or error}") from error
    if not _is_ready(host, port):
        _delete()
        raise FaultError(
            f"nothing answers at {host}:{port}; if Serve ran on this cluster before, give its own serve.host and port"
        )
    return ServeHandle(url=f"http://{host}:{port}", ingress=ingress)


def _delete() -> None:
    """End the application, and Serve if it has no other.

    Serve is ended at once then, and its proxies with it: after a `serve.delete` they would answer 404 in plain text for
    seconds.
    """
    if set(serve.status().applications) - {APPLICATION}:
        serve.delete(APPLICATION)
    else:
        serve.shutdown()


def _is_ready(host: str, port: int) -> bool:
    """Whether the service says that it is ready, waiting until its replicas have told the directory of themselves."""
    end = time.monotonic() + _READY_S
    while time.monotonic() < end:
        connection = http.client.HTTPConnection(host, port, timeout=_READY_S)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return True
        except (OSError, http.client.HTTPException):
            logger.debug("%s:%d is not ready", host, port)
        finally:
            connection.close()
        time.sleep(0.2)
    return False


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as listener:
        return listener.getsockname()[1]


def _why_not() -> str:
    """The last line of the first deployment that failed."""
    application = serve.status().applications.get(APPLICATION)
    for status in application.deployments.values() if application else []:
        lines = [line.strip() for line in status.message.splitlines() if line.strip()]
        if status.status == "DEPLOY_FAILED" and lines:
            return lines[-1]
    return ""
