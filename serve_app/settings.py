"""The application's configuration, and how each of its deployments runs under Ray Serve.

Serve's defaults suit short stateless calls: five requests a replica, no bound on the queue, 40 s until a hung replica
is replaced. Every option is therefore chosen here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.serve.config import AutoscalingPolicy

from serve_app.scaling import DraftPolicy, TargetPolicy
from unmask.config import ServeConfig, TargetConfig
from unmask.errors import ConfigError, nearest
from unmask.recipe import parse

APPLICATION = "unmask"

DRAIN_S = 20.0
"""How long a replica that is to go may finish what it has begun."""

# The ingress writes its own line for each request; a line for each call inside the application says nothing more.
_LOGGING = {"logging_config": {"enable_access_log": False}}

_HEALTH = {
    # Three failed checks in a row take a replica out: a hung one is replaced within 3 + 3 x 3 = 12 s.
    "health_check_period_s": 3.0,
    "health_check_timeout_s": 3.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AppConfig:
    """What one application serves, and how."""

    target: TargetConfig = field(default_factory=TargetConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)

    @property
    def slots(self) -> int:
        """Responses that all target replicas can generate at the same time."""
        return self.serve.max_num_seqs * (self.serve.max_target_replicas or self.serve.target_replicas)

    @property
    def diffusion_slots(self) -> int:
        """Responses that all replicas of the diffusion LM can decode at the same time."""
        return self.serve.diffusion_rows * self.serve.diffusion_replicas


def parse_args(args: Mapping[str, Any]) -> AppConfig:
    """Application arguments: the fields of `ServeConfig`, and `target` with those of `TargetConfig`.

    Raises:
        ConfigError: unknown key (the nearest one is named), wrong type, impossible value.
    """
    serve = {key: value for key, value in args.items() if key != "target"}
    known = [*(option.name for option in dataclasses.fields(ServeConfig)), "target"]
    for key in serve:
        if key not in known:
            raise ConfigError(f"unknown key{nearest(key, known)}", field=f"args.{key}")
    return parse(AppConfig, {"target": args.get("target", {}), "serve": serve})


def ingress_options(config: AppConfig) -> dict[str, Any]:
    """The HTTP side: cheap, and the one place where requests are counted and queued."""
    return {
        # Admission and its metrics are of one process; one keeps up with thousands of tokens a second.
        "num_replicas": 1,
        # An update starts the new one before it ends the old: requests would wait for seconds otherwise.
        "max_surge_percent": 100,
        "ray_actor_options": _resources(0, 0, config.serve.ingress_labels),
        # Beyond what is admitted there must be room to say 429 in the API's own form, and for /health.
        "max_ongoing_requests": config.slots + config.diffusion_slots + 2 * config.serve.max_queued + 256,
        # Reached only when refusals themselves pile up: then Serve's plain refusal is the right answer.
        "max_queued_requests": 256,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
        "graceful_shutdown_timeout_s": DRAIN_S,
        # How often a replica that is to go looks whether it may.
        "graceful_shutdown_wait_loop_s": 0.5,
        **_HEALTH,
        **_LOGGING,
    }


def target_options(config: AppConfig) -> dict[str, Any]:
    """The engine: as many requests as it batches, and time to finish them."""
    serve = config.serve
    return {
        **_scale(
            serve,
            serve.target_replicas,
            serve.max_target_replicas,
            AutoscalingPolicy(
                policy_function=TargetPolicy,
                policy_kwargs={"requests": serve.max_num_seqs, "tokens_per_second": serve.target_tokens_per_second},
            ),
        ),
        "ray_actor_options": _resources(serve.target_cpus, serve.target_gpus, serve.target_labels),
        # Requests beyond the engine's batch would wait inside it; in the ingress they can be refused or moved.
        "max_ongoing_requests": serve.max_num_seqs,
        # The ingress bounds the queue; a second bound here would turn its 429 into a 503.
        "max_queued_requests": -1,
        "graceful_shutdown_timeout_s": DRAIN_S,
        "graceful_shutdown_wait_loop_s": 0.5,
        # A constructor that fails takes minutes on a GPU; what failed thrice fails again.
        "max_constructor_retry_count": 3,
        **_HEALTH,
        **_LOGGING,
    }


def draft_options(config: AppConfig) -> dict[str, Any]:
    """The draft: its traffic does not pass through Serve, which only places and watches it."""
    serve = config.serve
    return {
        **_scale(serve, serve.draft_replicas, serve.max_draft_replicas, AutoscalingPolicy(policy_function=DraftPolicy)),
        "ray_actor_options": _resources(serve.draft_cpus, serve.draft_gpus, serve.draft_labels),
        "max_ongoing_requests": 16,
        # A draft that goes costs speed, never a token: there is nothing to drain.
        "graceful_shutdown_timeout_s": 2.0,
        "graceful_shutdown_wait_loop_s": 0.1,
        "max_constructor_retry_count": 3,
        **_HEALTH,
        **_LOGGING,
    }


def diffusion_options(config: AppConfig) -> dict[str, Any]:
    """The diffusion LM: as many requests as its engine has rows, and time to finish them."""
    serve = config.serve
    return {
        "num_replicas": serve.diffusion_replicas,
        "ray_actor_options": _resources(serve.diffusion_cpus, serve.diffusion_gpus, serve.diffusion_labels),
        # Like the target's: requests wait in the ingress, where they can be refused or moved.
        "max_ongoing_requests": serve.diffusion_rows,
        "max_queued_requests": -1,
        "graceful_shutdown_timeout_s": DRAIN_S,
        "graceful_shutdown_wait_loop_s": 0.5,
        "max_constructor_retry_count": 3,
        **_HEALTH,
        **_LOGGING,
    }


def directory_options(config: AppConfig) -> dict[str, Any]:
    """The directory: one small state that replicas rebuild within a second when it is lost."""
    return {
        "num_replicas": 1,
        "ray_actor_options": _resources(0, 0, config.serve.ingress_labels),
        # One short call a replica a second, and one for each look at /health and /metrics.
        "max_ongoing_requests": 1000,
        "graceful_shutdown_timeout_s": 1.0,
        "graceful_shutdown_wait_loop_s": 0.1,
        **_HEALTH,
        **_LOGGING,
    }


def _scale(serve: ServeConfig, least: int, most: int | None, policy: AutoscalingPolicy) -> dict[str, Any]:
    if most is None:
        return {"num_replicas": least}
    return {
        "autoscaling_config": {
            "min_replicas": least,
            "max_replicas": most,
            "policy": policy,
            "upscale_delay_s": serve.scale_up_after_s,
            "downscale_delay_s": serve.scale_down_after_s,
            # Serve's half a minute of averaging would come on top of the delays.
            "metrics_interval_s": 2.0,
            "look_back_period_s": 6.0,
        }
    }


def _resources(cpus: float, gpus: float, labels: dict[str, str]) -> dict[str, Any]:
    gpu = {"num_gpus": gpus} if gpus else {}
    where = {"label_selector": labels} if labels else {}
    return {"num_cpus": cpus, **gpu, **where}
