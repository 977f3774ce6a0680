"""An engine inside this process, shared by many callers: one thread owns it and steps it while there is work."""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from unmask.errors import UserError
from unmask.types import FinishReason, SamplingOptions


@dataclass(frozen=True, slots=True)
class Completion:
    """Token ids of a response, the end-of-text token included if it was drawn."""

    token_ids: list[int]
    finish_reason: FinishReason
    num_forwards: int | None = None
    """Forwards that the response took; None where each token took one."""
    commit_step: list[int] | None = None
    """The forward (from 1) that committed each token, for engines that commit in any order."""


class EngineDiedError(RuntimeError):
    """The engine failed while it ran; its process should end and be started anew."""


class SteppedEngine(Protocol):
    """What the thread drives. Only the thread that built it calls it."""

    @property
    def has_room(self) -> bool:
        """Whether another request may be added now."""
        ...

    def add(self, name: str, prompt_ids: Sequence[int], options: SamplingOptions) -> None:
        """Take a request. Raises PromptError to refuse it."""
        ...

    def step(self) -> Iterable[tuple[str, Completion]]:
        """Go on with all requests; those that finished, by name."""
        ...


@dataclass(frozen=True, slots=True)
class _Request:
    prompt_ids: Sequence[int]
    options: SamplingOptions
    future: Future[Completion]


E = TypeVar("E", bound=SteppedEngine)


class EngineThread(Generic[E]):
    """Requests of all callers run in one continuous batch.

    Args:
        build: makes the engine, in the thread; what it raises is raised here.
        name: of the thread.
    """

    def __init__(self, build: Callable[[], E], name: str) -> None:
        self._incoming: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._waiting: deque[_Request] = deque()
        self._running: dict[str, Future[Completion]] = {}
        self._closing = False
        self._ending = threading.Lock()
        self._loop: Future[None] = Future()
        self._loop.add_done_callback(self._fail_rest)
        built: Future[E] = Future()
        # A daemon: the process must be able to end while the engine waits for work, or its memory is never released.
        self._thread = threading.Thread(target=self._live, args=(build, built), name=name, daemon=True)
        self._thread.start()
        self._engine: E = built.result()

    def submit(self, prompt_ids: Sequence[int], options: SamplingOptions) -> Future[Completion]:
        """Queue one request. Its future raises PromptError if it is refused, EngineDiedError if the engine fails."""
        future: Future[Completion] = Future()
        self._incoming.put(_Request(prompt_ids, options, future))
        if self._loop.done():
            self._fail_rest(self._loop)
        return future

    def close(self) -> None:
        """Finish what is queued and what runs, then end the thread."""
        self._incoming.put(None)
        self._thread.join()

    def _live(self, build: Callable[[], E], built: Future[E]) -> None:
        """The thread: torch's and vLLM's thread settings belong to the one that builds the engine, so it steps it."""
        try:
            self._engine = build()
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
            for name, completion in self._engine.step():
                self._running.pop(name).set_result(completion)

    def _admit(self, names: itertools.count[int]) -> bool:
        """Hand queued requests to the engine, waiting for one if it is idle; False when there is no more to do."""
        while not self._closing and not (self._running and self._incoming.empty()):
            request = self._incoming.get()
            if request is None:
                self._closing = True
            else:
                self._waiting.append(request)
                self._fill(names)
        self._fill(names)
        return bool(self._running)

    def _fill(self, names: itertools.count[int]) -> None:
        while self._waiting and self._engine.has_room:
            request = self._waiting.popleft()
            name = str(next(names))
            self._running[name] = request.future
            try:
                self._engine.add(name, request.prompt_ids, request.options)
            except UserError as error:
                self._running.pop(name).set_exception(error)

    def _fail_rest(self, loop: Future[None]) -> None:
        """The loop has ended: nothing that is queued or running will be answered any more."""
        with self._ending:
            rest = [*self._running.values(), *(request.future for request in self._waiting)]
            self._running.clear()
            self._waiting.clear()
            while not self._incoming.empty():
                request = self._incoming.get()
                rest += [request.future] if request else []
        for future in rest:
            error = EngineDiedError(f"the engine stopped: {loop.exception() or 'it was closed'}")
            error.__cause__ = loop.exception()
            future.set_exception(error)
