"""The watchdog of a mailbox: a process that lets the target's GPU go on when its draft does not answer in time.

A stream that waits for a word waits for ever if nobody writes it, and the process that it belongs to cannot end the
wait once it is itself held up. So somebody else always looks. A release is one store: it answers with no tokens, since
none carry the step's tag. After a release the breaker is open, for longer each time and for as long as the draft's side
shows no sign of life.

`python -m unmask.pairing.watchdog MAILBOX --limit-ms 100` watches until its standard input closes.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
import time
from pathlib import Path

from unmask.pairing.mailbox_words import ALIVE, BEGUN, DEPTH, HEARTBEAT, OPEN_UNTIL, RELEASED, MailboxWords, is_reached

_RETRY_NS = 100_000_000
_MAX_RETRY_NS = 1_000_000_000
_POLL_S = 0.001


class Watchdog:
    """Watches one mailbox.

    Args:
        mailbox: whose waits are bounded.
        limit_s: longest wait for a reply.
    """

    def __init__(self, mailbox: MailboxWords, limit_s: float) -> None:
        self._mailbox, self._limit_ns = mailbox, int(limit_s * 1e9)
        self._waiting: tuple[int, int] | None = None
        self._released: int | None = None
        self._last: int | None = None
        """What was let go last, while a late reply could still take that back."""
        self._retry_ns = _RETRY_NS
        self._alive: int | None = None

    def look(self, now_ns: int) -> None:
        """Look once; `now_ns` is `time.monotonic_ns()`."""
        box = self._mailbox
        box.set_long_word(HEARTBEAT, now_ns)
        rung = box.word(BEGUN)
        if self._last is not None:
            if is_reached(rung, self._last + DEPTH):
                self._last = None
            else:
                box.release(self._last)
        if box.is_waiting:
            if self._waiting is None or self._waiting[0] != rung:
                self._waiting = rung, now_ns
            # Steps that were on their way when the first was released need not wait as long.
            elif self._alive is not None or now_ns - self._waiting[1] >= self._limit_ns:
                self._release(rung, now_ns)
        else:
            self._waiting = None
            if self._released is not None and rung != self._released:
                self._released, self._retry_ns = None, _RETRY_NS
        if self._alive is not None:
            if box.long_word(ALIVE) == self._alive:
                box.set_long_word(OPEN_UNTIL, now_ns + self._retry_ns)
            else:
                self._alive = None

    def _release(self, number: int, now_ns: int) -> None:
        """Let go a step, and open the breaker if this is news."""
        box = self._mailbox
        if number != self._released:
            self._retry_ns = min(2 * self._retry_ns, _MAX_RETRY_NS) if self._released is not None else _RETRY_NS
            self._released = number
            self._alive = box.long_word(ALIVE)
            box.set_long_word(OPEN_UNTIL, now_ns + self._retry_ns)
            box.set_word(RELEASED, box.word(RELEASED) + 1)
        box.release(number)
        self._last = number


def main(argv: list[str] | None = None) -> None:
    """Watch until standard input closes, which it does when the target's process ends."""
    parser = argparse.ArgumentParser(prog="python -m unmask.pairing.watchdog", description=main.__doc__)
    parser.add_argument("mailbox", type=Path)
    parser.add_argument("--limit-ms", type=float, default=100.0)
    arguments = parser.parse_args(argv)
    watchdog = Watchdog(MailboxWords(arguments.mailbox), arguments.limit_ms / 1000)
    while not (select.select([sys.stdin], [], [], _POLL_S)[0] and not os.read(sys.stdin.fileno(), 4096)):
        watchdog.look(time.monotonic_ns())


if __name__ == "__main__":
    main()
