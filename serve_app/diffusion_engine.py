"""A `DiffusionEngine` on a thread of its own, and the event loop's way to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from serve_app.backend import BackendUnavailableError
from unmask.decoding.engine import DiffusionEngine, EngineConfig, EngineFull
from unmask.decoding.library import DecoderLibrary
from unmask.decoding.request import DecodeRequest
from unmask.errors import UserError
from unmask.types import TokenDelta

logger = logging.getLogger(__name__)

Event = TokenDelta | Exception


@dataclass(frozen=True, slots=True)
class _Submit:
    request: DecodeRequest
    decoder: Mapping[str, Any] | None
    tell: Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


_Command = _Submit | _Abort | Future[None] | None


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """What the engine has done, and what it is doing. Read without a lock: each number is right by itself."""

    num_steps: int = 0
    num_batches: int = 0
    """Forwards; a step may need several."""
    num_running: int = 0
    num_waiting: int = 0
    num_tokens: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    finished_tokens: int = 0
    finished_forwards: int = 0
    """Of the finished requests: with their tokens, the tokens per forward."""


class StreamingEngine:
    """Streams the blocks of each request as they are finished.

    Args:
        build: makes the decoders and their networks; runs in the thread that will use them.
        config: bounds of the engine.

    Raises:
        Whatever `build` or the engine's constructor raises.
    """

    def __init__(self, build: Callable[[], DecoderLibrary], config: EngineConfig) -> None:
        self.stats = EngineStats()
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._told: dict[str, Callable[[Event], None]] = {}
        self._ended = threading.Event()
        ready: Future[None] = Future()
        # A daemon: the process must be able to end while the engine waits for work.
        self._thread = threading.Thread(target=self._live, args=(build, config, ready), name="diffusion", daemon=True)
        self._thread.start()
        ready.result()

    @property
    def alive(self) -> bool:
        """Whether the engine takes requests."""
        return not self._ended.is_set()

    async def generate(
        self, request: DecodeRequest, decoder: Mapping[str, Any] | None
    ) -> AsyncGenerator[TokenDelta, None]:
        """Decode a request; closing the generator frees its row.

        Raises:
            UserError: a request or decoder that cannot be run.
            BackendUnavailableError: the engine is full or has ended.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()
        self._send(_Submit(request, decoder, lambda event: _post(loop, events, event)))
        running = True
        try:
            while running:
                event = await events.get()
                running = isinstance(event, TokenDelta) and event.finish_reason is None
                if not isinstance(event, TokenDelta):
                    raise event
                yield event
        finally:
            if running and self.alive:
                self._commands.put(_Abort(request.request_id))

    async def check(self) -> None:
        """Wait until the engine has answered. Raises BackendUnavailableError when it has ended."""
        answer: Future[None] = Future()
        self._send(answer)
        await asyncio.wrap_future(answer)

    def stop(self) -> None:
        """End the thread after its current step; requests that run are told so."""
        self._commands.put(None)
        self._thread.join()

    def _send(self, command: _Command) -> None:
        if not self.alive:
            raise BackendUnavailableError("the engine has ended")
        self._commands.put(command)
        if not self.alive:  # it ended in between, and may not have seen the command
            self._refuse_rest()

    def _live(self, build: Callable[[], DecoderLibrary], config: EngineConfig, ready: Future[None]) -> None:
        try:
            library = build()
            engine = DiffusionEngine(library.models, config)
        except BaseException as error:  # noqa: BLE001 - the constructor raises it in its own thread
            ready.set_exception(error)
            return
        ready.set_result(None)
        try:
            while self._obey(engine, library):
                self._step(engine)
        except Exception:
            logger.exception("the diffusion engine failed")
        finally:
            self._ended.set()
            self._refuse_rest()

    def _obey(self, engine: DiffusionEngine, library: DecoderLibrary) -> bool:
        """Carry out all commands, waiting for one while there is no work; False when told to end."""
        while True:
            try:
                command = self._commands.get(block=not engine.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            if isinstance(command, Future):
                _answer(command, None)
            elif isinstance(command, _Abort):
                self._told.pop(command.request_id, None)
                self.stats.num_aborted += engine.abort(command.request_id)
            else:
                self._submit(engine, library, command)
            self.stats.num_running, self.stats.num_waiting = engine.num_running, engine.num_waiting

    def _submit(self, engine: DiffusionEngine, library: DecoderLibrary, command: _Submit) -> None:
        try:
            engine.submit(command.request, library.get(command.decoder))
        except UserError as error:
            command.tell(error)
        except EngineFull as error:
            command.tell(BackendUnavailableError(str(error)))
        else:
            self._told[command.request.request_id] = command.tell

    def _step(self, engine: DiffusionEngine) -> None:
        stats = self.stats
        for output in engine.step():
            stats.num_tokens += len(output.delta.token_ids)
            tell = self._told[output.request_id]
            if output.completion is not None:
                del self._told[output.request_id]
                stats.num_finished += 1
                stats.finished_tokens += len(output.completion.response_ids)
                stats.finished_forwards += output.completion.num_forwards
            tell(output.delta)
        stats.num_steps, stats.num_batches = engine.num_steps, engine.num_batches
        stats.num_running, stats.num_waiting = engine.num_running, engine.num_waiting

    def _refuse_rest(self) -> None:
        error = BackendUnavailableError("the engine has ended")
        while self._told:
            self._told.popitem()[1](error)
        while not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, _Submit):
                command.tell(error)
            elif isinstance(command, Future):
                _answer(command, error)


def _answer(future: Future[None], error: Exception | None) -> None:
    if not future.set_running_or_notify_cancel():
        return  # whoever asked waits no longer
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _post(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    """Hand an event over; a loop that has closed has nobody left to be told."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(events.put_nowait, event)
