"""The words of a mailbox, by which its parties wait for one another. Little is imported: watchdogs start at once."""

from __future__ import annotations

import mmap
import time
from pathlib import Path

from unmask.errors import WireError

BEGUN, DOORBELL, REPLY, CONTROL, TAKEN, SERVING, RELEASED, LATE = (64 * line for line in range(1, 9))
"""Offsets of the uint32 words, one a cache line. SERVING is 1 while a draft can be asked, TAKEN the last control entry
that the draft's side has read, RELEASED and LATE count what the watchdog let go and what was answered after that."""
HEARTBEAT, OFFERED, DRAFT_NS, ANSWERED, ALIVE, OPEN_UNTIL = (64 * line for line in range(9, 15))
"""Offsets of uint64 words: the watchdog's last sign of life (`time.monotonic_ns`), the version of the projection that
lies beside the mailbox, the nanoseconds that the draft's side has spent on answered steps and their number, a count
that grows while it polls, and the `time.monotonic_ns` before which the breaker lets nothing be asked."""

STEP_MASK = (1 << 32) - 1

DEPTH = 8
"""Control entries; a target that is further ahead of the replies does not ask."""

MAGIC = b"UNMKMBX3"
PAGE = 4096
"""The header and all words lie in the first one."""

_HALF = 1 << 31
_WATCHDOG_NS = 1_000_000_000
"""Without a sign of life of the watchdog for this long, nothing is asked that could hang."""


def is_reached(value: int, step: int) -> bool:
    """Whether a word has reached a step: cyclic `value >= step`, as the GPU's wait compares."""
    return (value - step) & STEP_MASK < _HALF


def signed(step: int) -> int:
    """A step as the int32 that tags carry."""
    return step - (1 << 32) if step >= _HALF else step


class MailboxWords:
    """The first page of a mailbox, mapped; a word is read and written by one aligned access."""

    def __init__(self, path: str | Path, num_bytes: int = PAGE) -> None:
        """Map an existing mailbox up to `num_bytes`. Raises WireError for a file that is none, OSError."""
        self.path = Path(path)
        with self.path.open("r+b") as file:
            if file.read(len(MAGIC)) != MAGIC or file.seek(0, 2) < num_bytes:
                raise WireError(f"'{path}' is not a mailbox of this release")
            self.map = mmap.mmap(file.fileno(), num_bytes)
        page = memoryview(self.map)[:PAGE]
        self._words, self._long_words = page.cast("I"), page.cast("Q")

    def word(self, offset: int) -> int:
        """A uint32 word."""
        return self._words[offset // 4]

    def set_word(self, offset: int, value: int) -> None:
        """Store a uint32 word, modulo 2**32."""
        self._words[offset // 4] = value & STEP_MASK

    def long_word(self, offset: int) -> int:
        """A uint64 word."""
        return self._long_words[offset // 8]

    def set_long_word(self, offset: int, value: int) -> None:
        """Store a uint64 word."""
        self._long_words[offset // 8] = value

    @property
    def is_waiting(self) -> bool:
        """Whether the GPU waits for a reply, or will at once. By BEGUN, which nobody but the target writes."""
        return not is_reached(self.word(REPLY), self.word(BEGUN))

    @property
    def is_guarded(self) -> bool:
        """Whether a watchdog is there and its breaker closed: a step that is asked now comes to an end."""
        now = time.monotonic_ns()
        return now - self.long_word(HEARTBEAT) < _WATCHDOG_NS and now >= self.long_word(OPEN_UNTIL)

    def release(self, number: int) -> None:
        """Let the GPU go on past a step.

        Two parties that do so at the same moment may set the word back by a step, which is then released once more.
        """
        if not is_reached(self.word(REPLY), number):
            self.set_word(REPLY, number)
