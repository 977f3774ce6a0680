"""A vLLM engine inside this process, shared by many callers.

Requests of all callers run in one continuous batch: a thread owns the engine and steps it while there is work.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, cast

from engines.versions import require_tested_vllm
from unmask.errors import ConfigError, PromptError
from unmask.types import FinishReason, SamplingOptions

_FINISH_REASONS = ("stop", "length", "abort")


@dataclass(frozen=True, slots=True)
class Completion:
    """Token ids of a response, the end-of-text token included if it was drawn."""

    token_ids: list[int]
    finish_reason: FinishReason


class EngineDiedError(RuntimeError):
    """The engine failed while it ran; its process should end and be started anew."""


@dataclass(frozen=True, slots=True)
class _Request:
    prompt_ids: Sequence[int]
    options: SamplingOptions
    future: Future[Completion]


class OfflineEngine:
    """Generates with vLLM in this process.

    Args:
        arguments: of vLLM's `EngineArgs` (see `engines.engine_options`).
        on_gpu: decides which versions of vLLM are acceptable.

    Raises:
        ConfigError: vLLM is missing or of an untested version, or refuses the arguments.
    """

    def __init__(self, arguments: dict[str, Any], *, on_gpu: bool = False) -> None:
        require_tested_vllm("v2" if on_gpu else "v1")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        self._incoming: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._running: dict[str, Future[Completion]] = {}
        self._closing = False
        self._ending = threading.Lock()
        self._loop: Future[None] = Future()
        self._loop.add_done_callback(self._fail_rest)
        built: Future[Any] = Future()
        # A daemon: the process must be able to end while the engine waits for work, or its memory is never released.
        self._thread = threading.Thread(target=self._live, args=(arguments, built), name="vllm", daemon=True)
        self._thread.start()
        self._engine = built.result()

    def submit(self, prompt_ids: Sequence[int], options: SamplingOptions) -> Future[Completion]:
        """Queue one request. Its future raises PromptError if vLLM refuses it, EngineDiedError if the engine fails."""
        future: Future[Completion] = Future()
        self._incoming.put(_Request(prompt_ids, options, future))
        if self._loop.done():
            self._fail_rest(self._loop)
        return future

    def close(self) -> None:
        """Finish what runs, then release the engine's memory."""
        self._incoming.put(None)
        self._thread.join()
        self._engine.engine_core.shutdown()

    def _live(self, arguments: dict[str, Any], built: Future[Any]) -> None:
        """The thread: vLLM's thread settings belong to the one that builds the engine, so the same one steps it."""
        try:
            self._engine = _build(arguments)
        except BaseException as error:  # noqa: BLE001 - the caller raises it in its own thread
            built.set_exception(error)
            return
        built.set_result(self._engine)
        try:
            self._run()
        except BaseException as error:  # noqa: BLE001 - waiting callers are told whatever ended the engine
            self._loop.set_exception(error)
        else:
            self._loop.set_result(None)

    def _run(self) -> None:
        names = itertools.count()
        while self._admit(names):
            for output in self._engine.step():
                self._running.pop(output.request_id).set_result(_completion(output.outputs[0]))

    def _admit(self, names: itertools.count[int]) -> bool:
        """Hand queued requests to the engine, waiting for one if it is idle; False when there is no more to do."""
        while not self._closing and not (self._running and self._incoming.empty()):
            request = self._incoming.get()
            if request is None:
                self._closing = True
            else:
                self._add(str(next(names)), request)
        return bool(self._running)

    def _add(self, name: str, request: _Request) -> None:
        prompt = {"type": "token", "prompt_token_ids": list(request.prompt_ids)}
        self._running[name] = request.future
        try:
            self._engine.add_request(name, prompt, _sampling_params(request.options))
        except _refusals() as error:
            self._running.pop(name).set_exception(PromptError(f"the engine refuses the prompt: {error}"))

    def _fail_rest(self, loop: Future[None]) -> None:
        """The loop has ended: nothing that is queued or running will be answered any more."""
        with self._ending:
            rest = [*self._running.values()]
            self._running.clear()
            while not self._incoming.empty():
                request = self._incoming.get()
                rest += [request.future] if request else []
        for future in rest:
            error = EngineDiedError(f"the engine stopped: {loop.exception() or 'it was closed'}")
            error.__cause__ = loop.exception()
            future.set_exception(error)


def _build(arguments: dict[str, Any]) -> Any:
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    try:
        return LLMEngine.from_engine_args(EngineArgs(**arguments))
    except (*_refusals(), TypeError) as error:
        raise ConfigError(f"vLLM refuses the engine options: {error}", field="target.engine") from error


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
