"""Continuous batching in front of a `DraftEngine`: one thread runs whatever has arrived as one step."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import numpy as np

from unmask.pairing.draft_engine import DraftEngine
from unmask.pairing.request_log import RequestLog
from unmask.pairing.wire import Proposals, Step

_LATELY_S = 1.0

Answer = Callable[[Proposals | None], None]
"""Called once, on the engine's thread, with the reply to a step; None if it was for another draft version."""


class Batcher:
    """Owns the thread that runs the engine.

    Args:
        engine: what runs the steps.
        on_end: called on the engine's thread when it ends, also by an error: whoever waits must be told.
    """

    def __init__(self, engine: DraftEngine, on_end: Callable[[], None]) -> None:
        self._engine = engine
        self._on_end = on_end
        self._arrived: queue.SimpleQueue[tuple[int, Step, Answer] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="draft_engine", daemon=True)
        self.steps = 0
        self.messages = 0
        self.proposals = 0
        self.proposed_tokens = 0
        self.busy_s = 0.0
        self.log = RequestLog()
        self._asked_at: dict[int, float] = {}

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def stop(self) -> None:
        """End after the step under way; what waits is not answered."""
        self._arrived.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    def end(self) -> None:
        """Take nothing more: the engine has failed on another thread. Whoever waits is told as if it were this one."""
        self._arrived.put(None)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    def is_alone(self, session: int) -> bool:
        """Whether no other session has asked of late: what is queued ahead for one keeps the others waiting."""
        now = time.monotonic()
        self._asked_at[session] = now
        for other, asked_at in list(self._asked_at.items()):
            if now - asked_at > _LATELY_S:
                self._asked_at.pop(other, None)
        return len(self._asked_at) == 1

    def note_ahead(self, requests: np.ndarray, counts: np.ndarray, took: float) -> None:
        """Count a step that was not run here.

        Args:
            requests: uint64 [R].
            counts: ids that each was answered with [R].
            took: seconds of the draft, until now.
        """
        self.busy_s += took
        self.steps += 1
        self._note(requests, counts, took)

    def submit(self, session: int, step: Step, answer: Answer) -> None:
        """Queue a step of a session that has none under way."""
        self._asked_at[session] = time.monotonic()
        self._arrived.put((session, step, answer))

    def _run(self) -> None:
        try:
            while (first := self._arrived.get()) is not None:
                batch = [first]
                while not self._arrived.empty():
                    more = self._arrived.get()
                    if more is None:
                        return
                    batch.append(more)
                self._run_batch(batch)
        finally:
            self._on_end()

    def _run_batch(self, batch: list[tuple[int, Step, Answer]]) -> None:
        started = time.monotonic()
        replies = self._engine.step([(session, step) for session, step, _ in batch])
        took = time.monotonic() - started
        self.busy_s += took
        self.steps += 1
        for (_, step, answer), reply in zip(batch, replies, strict=True):
            if reply is None:
                self.messages += 1
            else:
                self._note(step.rows["request"], reply.counts, took)
            answer(reply)

    def _note(self, requests: np.ndarray, counts: np.ndarray, took: float) -> None:
        ended_at = time.time()
        self.messages += 1
        self.log.note(requests, counts, ended_at - took, ended_at)
        self.proposals += int((counts > 0).sum())
        self.proposed_tokens += int(counts.sum())
