"""The draft's end of a mailbox: steps that have rung, answered one after another by whatever drafts."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from unmask.pairing.hello import Hello
from unmask.pairing.mailbox import Mailbox
from unmask.pairing.mailbox_target import write_offer
from unmask.pairing.mailbox_words import ALIVE, CONTROL, DOORBELL, REPLY, SERVING, STEP_MASK, TAKEN, is_reached
from unmask.pairing.wire import ROW

_LOOK_S = 0.05
_ATTENTIVE_S = 1.0
_SHORT_REST_S = 2e-5
_REST_S = 0.001
"""Between two polls; the short one while steps come in. A thread that never rested would keep others from running."""


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
    """

    number: int
    k: int
    draft_version: int
    rows: np.ndarray
    features: Tensor
    finished: list[int]


class Proposer(Protocol):
    """What drafts for a mailbox."""

    @property
    def hello(self) -> Hello | None:
        """The draft that can be asked now; None if there is none."""

    def propose(self, asked: Asked) -> tuple[np.ndarray, np.ndarray]:
        """Ids [R, K] of a step, and how many of each row are valid [R]; 0 where there are none, for whatever reason."""

    def forget(self) -> None:
        """Features that were read last are not what their target wrote: drop all context of it."""


class MailboxReader:
    """Reads the steps of a mailbox in order, and skips those that were released before they were read."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._next = (mailbox.word(CONTROL) + 1) & STEP_MASK
        self._finished: list[int] = []

    def next(self) -> Asked | None:
        """The next step that waits for its answer; None while there is none."""
        box, number = self._mailbox, self._next
        announced = box.word(CONTROL)
        if not is_reached(announced, number):
            return None
        control = box.control(number)
        if control is None:
            # So far behind that the entry is another step's.
            self._next = announced
            return None
        if not is_reached(box.word(DOORBELL), number):
            return None
        self._next = (number + 1) & STEP_MASK
        self._finished += control.finished.tolist()
        box.set_word(TAKEN, number)
        rows = box.rows_of(control)
        if rows is None or is_reached(box.word(REPLY), number):
            return None
        finished, self._finished = self._finished, []
        records = np.zeros(len(rows), dtype=ROW)
        records["request"] = control.requests
        for i, name in enumerate(("start", "num_features", "last_token")):
            records[name] = rows[:, i]
        return Asked(
            number=number,
            k=control.num_speculative_tokens,
            draft_version=control.draft_version,
            rows=records,
            features=box.features[: int(rows[:, 1].sum())],
            finished=finished,
        )


class MailboxService:
    """A thread that answers a mailbox.

    Args:
        mailbox: the target's.
        proposer: what drafts.
    """

    def __init__(self, mailbox: Mailbox, proposer: Proposer) -> None:
        self._mailbox, self._proposer = mailbox, proposer
        self._reader = MailboxReader(mailbox)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mailbox", daemon=True)
        self._offered: int | None = None
        self.answered = 0
        """Steps that were answered in time."""

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Answer nothing more; the target is told."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        attentive_until = look_at = 0.0
        polls = self._mailbox.long_word(ALIVE)
        try:
            while not self._closing.is_set():
                polls += 1
                self._mailbox.set_long_word(ALIVE, polls)
                now = time.monotonic()
                if now >= look_at:
                    self._offer()
                    look_at = now + _LOOK_S
                asked = self._reader.next()
                if asked is not None:
                    self._answer(asked)
                    attentive_until = time.monotonic() + _ATTENTIVE_S
                else:
                    time.sleep(_SHORT_REST_S if now < attentive_until else _REST_S)
        finally:
            self._mailbox.set_word(SERVING, 0)

    def _offer(self) -> None:
        """Let the target know which draft it can ask."""
        hello = self._proposer.hello
        version = hello.draft_version if hello else None
        if hello is not None and version != self._offered:
            write_offer(self._mailbox, hello)
        self._offered = version
        self._mailbox.set_word(SERVING, hello is not None)

    def _answer(self, asked: Asked) -> None:
        started = time.perf_counter_ns()
        tokens, counts = self._proposer.propose(asked)
        if not self._mailbox.is_intact(asked.number):
            self._proposer.forget()
            return
        if self._mailbox.answer(asked.number, tokens, counts, time.perf_counter_ns() - started):
            self.answered += 1


def no_proposals(asked: Asked) -> tuple[np.ndarray, np.ndarray]:
    """The answer to a step that nothing is proposed for."""
    num_rows = len(asked.rows)
    return np.zeros((num_rows, asked.k), dtype=np.int32), np.zeros(num_rows, dtype=np.uint8)
