"""Hooks into vLLM's V2 model runner, once per process: which speculator it makes, and what that is told of requests."""

from __future__ import annotations

import dataclasses
import inspect
import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from engines.draft_arguments import TURNS_VARIABLE
from engines.turns import turns
from engines.versions import require_tested_vllm
from unmask.errors import ConfigError

_PROPOSE = (
    "self",
    "input_batch",
    "attn_metadata",
    "slot_mappings",
    "last_hidden_states",
    "aux_hidden_states",
    "num_sampled",
    "num_rejected",
    "last_sampled",
    "next_prefill_tokens",
    "temperature",
    "seeds",
    "num_tokens_across_dp",
    "dummy_run",
    "skip_attn_for_dummy_run",
    "mm_inputs",
    "is_profile",
)
_INIT = ("vllm_config", "device")
_REQUESTS = ("self", "scheduler_output")
_BATCH = {
    "req_ids",
    "num_reqs",
    "num_tokens",
    "num_scheduled_tokens",
    "num_computed_tokens_np",
    "prefill_len_np",
    "idx_mapping",
    "query_start_loc",
    "positions",
}

schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()
"""Those of this process: whoever changes K tells them too."""

_COMES_LATER = "_unmask_comes_later"
"""Set on a step's SchedulerOutput whose proposals may come after the next step (`engines.turns`)."""


def install(new_speculator: Callable[[VllmConfig, torch.device], Any]) -> None:
    """Put another speculator in the place of vLLM's, once per process.

    Args:
        new_speculator: makes one that has `RemoteSpeculator.introduce`, `finish` and `begin`.

    Raises:
        ConfigError: a version of vLLM that this was not tested with, or one whose interfaces are others.
    """
    if getattr(model_runner, "_unmask_remote_draft", False):
        return
    version = require_tested_vllm("v2")
    check_interfaces(str(version))
    finish, init = model_runner.GPUModelRunner.finish_requests, Scheduler.__init__
    add = model_runner.GPUModelRunner.add_requests

    def finish_requests(runner: Any, scheduler_output: Any) -> None:
        if runner.speculator is not None:
            runner.speculator.finish(scheduler_output.finished_req_ids)
        finish(runner, scheduler_output)

    def add_requests(runner: Any, scheduler_output: Any) -> None:
        add(runner, scheduler_output)
        if runner.speculator is not None:
            for new in scheduler_output.scheduled_new_reqs:
                runner.speculator.introduce(new.req_id, new.prefill_token_ids, new.num_computed_tokens)
            comes_later = getattr(scheduler_output, _COMES_LATER, False)
            runner.speculator.begin(scheduler_output.num_scheduled_tokens, runner.req_states.draft_tokens, comes_later)

    def init_scheduler(scheduler: Scheduler, *args: Any, **kwargs: Any) -> None:
        init(scheduler, *args, **kwargs)
        schedulers.add(scheduler)

    model_runner.init_speculator = new_speculator  # pyrefly: ignore[bad-assignment]
    model_runner.GPUModelRunner.finish_requests = finish_requests  # pyrefly: ignore[bad-assignment]
    model_runner.GPUModelRunner.add_requests = add_requests  # pyrefly: ignore[bad-assignment]
    Scheduler.__init__ = init_scheduler
    turns.least = int(os.environ.get(TURNS_VARIABLE, 0)) or None
    _install_turns()
    model_runner._unmask_remote_draft = True  # pyrefly: ignore[missing-attribute]


def _install_turns() -> None:
    """Have asynchronous schedulers of this process ask `turns` after every step; where the scheduler is in another
    process, as with tensor parallelism, no step is told that its proposals may come later."""
    update = AsyncScheduler._update_after_schedule

    def update_after_schedule(scheduler: AsyncScheduler, scheduler_output: SchedulerOutput) -> None:
        update(scheduler, scheduler_output)
        if turns.least is None:
            return
        scheduled = [scheduler.requests[name] for name in scheduler_output.num_scheduled_tokens]
        comes_later = turns.give(scheduler, [request for request in scheduled if not request.is_prefill_chunk])
        setattr(scheduler_output, _COMES_LATER, comes_later)

    AsyncScheduler._update_after_schedule = update_after_schedule  # pyrefly: ignore[bad-assignment]


def check_interfaces(version: str) -> None:
    """Refuse a vLLM in which something that is relied on looks different. Raises ConfigError naming it."""
    runner = model_runner.GPUModelRunner
    expected = {
        "BaseSpeculator.propose": (BaseSpeculator.propose, _PROPOSE),
        "init_speculator": (getattr(model_runner, "init_speculator", None), _INIT),
        "GPUModelRunner.finish_requests": (getattr(runner, "finish_requests", None), _REQUESTS),
        "GPUModelRunner.add_requests": (getattr(runner, "add_requests", None), _REQUESTS),
        "AsyncScheduler._update_after_schedule": (AsyncScheduler._update_after_schedule, _REQUESTS),
    }
    for name, (function, parameters) in expected.items():
        found = tuple(inspect.signature(function).parameters) if function else ()
        if found != parameters:
            raise ConfigError(f"vLLM {version}: {name} takes {found}, not {parameters}")
    missing = _BATCH - {field.name for field in dataclasses.fields(InputBatch)}
    if missing:
        raise ConfigError(f"vLLM {version}: InputBatch lacks {', '.join(sorted(missing))}")
