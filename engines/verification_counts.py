"""Drafted and accepted tokens of every verification, by request, where vLLM does not tell them.

The versions that the V2 runner was tested with count them for all requests together only. Here the scheduler of an
engine core counts them one by one and sends them with a request's last output, in the field for a KV connector's
parameters: the one that goes through to the front end, and that no connector fills in these engines.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from vllm.config import ObservabilityConfig
from vllm.v1.core.sched.scheduler import Scheduler

from unmask.errors import ConfigError

_FIELD = "unmask_verifications"
_EXPECTED = {
    "make_spec_decoding_stats": (
        "self",
        "spec_decoding_stats",
        "num_draft_tokens",
        "num_accepted_tokens",
        "num_invalid_spec_tokens",
        "request_id",
    ),
    "update_from_output": ("self", "scheduler_output", "model_runner_output"),
}


def told_by_vllm() -> bool:
    """Whether this vLLM has the option `per_request_spec_decode_metrics`."""
    return any(field.name == "per_request_spec_decode_metrics" for field in dataclasses.fields(ObservabilityConfig))


def count_verifications() -> None:
    """Have the schedulers of this process count, once.

    Raises:
        ConfigError: a vLLM whose scheduler looks different.
    """
    if getattr(Scheduler, "_unmask_counts", False):
        return
    for name, parameters in _EXPECTED.items():
        found = tuple(inspect.signature(getattr(Scheduler, name)).parameters)
        if found != parameters:
            raise ConfigError(f"vLLM: Scheduler.{name} takes {found}, not {parameters}")
    make, update = Scheduler.make_spec_decoding_stats, Scheduler.update_from_output

    def make_spec_decoding_stats(
        scheduler: Scheduler,
        spec_decoding_stats: Any,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> Any:
        # A draft that the grammar refused was no proposal.
        proposed = num_draft_tokens - (num_invalid_spec_tokens or {}).get(request_id, 0)
        accepted, drafted = _counts_of(scheduler)[request_id]
        accepted.append(num_accepted_tokens)
        drafted.append(proposed)
        return make(
            scheduler, spec_decoding_stats, num_draft_tokens, num_accepted_tokens, num_invalid_spec_tokens, request_id
        )

    def update_from_output(scheduler: Scheduler, scheduler_output: Any, model_runner_output: Any) -> Any:
        told = update(scheduler, scheduler_output, model_runner_output)
        _tell(scheduler, told)
        return told

    Scheduler.make_spec_decoding_stats = make_spec_decoding_stats  # pyrefly: ignore[bad-assignment]
    Scheduler.update_from_output = update_from_output  # pyrefly: ignore[bad-assignment]
    Scheduler._unmask_counts = True  # pyrefly: ignore[missing-attribute]


def _counts_of(scheduler: Any) -> dict[str, tuple[list[int], list[int]]]:
    """Accepted and drafted tokens by request."""
    return scheduler.__dict__.setdefault(_FIELD, defaultdict(lambda: ([], [])))


def _tell(scheduler: Scheduler, told: Mapping[int, Any]) -> None:
    """Put the counts of requests that have ended into their last outputs."""
    if not (counts := _counts_of(scheduler)):
        return
    for output in itertools.chain.from_iterable(outputs.outputs for outputs in told.values()):
        if output.finish_reason is not None and output.request_id in counts:
            output.kv_transfer_params = (output.kv_transfer_params or {}) | {_FIELD: counts.pop(output.request_id)}
    # Those that were aborted have no last output.
    for request_id in [request_id for request_id in counts if request_id not in scheduler.requests]:
        del counts[request_id]


def verifications_of(output: Any) -> tuple[list[int], list[int]] | None:
    """Accepted and drafted tokens of each verification of a finished request, from vLLM's `RequestOutput`.

    None if nobody counted: the request is not finished, or no verification was made.
    """
    metrics = getattr(output.outputs[0], "spec_decode_metrics", None)
    if metrics is not None:
        return list(metrics.per_step_accepted), list(metrics.per_step_drafted)
    counted = (output.kv_transfer_params or {}).get(_FIELD)
    return (list(counted[0]), list(counted[1])) if counted else None
