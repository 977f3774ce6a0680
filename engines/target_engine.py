"""The target of a pairing: vLLM's asynchronous engine, token ids in, token ids out, with or without a draft."""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any, cast

from vllm import AsyncEngineArgs, RequestOutput
from vllm import exceptions as vllm_exceptions
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from engines.core_process import tie_engine_cores
from engines.draft_arguments import (
    EIGHT_BIT_VARIABLE,
    LINK_FILE_VARIABLE,
    MAILBOX_FOLDER_VARIABLE,
    TURNS_VARIABLE,
    WATCHDOG_VARIABLE,
    RemoteDraftOptions,
    with_remote_draft,
)
from engines.engine_options import engine_arguments
from engines.offline_engine import EngineDiedError
from engines.sampling import plain_logprobs, sampling_params
from engines.stats_recorder import StatsRecorder
from engines.target_stats import TargetStats
from engines.verification_counts import told_by_vllm, verifications_of
from engines.versions import host_runner, require_tested_vllm
from unmask.config import TargetConfig
from unmask.errors import ConfigError, PromptError
from unmask.pairing.link_file import read_link_file
from unmask.pairing.status import read_status
from unmask.targets import resolve_target
from unmask.types import FinishReason, SamplingOptions, ServedRequest, TokenDelta

_CLIENT_ERRORS = (ValueError, getattr(vllm_exceptions, "VLLMClientError", ValueError))
"""vLLM 0.26 has no class of its own for a client's mistakes."""
_ENDED = ("stop", "length")
_FINISH_REASONS = (*_ENDED, "abort")
_CPU_VARIABLES = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "PASSIVE"}
"""Replicas share their host: pinned threads would meet on one core, and idle ones that spin would starve the draft."""
_GPU_VARIABLES = {"VLLM_USE_V2_MODEL_RUNNER": "1"}
_WATCHDOG_SHARE = 1.25
_IN_CORE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


def target_arguments(
    config: TargetConfig,
    path: Path,
    *,
    dtype: str,
    max_num_seqs: int,
    on_gpu: bool,
    draft: RemoteDraftOptions | None = None,
) -> dict[str, Any]:
    """Arguments of vLLM's `AsyncEngineArgs`.

    Raises:
        ConfigError: an unknown engine option, or one that contradicts the draft.
    """
    arguments = {"max_num_seqs": max_num_seqs, **engine_arguments(config, path, dtype=dtype, on_gpu=on_gpu)}
    if not on_gpu and _world_size(arguments) == 1:
        # By name, vLLM's CPU platform would put the one worker into a process of its own: a second import of vLLM.
        arguments.setdefault("distributed_executor_backend", _IN_CORE_PROCESS)
    if draft is None:
        return arguments
    if told_by_vllm():
        arguments["per_request_spec_decode_metrics"] = "detailed"
    return with_remote_draft(arguments, draft, host_runner(on_gpu))


class TargetEngine:
    """Serves one target to many concurrent requests.

    Args:
        config: the target.
        dtype: compute type, or `auto`.
        max_num_seqs: requests that run at once; more wait.
        on_gpu: False adds what a CPU host needs.
        draft: where proposals come from; None serves the target alone.
    """

    def __init__(
        self,
        config: TargetConfig,
        *,
        dtype: str = "auto",
        max_num_seqs: int = 32,
        on_gpu: bool = False,
        draft: RemoteDraftOptions | None = None,
    ) -> None:
        self._config = config
        self._dtype = dtype
        self._max_num_seqs = max_num_seqs
        self._on_gpu = on_gpu
        self._draft = draft
        self._stats = TargetStats()
        self._engine: AsyncLLM | None = None
        self._salted = False

    async def start(self) -> None:
        """Load the model and start the engine core, a process of its own.

        Raises:
            ConfigError: vLLM is of an untested version, or refuses an option.
            CheckpointError: the target cannot be loaded.
        """
        require_tested_vllm(host_runner(self._on_gpu))
        path = await asyncio.to_thread(resolve_target, self._config.model, self._config.revision)
        arguments = target_arguments(
            self._config,
            path,
            dtype=self._dtype,
            max_num_seqs=self._max_num_seqs,
            on_gpu=self._on_gpu,
            draft=self._draft,
        )
        self._salted = self._draft is not None and bool(arguments["enable_prefix_caching"])
        self._engine = await asyncio.to_thread(self._build, arguments)

    async def stop(self) -> None:
        """End the engine core; running requests end with an error."""
        engine, self._engine = self._engine, None
        if engine is None:
            return
        if engine.output_handler is not None:
            # Left to itself, vLLM's task would report the end of its core as a crash before it tells the requests.
            engine.output_handler.cancel()
            engine.output_processor.propagate_error(EngineDeadError())
        await asyncio.to_thread(engine.shutdown)

    @property
    def alive(self) -> bool:
        """Whether the engine core runs."""
        return self._engine is not None and not self._engine.errored

    async def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        options: SamplingOptions,
        on_end: Callable[[ServedRequest], None] | None = None,
    ) -> AsyncIterator[TokenDelta]:
        """Stream a response; closing or cancelling the iterator aborts the request in the engine.

        Args:
            on_end: told of the request when it has ended by itself. It must not wait.

        Raises:
            PromptError: vLLM refuses the prompt or the options.
            EngineDiedError: the engine core has ended.
        """
        if self._engine is None:
            raise EngineDiedError("the engine is not running")
        try:
            params = sampling_params(options, RequestOutputKind.DELTA)
            prompt = TokensPrompt(prompt_token_ids=list(prompt_ids))
            if self._salted:
                prompt["cache_salt"] = self._cache_salt()
            generator = cast("AsyncGenerator[RequestOutput]", self._engine.generate(prompt, params, request_id))
            response: list[int] = []
            async with aclosing(generator) as outputs:
                async for output in outputs:
                    completion = output.outputs[0]
                    response += completion.token_ids
                    if on_end is not None and completion.finish_reason in _ENDED:
                        on_end(_served(prompt_ids, response, output))
                    yield _delta(output, len(response))
        except _CLIENT_ERRORS as error:
            raise PromptError(f"the engine refuses the request: {error}") from error
        except EngineDeadError as error:
            raise EngineDiedError("the engine core has ended") from error

    def stats(self) -> TargetStats:
        """Counters since the start; speculation's are those of vLLM's scheduler."""
        return copy.deepcopy(self._stats)

    def link_status(self) -> dict[str, float] | None:
        """Counters of the worker's draft link (`unmask.pairing.status`); None without one, or before it is up."""
        status_file = read_link_file(self._draft.link_file).status_file if self._draft else None
        return read_status(status_file) if status_file else None

    def _cache_salt(self) -> str:
        """Keeps prefixes apart that different drafts have seen: one that was cached for a draft that is gone would
        leave its successor without their features, for as long as they are asked for.
        """
        return f"draft epoch {(self.link_status() or {}).get('epoch', 0):.0f}"

    def _build(self, arguments: Mapping[str, Any]) -> AsyncLLM:
        variables = dict(_GPU_VARIABLES if self._on_gpu else _CPU_VARIABLES)
        if self._draft is not None and self._draft.mailbox_folder is not None:
            variables[MAILBOX_FOLDER_VARIABLE] = str(self._draft.mailbox_folder.absolute())
        if self._draft is not None:
            variables[LINK_FILE_VARIABLE] = str(self._draft.link_file.absolute())
        if self._draft is not None and self._draft.eight_bit_rows:
            variables[EIGHT_BIT_VARIABLE] = "1"
        if self._draft is not None and self._draft.turns_from is not None:
            variables[TURNS_VARIABLE] = str(self._draft.turns_from)
        if self._draft is not None and self._draft.timeout_ms is not None:
            # The sidecar gives up first, and says so; the watchdog is for when it cannot.
            variables[WATCHDOG_VARIABLE] = f"{_WATCHDOG_SHARE * self._draft.timeout_ms:g}"
        tie_engine_cores()
        try:
            with _environment(variables):
                return AsyncLLM.from_engine_args(
                    AsyncEngineArgs(**arguments),
                    stat_loggers=[lambda config, index=0: StatsRecorder(config, index, self._stats)],
                )
        except (ValueError, TypeError) as error:
            raise ConfigError(f"vLLM refuses the engine options: {error}", field="target.engine") from error


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables for the processes that are started inside the block; those the user has set stay as they are."""
    added = {name: value for name, value in variables.items() if name == LINK_FILE_VARIABLE or name not in os.environ}
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _world_size(arguments: Mapping[str, Any]) -> int:
    return arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)


def _delta(request: RequestOutput, emitted: int) -> TokenDelta:
    """vLLM's delta in our words; `emitted` counts the response's tokens, this delta's included."""
    output: Any = request.outputs[0]
    verifications = verifications_of(request)
    reason = output.finish_reason
    if reason is not None and reason not in _FINISH_REASONS:
        reason = "error"
    return TokenDelta(
        token_ids=list(output.token_ids),
        finish_reason=cast("FinishReason | None", reason),
        logprobs=plain_logprobs(output.logprobs),
        num_forwards=_num_forwards(verifications, emitted) if reason is not None else None,
    )


def _served(prompt_ids: Sequence[int], response_ids: list[int], output: RequestOutput) -> ServedRequest:
    completion = output.outputs[0]
    verifications = verifications_of(output)
    accepted, drafted = verifications or ([], [])
    return ServedRequest(
        prompt_ids=list(prompt_ids),
        response_ids=response_ids,
        finish_reason=cast("FinishReason", completion.finish_reason),
        num_forwards=_num_forwards(verifications, len(response_ids)),
        accepted=accepted,
        drafted=drafted,
        cached_tokens=output.num_cached_tokens or 0,
    )


def _num_forwards(verifications: tuple[list[int], list[int]] | None, emitted: int) -> int:
    """Each forward emits one token of the target's own and the drafted ones that it accepts."""
    if verifications is None:
        return emitted
    accepted, _ = verifications
    # The last block may have been accepted beyond the end of the response; the prompt's forward is no verification.
    return max(emitted - sum(accepted), len(accepted) + 1)
