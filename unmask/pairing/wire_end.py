"""The draft's end of a mailbox over the wire: an announced step is sent from where it lies when its doorbell rings."""

from __future__ import annotations

import time
from collections.abc import Callable

from unmask.pairing.mailbox import Control, Mailbox
from unmask.pairing.mailbox_words import DOORBELL, REPLY, is_reached, signed

Ask = Callable[[list[memoryview], Callable[[memoryview], None]], bool]
"""Sends the bytes of rows and features, hands those of the token words int64 [R, K] that come back to the second
argument, and says whether there were any."""


class WireEnd:
    """One step that its draft has been told of.

    Args:
        mailbox: the target's.
        control: the step.
        ask: see `Ask`.
    """

    def __init__(self, mailbox: Mailbox, control: Control, ask: Ask) -> None:
        self._mailbox, self._control, self._ask = mailbox, control, ask
        self._is_over = False
        self._started_ns = 0
        self.is_intact = True
        """Whether what was sent is what the GPU wrote for this step."""
        self.was_let_go = False
        """Whether it has not rung for long: nothing was sent, and the draft is told by what it hears next."""

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do for the step. Once it has rung, this is where it is answered."""
        if not self._is_over and is_reached(self._mailbox.word(DOORBELL), self._control.number):
            self._is_over = True
            self._answer()
        return self._is_over

    def let_go(self, number: int) -> None:
        """Wait no longer."""
        self._is_over = self.was_let_go = True

    def _answer(self) -> None:
        """Every microsecond of this is one that the target waits: nothing is copied, and little looked at."""
        box, number, num_requests = self._mailbox, self._control.number, len(self._control.requests)
        rows = box.row_bytes(num_requests)
        # A list, for the first array operation after a rest takes ten times as long.
        words = rows.cast("i").tolist()
        num_rows = sum(words[1::4])
        is_own = words[3::4].count(signed(number)) == num_requests and 0 <= num_rows <= box.layout.max_rows
        if not is_own or is_reached(box.word(REPLY), number):
            return
        self._started_ns = time.perf_counter_ns()
        if not self._ask([rows, box.feature_bytes(num_rows)], self._deliver):
            self._deliver(memoryview(b""))

    def _deliver(self, words: memoryview) -> None:
        box, number = self._mailbox, self._control.number
        self.is_intact = box.is_intact(number)
        if self.is_intact:
            took_ns = time.perf_counter_ns() - self._started_ns
            box.answer_words(number, words, len(self._control.requests), took_ns)
