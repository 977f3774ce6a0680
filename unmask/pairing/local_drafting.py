"""A draft on the target's own host: its process maps the mailbox and drafts for it directly."""

from __future__ import annotations

import itertools
import logging
import queue
from collections.abc import Callable, Sequence

import numpy as np
import torch

from unmask.errors import ConfigError, WireError
from unmask.pairing.batcher import Batcher
from unmask.pairing.draft_engine import DraftEngine
from unmask.pairing.hello import Hello
from unmask.pairing.mailbox import Control, Mailbox
from unmask.pairing.mailbox_reader import Asked, no_proposals
from unmask.pairing.mailbox_words import LATE, REPLY
from unmask.pairing.step_watch import Watch
from unmask.pairing.stream_end import StreamEnd
from unmask.pairing.stream_words import HostWords, PinnedMailbox, StreamWords
from unmask.pairing.wire import Proposals, Step

logger = logging.getLogger(__name__)

_LOOK_S = 0.5


class LocalDrafting:
    """Answers one mailbox with the engine of this process, batched with all others that it serves.

    Args:
        engine: the draft.
        batcher: the engine's thread.
        new_session: numbers of sessions that nobody else uses.
        session: one that has begun already; None takes a new one.
    """

    def __init__(
        self, engine: DraftEngine, batcher: Batcher, new_session: Callable[[], int], session: int | None = None
    ) -> None:
        self._engine, self._batcher, self._new_session = engine, batcher, new_session
        self._session = new_session() if session is None else session
        self._steps = itertools.count(1)
        self._replies: queue.SimpleQueue[Proposals | None] = queue.SimpleQueue()
        self._end: StreamEnd | None = None
        self._is_careful = False
        """Rows of the last step could not be served ahead: the next one is left to the engine's own rules."""
        self.before_booking: Callable[[int], None] = lambda number: None
        """Called when a step that was queued has been answered and is about to be booked."""

    is_elsewhere = False
    """See `Proposer.is_elsewhere`."""

    def look_around(self) -> None:
        """See `Proposer.look_around`: nobody else ever serves it."""

    @property
    def hello(self) -> Hello | None:
        """See `Proposer.hello`."""
        return self._engine.hello if self._batcher.alive else None

    def propose(self, asked: Asked) -> tuple[np.ndarray, np.ndarray]:
        """See `Proposer.propose`."""
        step = Step(
            draft_version=asked.draft_version,
            epoch=0,
            number=next(self._steps),
            num_speculative_tokens=asked.k,
            rows=asked.rows,
            features=asked.features.to(self._engine.weights.dtype),
            finished=np.array(asked.finished, dtype="<u8"),
            page_hashes=asked.page_hashes,
        )
        try:
            self._engine.check(step)
        except WireError as error:
            logger.warning("refused a step: %s", error)
            return no_proposals(asked)
        self._batcher.submit(self._session, step, self._replies.put)
        reply = self._reply()
        return (reply.tokens, reply.counts) if reply is not None else no_proposals(asked)

    def open(self, mailbox: Mailbox) -> None:
        """Take up a mailbox. On a GPU its steps are queued behind their doorbells while no other target asks."""
        weights = self._engine.weights
        if not self._engine.runs_ahead:
            return
        words: StreamWords | None = None
        with torch.cuda.device_of(weights):
            try:
                words = PinnedMailbox(mailbox) if weights.is_cuda else HostWords(mailbox)
                end = StreamEnd(mailbox, words)
                self._engine.prepare_ahead(end, mailbox.word(REPLY))
            except (ConfigError, RuntimeError) as error:
                # Such as memory that cannot be pinned. If the device has failed the engine notices with the next step.
                logger.warning("steps are drafted once their doorbell has rung: %s", error)
                _unpin(words)
                return
        self._end = end

    def ahead(self, control: Control, finished: Sequence[int], watch: Watch) -> bool:
        """See `Proposer.ahead`. The step of a target that is alone is queued behind its doorbell; with several, a wait
        for one must not hold up the others, and what rings while the engine is busy is batched."""
        end, is_careful = self._end, self._is_careful
        self._is_careful = False
        if end is None or is_careful:
            return False
        is_alone = self._batcher.is_alone(self._session)
        if not is_alone and not watch.until_rung():
            return False
        try:
            with self._engine.ahead(self._session, control, finished, end, waits=is_alone) as step:
                if step is None:
                    return False
                took = watch.until_done(end)
                self.before_booking(control.number)
                seen = end.seen(control.number, len(control.requests))
                booking = self._engine.book(step, seen)
        except Exception:
            # A device that fails here fails everybody: they shall notice as if the engine's own thread had met it.
            self._batcher.end()
            raise
        self._is_careful = not booking.all_served
        self._batcher.note_ahead(control.requests, booking.counts, took)
        if seen.was_released:
            end.mailbox.set_word(LATE, end.mailbox.word(LATE) + 1)
        else:
            end.mailbox.count_answer(int(took * 1e9))
        if not seen.is_intact:
            self.forget()
        return True

    def forget(self) -> None:
        """See `Proposer.forget`."""
        self._engine.close_session(self._session)
        self._session = self._new_session()

    def close(self) -> None:
        """Drop the context of this mailbox."""
        self._engine.close_session(self._session)
        if self._end is not None:
            self._end.close()

    def _reply(self) -> Proposals | None:
        """Of the step under way; None if the draft was replaced or has ended."""
        while self._batcher.alive:
            try:
                return self._replies.get(timeout=_LOOK_S)
            except queue.Empty:
                continue
        return None


def _unpin(words: StreamWords | None) -> None:
    """Give back the pages of a mailbox that is not served ahead after all; on the draft's device."""
    if not isinstance(words, PinnedMailbox):
        return
    try:
        # Something may have been launched before the failure.
        torch.cuda.synchronize()
        words.close()
    except (ConfigError, RuntimeError) as error:
        logger.warning("a mailbox stays pinned: %s", error)
