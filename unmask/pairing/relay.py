"""Steps that come over the wire, laid into a mailbox of the draft's own host as a target's GPU would lay them.

The draft then serves a target of another host as it serves one of its own: it queues what has been announced, and
starts when the rows are there. They are received where they belong, and the draft's host does nothing else meanwhile.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from unmask.errors import WireError
from unmask.files import private_folder
from unmask.pairing.announcement import ROW_BYTES, Announcement, check_rows, encode_tokens, num_feature_rows
from unmask.pairing.channel import Channel
from unmask.pairing.coming_rows import ComingRows
from unmask.pairing.local_drafting import LocalDrafting
from unmask.pairing.mailbox import Control, Mailbox
from unmask.pairing.mailbox_layout import MAX_HASHES, Layout
from unmask.pairing.mailbox_reader import MailboxService
from unmask.pairing.mailbox_words import BEGUN, CONTROL, DOORBELL, REPLY, STEP_MASK, TAKEN, is_reached, signed
from unmask.pairing.polling import SHORT_REST_S, Attention, sharpen_timer
from unmask.pairing.wire import MAX_MESSAGE_BYTES, MAX_SPECULATIVE_TOKENS, Proposals, Step, as_rows

_LIMIT_S = 30.0
_SERVICE_REST_S = 2e-4
"""Of the thread that queues and books steps: it takes no part in a reply."""
_SENT_S = 0.005
_USUAL_REQUESTS = (16, 32, 64, 128, 256)
"""Of a step at most: a kernel is compiled for each power of two."""


class Relay:
    """The steps of one connection; all calls from the thread that reads it.

    Args:
        drafting: what answers them, in the session of the connection; closed with the relay.
        announcement: the first.
        width: of feature rows.
        vocab_size: of the tokens.

    Raises:
        WireError: the worker announces more than a message holds.
        OSError: no room in shared memory.
    """

    def __init__(self, drafting: LocalDrafting, announcement: Announcement, width: int, vocab_size: int) -> None:
        self._layout = Layout(
            max_requests=announcement.max_requests,
            max_rows=announcement.max_rows,
            width=width,
            dtype=announcement.dtype,
            max_k=MAX_SPECULATIVE_TOKENS,
        )
        if self._layout.num_bytes > MAX_MESSAGE_BYTES:
            raise WireError(f"steps of up to {announcement.max_rows} rows are announced, more than a message holds")
        folder = private_folder(Path("/dev/shm") / f"unmask-{os.getuid()}")  # noqa: S108 - private to this user
        self._box = Mailbox.create(folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.relay", self._layout)
        # Both ends have it mapped already: nobody else shall find it.
        self._box.remove()
        self._drafting, self._vocab_size = drafting, vocab_size
        # Steps keep the numbers that their target has given them, so that rows and tokens can pass as they lie.
        for word in (CONTROL, TAKEN, BEGUN, DOORBELL, REPLY):
            self._box.set_word(word, announcement.number - 1)
        drafting.open(self._box)
        self._sent = self._box.word(REPLY)
        """The last step whose reply is on its way."""
        drafting.before_booking = self._await_sent
        self._service = MailboxService(self._box, drafting, offers=False, attention=Attention(_SERVICE_REST_S))
        self._service.start()
        self._number = self._box.word(REPLY)
        self._announced: Announcement | None = None
        self._finished = np.empty(0, dtype=np.uint64)
        """Ended requests that did not fit the control entries so far."""
        self._attention = Attention(spins=None)
        sharpen_timer()

    def close(self) -> None:
        """Serve nothing more."""
        self._sent = self._number
        self._service.close()
        self._drafting.close()

    def announce(self, announcement: Announcement) -> None:
        """Let the draft queue a step. One that was announced before and has not come will not come any more."""
        self._post(announcement)

    def _post(self, announcement: Announcement, step: Step | None = None) -> None:
        if len(announcement.requests) > self._layout.max_requests or announcement.dtype is not self._layout.dtype:
            raise WireError("more requests or other rows than were announced")
        told = {}
        if step is not None and 0 < len(step.page_hashes) <= MAX_HASHES:
            told = {"num_hashes": step.rows["num_hashes"], "page_hashes": step.page_hashes}
        self._let_go()
        self._number = self._next_number(announcement if step is None else None)
        self._announced = announcement
        ended = np.concatenate([self._finished, announcement.finished])
        finished, self._finished = np.split(ended, [self._layout.max_requests])
        self._box.post(
            Control(
                number=self._number,
                num_speculative_tokens=announcement.num_speculative_tokens,
                draft_version=announcement.draft_version,
                requests=announcement.requests,
                finished=finished,
                coming=announcement.coming,
                **told,
            )
        )

    def answer_announced(self, channel: Channel, num_bytes: int) -> bytes:
        """Receive the rows of the step that was announced last.

        Args:
            channel: a ROWS frame has begun there.
            num_bytes: of its payload.

        Returns:
            A TOKENS payload. `reply_sent` is due next.

        Raises:
            WireError: not what was announced.
        """
        announced, box, number = self._announced, self._box, self._number
        if announced is None:
            raise WireError("rows of a step that was not announced")
        num_rows, layout = len(announced.requests), self._layout
        num_features = num_feature_rows(num_bytes, num_rows, layout.row_bytes)
        if num_features > layout.max_rows:
            raise WireError("more feature rows than were announced")
        # Checked before any of it lies in the mailbox, whose rows a GPU believes if they bear the right number.
        rows = channel.read(ROW_BYTES * num_rows)
        check_rows(rows, num_features, announced, self._vocab_size)
        box.set_word(BEGUN, number)
        box.row_bytes(num_rows)[:] = rows
        if number != announced.number:
            box.rows[:num_rows, 3] = signed(number)
        channel.read_into(box.feature_bytes(num_features))
        words, k = self._ring(num_rows, announced.num_speculative_tokens), announced.num_speculative_tokens
        if number != announced.number:
            return encode_tokens(words & STEP_MASK, words >> 32 == signed(number), announced.number)
        return b"".join(box.token_bytes(num_rows, k))

    def reply_sent(self) -> None:
        """The reply is on its way: the step may be booked."""
        self._sent = self._number

    def _await_sent(self, number: int) -> None:
        """One interpreter runs one thread: what can wait is done when the reply is on its way."""
        limit = time.monotonic() + _SENT_S
        while not is_reached(self._sent, number) and time.monotonic() < limit:
            time.sleep(SHORT_REST_S)

    def answer(self, step: Step) -> Proposals:
        """Proposals for a step that was not announced. `reply_sent` is due next. Raises WireError."""
        if len(step.features) > self._layout.max_rows:
            raise WireError("more feature rows than were announced")
        self._post(self._announcement_of(step), step)
        box, number, num_rows = self._box, self._number, len(step.rows)
        box.set_word(BEGUN, number)
        for column, name in enumerate(("start", "num_features", "last_token")):
            box.rows[:num_rows, column] = step.rows[name]
        box.rows[:num_rows, 3] = signed(number)
        box.features[: len(step.features)].copy_(as_rows(step.features, self._layout.dtype))
        words = self._ring(num_rows, step.num_speculative_tokens)
        valid = np.logical_and.accumulate(words >> 32 == signed(number), axis=1)
        return Proposals(
            draft_version=step.draft_version,
            epoch=step.epoch,
            number=step.number,
            counts=valid.sum(axis=1).astype(np.uint8),
            tokens=np.where(valid, words & STEP_MASK, 0).astype(np.int32),
        )

    def _ring(self, num_rows: int, k: int) -> np.ndarray:
        """Let the draft go, and wait: token words [R, K]."""
        self._box.set_word(DOORBELL, self._number)
        self._await(REPLY, self._number)
        self._announced = None
        return self._box.tokens[:num_rows, :k]

    def _next_number(self, announcement: Announcement | None) -> int:
        """The target's own number of an announced step, unless the mailbox has come so far already: a step that was let
        go and sent after all has two numbers here."""
        following = (self._number + 1) & STEP_MASK
        if announcement is not None and is_reached(announcement.number, following):
            return announcement.number
        return following

    def _announcement_of(self, step: Step) -> Announcement:
        return Announcement(
            number=0,
            draft_version=step.draft_version,
            num_speculative_tokens=step.num_speculative_tokens,
            requests=step.rows["request"],
            finished=step.finished,
            coming=ComingRows(*(step.rows[name].astype(np.int64) for name in ("num_features", "start"))),
            max_requests=self._layout.max_requests,
            max_rows=self._layout.max_rows,
            dtype=self._layout.dtype,
        )

    def _let_go(self) -> None:
        """End a step that was announced and has not come: without rows of its own it is answered with nothing."""
        if self._announced is not None:
            # Begun as any other: for features of a step that is not, all context would be dropped.
            self._box.set_word(BEGUN, self._number)
            self._sent = self._number
            self._box.set_word(DOORBELL, self._number)
            self._await(TAKEN, self._number)
            self._box.release(self._number)
            self._announced = None

    def _await(self, word: int, number: int) -> None:
        limit = time.monotonic() + _LIMIT_S
        self._attention.begin()
        while not is_reached(self._box.word(word), number):
            if time.monotonic() > limit or not self._service.is_alive:
                raise WireError("the draft has failed")
            self._attention.rest()
        self._attention.came()


def rehearse(new_drafting: Callable[[], LocalDrafting], width: int, dtype: torch.dtype, vocab_size: int) -> None:
    """Load and compile, once in a process, what a first announced step would keep a running target waiting for.

    Args:
        new_drafting: a session of its own at each call.
        width, dtype: of feature rows.
        vocab_size: of the tokens.

    Raises:
        OSError: no room in shared memory.
    """
    nothing = np.empty(0, dtype=np.int64)
    for max_requests in _USUAL_REQUESTS:
        announcement = Announcement(
            number=1,
            draft_version=0,
            num_speculative_tokens=1,
            requests=nothing.astype(np.uint64),
            finished=nothing.astype(np.uint64),
            coming=ComingRows(nothing, nothing),
            max_requests=max_requests,
            max_rows=max_requests,
            dtype=dtype,
        )
        Relay(new_drafting(), announcement, width, vocab_size).close()
