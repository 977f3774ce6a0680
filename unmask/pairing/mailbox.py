"""The mailbox between a target's GPU stream and its draft: one file of shared memory, no message, no lock.

A step n of the target, in the order in which it happens:

    target's CPU     control entry n: which requests, K            CONTROL = n
    target's GPU     BEGUN = n, rows and features                  DOORBELL = n, then waits until REPLY >= n
    draft's side     tagged tokens                                 REPLY = n
    watchdog         instead of a late draft                       REPLY = n
    target's GPU     takes the tokens that carry the tag n

The GPU waits, the CPU never does, so that CONTROL may be a few steps ahead of DOORBELL. What a late or dead writer has
left behind is never taken for an answer: every row and every token carries the step that it was written for, one
aligned store each, and features are only used if BEGUN still names their step afterwards. Step numbers are uint32 and
compare cyclically, as `cuStreamWaitValue32` does. Stores must become visible in program order (x86-64, and a GPU's
writes over PCIe or NVLink).
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass, field
from io import BufferedWriter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unmask.errors import ConfigError, WireError
from unmask.files import atomic_path
from unmask.pairing.coming_rows import ComingRows
from unmask.pairing.mailbox_layout import ENTRY, HEADER, MAX_HASHES, Layout
from unmask.pairing.mailbox_words import (
    ANSWERED,
    BEGUN,
    CONTROL,
    DEPTH,
    DRAFT_NS,
    LATE,
    REPLY,
    STEP_MASK,
    MailboxWords,
    is_reached,
    signed,
)
from unmask.pairing.wire import MAX_SPECULATIVE_TOKENS, NO_HASHES

SUFFIX = ".mailbox"
"""Of files in a folder that a draft watches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """What the target's CPU knows of a step before its GPU has run it.

    Attributes:
        number: the step.
        num_speculative_tokens: K to draft.
        draft_version: of the projection that makes the features.
        requests: uint64 numbers [R], in the order of the rows.
        finished: uint64 numbers of requests that will not be named again.
        coming: feature rows of these requests.
        num_hashes: page hashes of each request [R] (see `Step`), at most `MAX_HASHES` in all.
        page_hashes: uint64, request after request.
    """

    number: int
    num_speculative_tokens: int
    draft_version: int
    requests: np.ndarray
    finished: np.ndarray
    coming: ComingRows
    num_hashes: np.ndarray | None = None
    page_hashes: np.ndarray = field(default_factory=lambda: NO_HASHES)


class Mailbox(MailboxWords):
    """A mapped mailbox; both sides and the watchdog open the same file."""

    def __init__(self, path: str | Path) -> None:
        """Map an existing mailbox. Raises WireError for a file that is none, OSError."""
        with Path(path).open("rb") as file:
            self.layout = layout = Layout.unpack(file.read(HEADER.size))
            if os.fstat(file.fileno()).st_size != layout.num_bytes:
                raise WireError("the size of a mailbox does not match its header")
        super().__init__(path, layout.num_bytes)
        self._owned: BufferedWriter | None = None
        memory = self.memory = np.frombuffer(self.map, dtype=np.uint8)
        self._bytes = memoryview(self.map)
        requests, max_k = layout.max_requests, layout.max_k
        self.rows = memory[layout.rows_at :][: 16 * requests].view(np.int32).reshape(requests, 4)
        self.tokens = memory[layout.tokens_at :][: 8 * requests * max_k].view(np.int64).reshape(requests, max_k)
        size = layout.max_rows * layout.width
        self.features: Tensor = torch.frombuffer(
            self.map, dtype=layout.dtype, count=size, offset=layout.features_at
        ).view(layout.max_rows, layout.width)

    @classmethod
    def create(cls, path: str | Path, layout: Layout) -> Mailbox:
        """Make a mailbox, in the place of any other at this path; it is this process's until it ends or closes it.

        Raises ConfigError for impossible sizes, OSError.
        """
        if not 1 <= layout.max_k <= MAX_SPECULATIVE_TOKENS:
            raise ConfigError(f"must lie in 1..{MAX_SPECULATIVE_TOKENS}", field="num_speculative_tokens")
        with atomic_path(Path(path)) as temporary:
            # Stays open: the lock tells that this process lives.
            file = temporary.open("wb")
            # Not sparse: a store to a page that a full /dev/shm cannot give would end the process.
            os.posix_fallocate(file.fileno(), 0, layout.num_bytes)
            file.write(layout.pack())
            file.flush()
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            mailbox = cls(path)
        except BaseException:
            remove_files(Path(path))
            raise
        mailbox._owned = file
        return mailbox

    @property
    def offer_path(self) -> Path:
        """Where the projection of the draft that serves this mailbox lies: a HELLO."""
        return _offer_path(self.path)

    def remove(self) -> None:
        """Delete the file and give it up; mappings of it stay readable."""
        remove_files(self.path)
        if self._owned is not None:
            self._owned.close()

    def post(self, control: Control) -> None:
        """Store a control entry and announce it."""
        number, num_rows, num_finished = control.number & STEP_MASK, len(control.requests), len(control.finished)
        entry = self._entry(number)
        numbers = entry[ENTRY.size :].view(np.uint64)
        # An entry of another step until it is whole.
        other = (number - DEPTH) & STEP_MASK
        sizes = (num_rows, control.num_speculative_tokens, num_finished, len(control.page_hashes))
        entry[: ENTRY.size] = np.frombuffer(ENTRY.pack(other, *sizes, control.draft_version, other, 0), np.uint8)
        numbers[:num_rows] = control.requests
        numbers[num_rows : num_rows + num_finished] = control.finished
        coming_at, counts_at, hashes_at = (n * self.layout.max_requests for n in (2, 3, 4))
        numbers[coming_at : coming_at + num_rows] = control.coming.pack()
        if control.num_hashes is not None:
            numbers[counts_at : counts_at + num_rows] = control.num_hashes
            numbers[hashes_at : hashes_at + len(control.page_hashes)] = control.page_hashes
        entry[ENTRY.size - 8 : ENTRY.size - 4].view(np.uint32)[0] = number
        entry[:4].view(np.uint32)[0] = number
        self.set_word(CONTROL, number)

    def control(self, number: int) -> Control | None:
        """The control entry of a step; None if another has taken its place."""
        entry, most = self._entry(number), self.layout.max_requests
        head = ENTRY.unpack(entry[: ENTRY.size].tobytes())
        first, num_rows, k, num_finished, num_hashes, version, last, _ = head
        if first != number or last != number or max(num_rows, num_finished) > most or num_hashes > MAX_HASHES:
            return None
        numbers = entry[ENTRY.size :].view(np.uint64)
        requests, finished = np.split(numbers[: num_rows + num_finished].copy(), [num_rows])
        coming = ComingRows.unpack(numbers[2 * most : 2 * most + num_rows])
        counts = numbers[3 * most : 3 * most + num_rows].astype(np.int64) if num_hashes else None
        hashes = numbers[4 * most : 4 * most + num_hashes].copy()
        if ENTRY.unpack(entry[: ENTRY.size].tobytes()) != head:
            return None
        return Control(
            number=number,
            num_speculative_tokens=k,
            draft_version=version,
            requests=requests,
            finished=finished,
            coming=coming,
            num_hashes=counts,
            page_hashes=hashes,
        )

    def rows_of(self, control: Control) -> np.ndarray | None:
        """int32 [R, 4] start, number of features, last token and tag of a step that has rung; None if they are not its
        own."""
        rows = self.rows[: len(control.requests)].copy()
        fits = (rows[:, 3] == signed(control.number)).all() and (rows[:, :2] >= 0).all()
        return rows if fits and rows[:, 1].sum(dtype=np.int64) <= self.layout.max_rows else None

    def row_bytes(self, num_requests: int) -> memoryview:
        """The rows [R, 4] as they lie."""
        return self._bytes[self.layout.rows_at :][: 16 * num_requests]

    def feature_bytes(self, num_rows: int) -> memoryview:
        """The first feature rows as they lie."""
        return self._bytes[self.layout.features_at :][: num_rows * self.layout.row_bytes]

    def token_bytes(self, num_requests: int, k: int) -> list[memoryview]:
        """The first K token words of each request as they lie."""
        first, size = self.layout.tokens_at, 8 * self.layout.max_k
        return [self._bytes[at : at + 8 * k] for at in range(first, first + num_requests * size, size)]

    def is_intact(self, number: int) -> bool:
        """Whether what was read of a step's rows and features is what the GPU wrote for it."""
        return self.word(BEGUN) == number

    def answer(self, number: int, tokens: np.ndarray, counts: np.ndarray, draft_ns: int = 0) -> bool:
        """Store proposals and let the GPU go on.

        Args:
            number: the step.
            tokens: ids [R, K or fewer].
            counts: valid ids of each row [R].
            draft_ns: what they took.

        Returns:
            False for a step that has been released: nothing is stored, nobody would look at it.
        """
        if is_reached(self.word(REPLY), number):
            self.set_word(LATE, self.word(LATE) + 1)
            return False
        num_rows, k = tokens.shape
        words = signed(number) << 32 | tokens.astype(np.int64)
        np.copyto(self.tokens[:num_rows, :k], words, where=np.arange(k) < counts[:, None])
        self.count_answer(draft_ns)
        self.release(number)
        return True

    def answer_words(self, number: int, words: memoryview, num_requests: int, draft_ns: int) -> bool:
        """`answer` for the bytes of token words int64 [R, K]; those of proposals bear the number of the step."""
        if is_reached(self.word(REPLY), number):
            self.set_word(LATE, self.word(LATE) + 1)
            return False
        size = len(words) // num_requests
        for i, row in enumerate(self.token_bytes(num_requests, size // 8)):
            row[:] = words[i * size : (i + 1) * size]
        self.release(number)
        self.count_answer(draft_ns)
        return True

    def count_answer(self, draft_ns: int) -> None:
        """A step was answered in time, and took so long."""
        self.set_long_word(DRAFT_NS, self.long_word(DRAFT_NS) + draft_ns)
        self.set_long_word(ANSWERED, self.long_word(ANSWERED) + 1)

    def _entry(self, number: int) -> np.ndarray:
        size = self.layout.entry_bytes
        return self.memory[self.layout.control_at + number % DEPTH * size :][:size]


def take_tokens(words: Tensor, number: int, vocab_size: int, absent: int) -> Tensor:
    """Ids int64 of token words [R, K] that carry a step's tag; `absent` in the place of all others.

    An id beyond the vocabulary is none either: the target would look it up in its embedding, whoever wrote it.
    """
    ids = words & STEP_MASK
    return torch.where((words >> 32 == signed(number)) & (ids < vocab_size), ids, absent)


def is_orphaned(path: str | Path) -> bool:
    """Whether the process that made a mailbox has ended, or the mailbox is gone."""
    try:
        with Path(path).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def remove_files(path: Path) -> None:
    """Delete a mailbox and the offer beside it."""
    for file in (path, _offer_path(path)):
        file.unlink(missing_ok=True)


def _offer_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.offer")
