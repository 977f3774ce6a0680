"""The draft's end of a mailbox in the order of its own stream: no CPU between a doorbell and its reply."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unmask.pairing.mailbox import Mailbox
from unmask.pairing.mailbox_words import DOORBELL, REPLY, STEP_MASK, is_reached
from unmask.pairing.stream_words import PinnedMailbox, StreamWords
from unmask.pairing.unpacked_rows import Destination, answer_rows, unpack_rows


@dataclass(frozen=True, slots=True)
class SeenStep:
    """A step as the stream found it.

    Attributes:
        rows: int32 [R, 4] of the mailbox.
        is_intact: whether the features were the step's own to the last.
        was_released: whether somebody else had let the target go on before the reply.
        was_let_go: whether the stream did not wait for the target's own doorbell.
    """

    rows: np.ndarray
    is_intact: bool
    was_released: bool
    was_let_go: bool


class StreamEnd:
    """Queues what a step needs behind its doorbell; one step at a time.

    Args:
        mailbox: a target's.
        words: its words, in the order of the draft's stream.
    """

    def __init__(self, mailbox: Mailbox, words: StreamWords) -> None:
        self.mailbox, self.words = mailbox, words
        self._on_gpu = isinstance(words, PinnedMailbox)
        requests = mailbox.layout.max_requests
        self._seen = torch.zeros(requests + 1, 4, dtype=torch.int32, pin_memory=self._on_gpu)
        self._plan = torch.zeros(requests + 1, 4, dtype=torch.int32, device="cuda") if self._on_gpu else None
        self._done = torch.cuda.Event() if self._on_gpu else None
        self._let_go: int | None = None

    def begin(self, number: int, num_requests: int, longest: int, into: Destination) -> None:
        """Wait for a step and take its rows (see `unpack_rows`)."""
        self.words.wait(DOORBELL, number)
        if self._plan is not None:
            from unmask.pairing.unpacked_rows_triton import unpack_rows_on_gpu

            address, plan = self.words.address, self._plan
            unpack_rows_on_gpu(self.mailbox, address, number, num_requests, longest, into, self._seen, plan)
        else:
            unpack_rows(self.mailbox, number, num_requests, longest, into, self._seen)

    def end(self, number: int, num_requests: int, ids: Tensor, into: Destination) -> None:
        """Answer the step (see `answer_rows`) and let its target go on."""
        if self._on_gpu:
            from unmask.pairing.unpacked_rows_triton import answer_rows_on_gpu

            answer_rows_on_gpu(self.mailbox, self.words.address, number, num_requests, ids, into, self._seen[-1])
        else:
            answer_rows(self.mailbox, number, num_requests, ids, into, self._seen[-1])
        self.words.write(REPLY, number)
        if self._done is not None:
            self._done.record()

    @property
    def is_done(self) -> bool:
        """Whether the stream has come to the end of the step that was queued last."""
        return self._done is None or self._done.query()

    def seen(self, number: int, num_requests: int) -> SeenStep:
        """What the stream found, once it is done."""
        begun, reply = (int(value) & STEP_MASK for value in self._seen[-1, :2])
        rows = self._seen[:num_requests].numpy().copy()
        was_let_go = self._let_go == number
        return SeenStep(
            rows,
            # Of a step that was let go nothing is used.
            is_intact=begun == number or was_let_go,
            was_released=is_reached(reply, number),
            was_let_go=was_let_go,
        )

    def let_go(self, number: int) -> None:
        """End the stream's wait for a step whose target does not ring."""
        self._let_go = number
        self.mailbox.set_word(DOORBELL, number)

    def close(self) -> None:
        """Give the pages back; the stream must be done with them."""
        if isinstance(self.words, PinnedMailbox):
            self.words.close()
