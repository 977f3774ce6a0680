"""vLLM, shared by many callers of this process."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from multiprocessing.util import Finalize
from typing import Any, cast

from engines.engine_thread import Completion, EngineDiedError, EngineThread
from engines.versions import require_tested_vllm
from unmask.errors import ConfigError, PromptError
from unmask.types import FinishReason, SamplingOptions

_FINISH_REASONS = ("stop", "length", "abort")


class OfflineEngine(EngineThread["_VllmEngine"]):
    """Generates with vLLM: on a CPU in this process; on a GPU its scheduler and model have a process of their own, lest
    they wait for the interpreter that tokenises and writes.

    Args:
        arguments: of vLLM's `EngineArgs` (see `engines.engine_options`).
        on_gpu: decides where the engine runs, and which versions of vLLM are acceptable.

    Raises:
        ConfigError: vLLM is missing or of an untested version, or refuses the arguments.
    """

    def __init__(self, arguments: dict[str, Any], *, on_gpu: bool = False) -> None:
        require_tested_vllm("v2" if on_gpu else "v1")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if on_gpu else "0"
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        super().__init__(lambda: _VllmEngine(arguments, has_process=on_gpu), "vllm")

    def close(self) -> None:
        """Finish what runs, then release the engine's memory."""
        super().close()
        self._engine.shutdown()


class _VllmEngine:
    """vLLM's engine as the thread drives it."""

    has_room = True
    """It keeps a queue of its own."""

    def __init__(self, arguments: dict[str, Any], *, has_process: bool) -> None:
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        from engines.core_process import tie_engine_cores

        tie_engine_cores()
        try:
            self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        except (*_refusals(), TypeError) as error:
            raise ConfigError(f"vLLM refuses the engine options: {error}", field="target.engine") from error
        if has_process:
            # Python waits for child processes when it ends, `close` or not.
            Finalize(None, self._engine.engine_core.shutdown, exitpriority=0)

    def add(self, name: str, prompt_ids: Sequence[int], options: SamplingOptions) -> None:
        """See SteppedEngine."""
        prompt = {"type": "token", "prompt_token_ids": list(prompt_ids)}
        try:
            self._engine.add_request(name, cast(Any, prompt), _sampling_params(options))
        except _refusals() as error:
            raise PromptError(f"the engine refuses the prompt: {error}") from error

    def step(self) -> Iterable[tuple[str, Completion]]:
        """See SteppedEngine."""
        outputs: list[Any] = self._engine.step()
        return [(output.request_id, _completion(output.outputs[0])) for output in outputs]

    def shutdown(self) -> None:
        """Release the memory."""
        self._engine.engine_core.shutdown()


def _refusals() -> tuple[type[Exception], ...]:
    """What vLLM raises where the caller is at fault; only newer versions have a class of their own for it."""
    import vllm.exceptions

    return ValueError, getattr(vllm.exceptions, "VLLMClientError", ValueError)


def _sampling_params(options: SamplingOptions) -> Any:
    # Imported with the engine: they pull in vLLM, which takes seconds.
    from vllm.sampling_params import RequestOutputKind

    from engines.sampling import sampling_params

    return sampling_params(options, RequestOutputKind.FINAL_ONLY)


def _completion(output: Any) -> Completion:
    reason = output.finish_reason if output.finish_reason in _FINISH_REASONS else "error"
    return Completion(list(output.token_ids), cast(FinishReason, reason))


__all__ = ["Completion", "EngineDiedError", "OfflineEngine"]
