"""The draft's end of a mailbox: steps that have rung, answered one after another by whatever drafts."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from unmask.pairing.hello import Hello
from unmask.pairing.mailbox import Control, Mailbox
from unmask.pairing.mailbox_target import write_offer
from unmask.pairing.mailbox_words import ALIVE, CONTROL, DOORBELL, REPLY, SERVING, STEP_MASK, TAKEN, is_reached
from unmask.pairing.polling import SHORT_REST_S, Attention, sharpen_timer
from unmask.pairing.step_watch import StepWatch, Watch
from unmask.pairing.wire import ROW

_LOOK_S = 0.05
_ATTENTIVE_S = 1.0
_REST_S = 0.001
"""Between two polls while no steps come in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A step that has rung.

    Attributes:
        number: the step.
        k: tokens to draft for each row.
        draft_version: of the projection that made the features.
        rows: `ROW` records, one a request.
        features: projected features [T, H] of the rows in order; a view of the mailbox.
        finished: requests that will not be named again.
        page_hashes: of the rows, one after another (see `Step`).
    """

    number: int
    k: int
    draft_version: int
    rows: np.ndarray
    features: Tensor
    finished: list[int]
    page_hashes: np.ndarray


class Proposer(Protocol):
    """What drafts for a mailbox."""

    @property
    def hello(self) -> Hello | None:
        """The draft that can be asked now; None if there is none."""

    @property
    def is_elsewhere(self) -> bool:
        """Whether somebody else serves the mailbox for now."""

    def look_around(self) -> None:
        """Called between steps, many times a second: who serves the mailbox may change here and nowhere else."""

    def propose(self, asked: Asked) -> tuple[np.ndarray, np.ndarray]:
        """Ids [R, K] of a step, and how many of each row are valid [R]; 0 where there are none, for whatever reason."""

    def ahead(self, control: Control, finished: Sequence[int], watch: Watch) -> bool:
        """Answer a step that may not have rung yet.

        Args:
            control: what is known of it.
            finished: requests that will not be named again.
            watch: its waits.

        Returns:
            False for a step that is left to `propose`.
        """

    def forget(self) -> None:
        """Features that were read last are not what their target wrote: drop all context of it."""


class MailboxReader:
    """Reads the steps of a mailbox in order, and skips those that were released before they were read."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._next = (mailbox.word(CONTROL) + 1) & STEP_MASK
        self._finished: list[int] = []

    def announced(self) -> Control | None:
        """The next step, as soon as the target's CPU has announced it; None while there is none."""
        box, number = self._mailbox, self._next
        announced = box.word(CONTROL)
        if not is_reached(announced, number):
            return None
        control = box.control(number)
        if control is None:
            # So far behind that the entry is another step's.
            self._next = announced
        return control

    def finished(self, control: Control) -> list[int]:
        """Requests that ended with a step or with those that were skipped before it."""
        return self._finished + control.finished.tolist()

    def advance(self, control: Control) -> None:
        """A step has been answered without `next`."""
        self._pass_by(control)
        self._finished = []

    def next(self) -> Asked | None:
        """The next step that waits for its answer; None while there is none."""
        box, control = self._mailbox, self.announced()
        if control is None or not is_reached(box.word(DOORBELL), control.number):
            return None
        number = control.number
        self._pass_by(control)
        rows = box.rows_of(control)
        if rows is None or is_reached(box.word(REPLY), number):
            return None
        finished, self._finished = self._finished, []
        records = np.zeros(len(rows), dtype=ROW)
        records["request"] = control.requests
        for i, name in enumerate(("start", "num_features", "last_token")):
            records[name] = rows[:, i]
        hashes = control.page_hashes
        if control.num_hashes is not None:
            # They are of the pages that all of the foretold rows fill.
            as_foretold = rows[:, 1] == control.coming.most
            records["num_hashes"] = np.where(as_foretold, control.num_hashes, 0)
            hashes = hashes[np.repeat(as_foretold, control.num_hashes)]
        return Asked(
            number=number,
            k=control.num_speculative_tokens,
            draft_version=control.draft_version,
            rows=records,
            features=box.features[: int(rows[:, 1].sum())],
            finished=finished,
            page_hashes=hashes,
        )

    def _pass_by(self, control: Control) -> None:
        self._next = (control.number + 1) & STEP_MASK
        self._finished += control.finished.tolist()
        self._mailbox.set_word(TAKEN, control.number)


class MailboxService:
    """A thread that answers a mailbox.

    Args:
        mailbox: the target's.
        proposer: what drafts.
        offers: whether the target has to be told of the draft's projection.
        attention: how it waits for the doorbell of a step that was queued, and for its end.
    """

    def __init__(
        self, mailbox: Mailbox, proposer: Proposer, *, offers: bool = True, attention: Attention | None = None
    ) -> None:
        self.mailbox, self._proposer, self._offers = mailbox, proposer, offers
        self.attention = attention or Attention()
        self._reader: MailboxReader | None = MailboxReader(mailbox)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mailbox", daemon=True)
        self._offered: int | None = None
        self._writing: tuple[int, Future[None]] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="mailbox_offer")
        self._tried: int | None = None
        self._polls = mailbox.long_word(ALIVE)
        self.answered = 0
        """Steps that were answered in time."""

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive()

    @property
    def is_closing(self) -> bool:
        """Whether nothing more shall be answered."""
        return self._closing.is_set()

    def close(self) -> None:
        """Answer nothing more; the target is told."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        attentive_until = look_at = 0.0
        sharpen_timer()
        try:
            while not self._closing.is_set():
                if not self._proposer.is_elsewhere:
                    self.show_life()
                now = time.monotonic()
                if self._offers and now >= look_at:
                    if self._writing is None:
                        self._proposer.look_around()
                    self._offer()
                    look_at = now + _LOOK_S
                if self._proposer.is_elsewhere:
                    self._reader = None
                    time.sleep(_REST_S)
                elif self._look():
                    attentive_until = time.monotonic() + _ATTENTIVE_S
                else:
                    time.sleep(SHORT_REST_S if now < attentive_until else _REST_S)
        finally:
            self._writer.shutdown()
            if not self._proposer.is_elsewhere:
                self.mailbox.set_word(SERVING, 0)

    def _look(self) -> bool:
        """Answer the next step, if there is one."""
        reader = self._reader = self._reader or MailboxReader(self.mailbox)
        control = reader.announced()
        if control is None:
            return False
        if control.number != self._tried:
            self._tried = control.number
            is_open = not is_reached(self.mailbox.word(REPLY), control.number)
            if is_open and self._proposer.ahead(control, reader.finished(control), StepWatch(self, control.number)):
                reader.advance(control)
                self.answered += 1
                return True
        asked = reader.next()
        if asked is not None:
            self._answer(asked)
        return asked is not None

    def show_life(self) -> None:
        """Let the watchdog know that the mailbox is looked at."""
        self._polls += 1
        self.mailbox.set_long_word(ALIVE, self._polls)

    def _offer(self) -> None:
        """Let the target know which draft it can ask.

        The projection of a large draft takes longer to write than a target waits: another thread writes it, and until
        then nobody is asked to ask. What has been asked is answered, with nothing if it was for the draft before.
        """
        if self._writing is not None:
            version, written = self._writing
            if not written.done():
                return
            written.result()
            self._offered, self._writing = version, None
        if self._proposer.is_elsewhere:
            self._offered = None
            return
        hello = self._proposer.hello
        if hello is not None and hello.draft_version != self._offered:
            self.mailbox.set_word(SERVING, 0)
            self._writing = hello.draft_version, self._writer.submit(write_offer, self.mailbox, hello)
            return
        self._offered = None if hello is None else hello.draft_version
        self.mailbox.set_word(SERVING, hello is not None)

    def _answer(self, asked: Asked) -> None:
        started = time.perf_counter_ns()
        tokens, counts = self._proposer.propose(asked)
        if not self.mailbox.is_intact(asked.number):
            self._proposer.forget()
            return
        if self.mailbox.answer(asked.number, tokens, counts, time.perf_counter_ns() - started):
            self.answered += 1


def no_proposals(asked: Asked) -> tuple[np.ndarray, np.ndarray]:
    """The answer to a step that nothing is proposed for."""
    num_rows = len(asked.rows)
    return np.zeros((num_rows, asked.k), dtype=np.int32), np.zeros(num_rows, dtype=np.uint8)
