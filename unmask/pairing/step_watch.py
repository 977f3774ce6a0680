"""The waits of a step that was announced before it rang."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from unmask.pairing.mailbox_words import DOORBELL, is_reached

if TYPE_CHECKING:
    from unmask.pairing.mailbox_reader import MailboxService

_RING_S = 2.0
"""A target that has announced a step rings within this time, or does without proposals for it."""


class End(Protocol):
    """How a step that was queued before it rang comes to its end."""

    @property
    def is_done(self) -> bool:
        """Whether it has."""

    def let_go(self, number: int) -> None:
        """Its target does not ring."""


class Watch(Protocol):
    """The waits of a step that was announced: a target that never rings keeps nobody for long."""

    def until_rung(self) -> bool:
        """Wait for the doorbell; False if the step is not to be waited for any more."""

    def until_done(self, end: End) -> float:
        """Wait until a step that was queued has come to its end; the seconds from the doorbell on."""


class StepWatch:
    """See `Watch`; for one step of a mailbox that a service answers."""

    def __init__(self, service: MailboxService, number: int) -> None:
        self._service, self._number = service, number
        self._give_up_at = time.monotonic() + _RING_S
        self._rung_at: float | None = None
        service.attention.begin()

    def until_rung(self) -> bool:
        """See `Watch.until_rung`."""
        while not self._look():
            if self._is_over():
                return False
            self._service.attention.rest()
        return True

    def until_done(self, end: End) -> float:
        """See `Watch.until_done`."""
        is_let_go = False
        while True:
            if not self._look() and not is_let_go and self._is_over():
                end.let_go(self._number)
                is_let_go, self._rung_at = True, time.monotonic()
            if end.is_done:
                return time.monotonic() - (self._rung_at or time.monotonic())
            self._service.attention.rest()

    def _look(self) -> bool:
        """Whether it has rung."""
        self._service.show_life()
        if self._rung_at is None and is_reached(self._service.mailbox.word(DOORBELL), self._number):
            self._service.attention.came()
            self._rung_at = time.monotonic()
        return self._rung_at is not None

    def _is_over(self) -> bool:
        return time.monotonic() > self._give_up_at or self._service.is_closing
