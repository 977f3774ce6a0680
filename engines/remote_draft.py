"""vLLM plugin: a V1 target whose proposals come from a draft in another process.

An engine is told of it by `engines.draft_arguments.with_remote_draft`.

vLLM's custom proposers see tokens only, so importing this module wraps three methods of the model runner.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from engines.cpu_sampling import repair_cpu_sampling
from engines.draft_arguments import AUX_LAYERS_KEY, LINK_FILE_VARIABLE
from engines.feature_rows import feature_rows
from engines.versions import require_tested_vllm
from unmask.errors import ConfigError
from unmask.pairing.fleet import DraftFleet
from unmask.pairing.hello import NO_DIGEST, TargetShape
from unmask.pairing.link_file import read_link_file
from unmask.pairing.page_hashes import PageHashes
from unmask.pairing.policy import KController
from unmask.pairing.request_numbers import RequestNumbers
from unmask.pairing.status import LinkStatus
from unmask.pairing.step_clock import StepClock
from unmask.types import ProposalRow

_WRAPPED = {
    "_setup_eagle3_aux_hidden_state_outputs": ("self",),
    "_input_fits_in_drafter": ("self", "common_attn_metadata"),
    "propose_draft_token_ids": (
        "self",
        "scheduler_output",
        "sampled_token_ids",
        "sampling_metadata",
        "hidden_states",
        "sample_hidden_states",
        "aux_hidden_states",
        "spec_decode_metadata",
        "common_attn_metadata",
        "slot_mappings",
    ),
}


@dataclass(frozen=True, slots=True)
class _TargetStep:
    """What the model runner knows of a step beyond the sampled tokens."""

    runner: Any
    aux_hidden_states: list[torch.Tensor]
    spec_decode_metadata: Any
    common_attn_metadata: Any
    all_greedy: bool


class RemoteDraft:
    """A proposer for vLLM's `custom_class` method.

    Only the worker whose drafts vLLM uses (first tensor-parallel rank of the last stage) speaks to the draft.

    Raises:
        ConfigError: no link file is named, or the engine's options do not suit a remote draft.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        path = os.environ.get(LINK_FILE_VARIABLE)
        if not path:
            raise ConfigError("set it to the path of the draft's link file", field=LINK_FILE_VARIABLE)
        self._path = path
        self._max_k: int = vllm_config.num_speculative_tokens
        self._hashes = PageHashes() if vllm_config.cache_config.enable_prefix_caching else None
        # At least one token is drafted, so that a draft that gets better is noticed.
        self._clock = StepClock(KController(range(1, self._max_k + 1)))
        self._epoch = 0.0
        self._link: DraftFleet | None = None
        self._step: _TargetStep | None = None
        self._numbers = RequestNumbers()

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Called by vLLM when the target is loaded; the draft's weights live elsewhere."""

    def connect(self, runner: Any) -> None:
        """Open the link, once the runner knows which layers it reports."""
        if get_tp_group().rank_in_group != 0:
            return
        aux_layers = runner._get_eagle3_aux_layers_from_config()
        if not aux_layers:
            raise ConfigError(f"give the draft's layers as hf_overrides['{AUX_LAYERS_KEY}']", field="hf_overrides")
        config = read_link_file(self._path)
        shape = TargetShape(
            hidden_size=runner.model_config.get_hidden_size(),
            vocab_size=runner.model_config.get_vocab_size(),
            layer_ids=tuple(layer - 1 for layer in aux_layers),
            target_digest=bytes.fromhex(config.target_digest) or NO_DIGEST,
        )
        self._link = DraftFleet(self._path, shape, self._max_k, runner.device, LinkStatus(config.status_file))
        self._link.start()

    def observe(self, step: _TargetStep) -> None:
        """Take note of a step that `propose` is about to be called for."""
        self._step = step

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Proposals [R] of at most K ids; empty where there are none."""
        step, self._step = self._step, None
        if self._link is None or step is None or not self._link.num_speculative_tokens:
            self._clock.skip()
            return [[] for _ in sampled_token_ids]
        batch = step.runner.input_batch
        num_requests = len(batch.req_ids)
        drafted = step.spec_decode_metadata.num_draft_tokens if step.spec_decode_metadata else [0] * num_requests
        requests = [self._numbers.of(name) for name in batch.req_ids]
        rows, kept = feature_rows(
            requests,
            batch.num_computed_tokens_cpu[:num_requests],
            step.common_attn_metadata.query_start_loc_cpu[: num_requests + 1].numpy(),
            drafted,
            sampled_token_ids,
        )
        if self._hashes is not None:
            rows = [self._with_hashes(row, tokens) for row, tokens in zip(rows, token_ids_cpu, strict=False)]
        features, finished = _gather(step.aux_hidden_states, rows, kept), self._release(step.runner.requests)
        if not self._link.adaptive_k:
            return self._link.propose(rows, features, finished)
        if self._epoch != self._link.status["epoch"]:
            self._epoch = self._link.status["epoch"]
            self._clock.controller.forget_acceptance()
        num_rows = int(step.common_attn_metadata.query_start_loc_cpu[num_requests])
        k = self._clock.verified(requests, num_rows, drafted, sampled_token_ids)
        # What a confidence head knows of acceptance does not hold for requests that are sampled.
        min_chance = self._clock.min_chance if step.all_greedy else 0.0
        proposals = self._link.propose(rows, features, finished, k, min_chance=min_chance)
        self._clock.drafted(sum(row.last_token >= 0 for row in rows), k, answered=any(proposals))
        return proposals

    def _with_hashes(self, row: ProposalRow, tokens: np.ndarray) -> ProposalRow:
        end = row.start + row.num_features
        return replace(row, page_hashes=self._hashes.of(row.request, row.start, end, tokens)) if self._hashes else row

    def _release(self, running: dict[str, Any]) -> list[int]:
        """Numbers of requests that the runner has forgotten since the last step, whichever step they ended in."""
        ended = self._numbers.forget_all_but(running)
        if self._hashes is not None:
            for number in ended:
                self._hashes.forget(number)
        return ended


def _gather(aux_hidden_states: list[torch.Tensor], rows: list, kept: torch.Tensor | None) -> torch.Tensor:
    """Raw features [T, D * H] of the kept rows."""
    if kept is None:
        total = sum(row.num_features for row in rows)
        return torch.cat([states[:total] for states in aux_hidden_states], dim=-1)
    kept = kept.to(aux_hidden_states[0].device, non_blocking=True)
    return torch.cat([states.index_select(0, kept) for states in aux_hidden_states], dim=-1)


def install_hooks() -> None:
    """Wrap the model runner's methods, once per process; runners without a `RemoteDraft` are not affected.

    Raises:
        ConfigError: a version of vLLM that this was not tested with, or a wrapped method with other parameters.
    """
    if getattr(GPUModelRunner, "_unmask_hooks", False):
        return
    version = require_tested_vllm("v1")
    for name, expected in _WRAPPED.items():
        method = getattr(GPUModelRunner, name, None)
        found = tuple(inspect.signature(method).parameters) if method else ()
        if found != expected:
            raise ConfigError(f"vLLM {version}: GPUModelRunner.{name} takes {found}, not {expected}")
    _wrap("_setup_eagle3_aux_hidden_state_outputs", _set_up)
    _wrap("_input_fits_in_drafter", _fits)
    _wrap("propose_draft_token_ids", _propose)
    repair_cpu_sampling()
    GPUModelRunner._unmask_hooks = True


def _wrap(name: str, around: Callable[..., Any]) -> None:
    original = getattr(GPUModelRunner, name)

    @functools.wraps(original)
    def wrapper(runner: Any, *args: Any, **kwargs: Any) -> Any:
        draft = getattr(runner, "drafter", None)
        if isinstance(draft, RemoteDraft):
            return around(draft, original, runner, *args, **kwargs)
        return original(runner, *args, **kwargs)

    setattr(GPUModelRunner, name, wrapper)


def _set_up(draft: RemoteDraft, original: Callable[..., None], runner: Any) -> None:
    runner.use_aux_hidden_state_outputs = True
    original(runner)
    draft.connect(runner)


def _fits(draft: RemoteDraft, original: Callable[..., bool], runner: Any, common_attn_metadata: Any) -> bool:
    """Every step is shown to the draft.

    vLLM would skip the whole batch while one request is within K tokens of the length limit, which would leave every
    other request with a gap. Drafts past the limit are cut by the scheduler.
    """
    return common_attn_metadata is not None


def _propose(
    draft: RemoteDraft,
    original: Callable[..., Any],
    runner: Any,
    scheduler_output: Any,
    sampled_token_ids: list[list[int]],
    sampling_metadata: Any,
    hidden_states: torch.Tensor,
    sample_hidden_states: torch.Tensor,
    aux_hidden_states: list[torch.Tensor],
    spec_decode_metadata: Any,
    common_attn_metadata: Any,
    slot_mappings: Any,
) -> list[list[int]]:
    all_greedy = bool(sampling_metadata.all_greedy)
    draft.observe(_TargetStep(runner, aux_hidden_states, spec_decode_metadata, common_attn_metadata, all_greedy))
    return original(
        runner,
        scheduler_output,
        sampled_token_ids,
        sampling_metadata,
        hidden_states,
        sample_hidden_states,
        aux_hidden_states,
        spec_decode_metadata,
        common_attn_metadata,
        slot_mappings,
    )


install_hooks()
