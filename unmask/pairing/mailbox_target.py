"""The target's end of a mailbox: features and rows out, proposals in, with no CPU wait."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from unmask.errors import UserError
from unmask.files import atomic_path
from unmask.pairing.coming_rows import ComingRows
from unmask.pairing.hello import Hello, TargetShape, decode_hello, encode_hello
from unmask.pairing.mailbox import Control, Mailbox, take_tokens
from unmask.pairing.mailbox_layout import MAX_HASHES
from unmask.pairing.mailbox_words import BEGUN, DEPTH, DOORBELL, OFFERED, REPLY, SERVING, STEP_MASK, TAKEN, is_reached
from unmask.pairing.packed_rows import StepTensors, pack_rows
from unmask.pairing.request_numbers import RequestNumbers
from unmask.pairing.side_copies import copied_beside
from unmask.pairing.stream_words import StreamWords
from unmask.pairing.wire import as_rows

logger = logging.getLogger(__name__)

_POLL_S = 0.05

Mark = Callable[[str], None]
"""Told what has just been queued: `begun`, `features`, `sent`, `answered`, `taken`."""


class MailboxTarget:
    """Asks a draft through a mailbox; all calls from the thread that drives the stream.

    Args:
        mailbox: this target's own.
        words: the stream.
        shape: what this target is, for refusing a draft of another one.
        device: where features lie.
        absent: id that stands for no proposal.
    """

    def __init__(
        self, mailbox: Mailbox, words: StreamWords, shape: TargetShape, device: torch.device, absent: int = -1
    ) -> None:
        self._mailbox, self._words, self._shape, self._device, self._absent = mailbox, words, shape, device, absent
        self._step = mailbox.word(DOORBELL)
        self._unawaited: int | None = None
        self._owed: tuple[int, int] | None = None
        self._numbers = RequestNumbers()
        self._finished: list[tuple[int, int]] = []
        self._token_words = torch.from_numpy(mailbox.tokens)
        self._offer: Hello | None = None
        self._refused = 0
        self._reason = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow_offers, name="mailbox_offers", daemon=True)
        self.asked = 0
        """Steps that the draft was asked."""
        self.passed = 0
        """Steps without a draft to ask."""

    def start(self) -> None:
        """Look for a draft, now and from now on. For the thread that drives the stream; once is enough."""
        if self._thread.ident is None:
            self._look()
            self._thread.start()

    def close(self) -> None:
        """Ask nothing more; what the stream waits for is let go."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._mailbox.release(self._step)

    @property
    def is_ready(self) -> bool:
        """Whether a step that is asked now will be answered or released."""
        box, offer = self._mailbox, self._offer
        return (
            offer is not None
            and box.word(SERVING) == 1
            and box.long_word(OFFERED) == offer.draft_version
            and box.is_guarded
            and is_reached(box.word(REPLY), self._step + 2 - DEPTH)
        )

    def finish(self, names: Iterable[str]) -> None:
        """Requests that have ended."""
        self._finished += [(self._step + 1, number) for number in self._numbers.forget(names)]

    def propose(
        self,
        names: Sequence[str],
        states: Sequence[Tensor],
        step: StepTensors,
        *,
        coming: ComingRows,
        k: int,
        hashes: Sequence[Sequence[int]] = (),
        wanted: bool = True,
        comes_later: bool = False,
        mark: Mark | None = None,
    ) -> Tensor:
        """Proposals of one step, queued on the stream.

        Args:
            names: of the R requests, in batch order.
            states: D hidden states [T or more, H] of the query rows.
            step: what the sampler left.
            coming: query rows of each request; where they begin, if the host knows it.
            k: tokens to draft for each request.
            hashes: of each request's last full pages (see `PageHashes`), where the host knows their tokens; a step
                that has too many to tell is sent without.
            wanted: False where all requests are in the midst of their prompts: the draft takes their rows in while the
                target goes on, and only the next step waits for it.
            comes_later: return at once; `collect` brings the proposals. Without it they are lost with the next step.
            mark: see `Mark`.

        Returns:
            int64 [R, K] on the target's device, K the mailbox's; `absent` where nothing is proposed.
        """
        mark = mark or _no_mark
        offer, num_rows = self._offer, len(names)
        if offer is None or not self.is_ready:
            self.passed += 1
            return torch.full((num_rows, self._mailbox.layout.max_k), self._absent, device=self._device)
        self.asked += 1
        k = min(k, self._mailbox.layout.max_k, offer.block_size - 1)
        self._step = (self._step + 1) & STEP_MASK
        number = self._step
        self._mailbox.post(
            Control(
                number=number,
                # The draft is shown every step: one that it has not seen would be a gap in its context.
                num_speculative_tokens=max(k, 1),
                draft_version=offer.draft_version,
                requests=np.array([self._numbers.of(name) for name in names], dtype=np.uint64),
                finished=self._unread_finished(),
                coming=coming,
                **_told(hashes),
            )
        )
        if self._unawaited is not None:
            # Its rows lie where those of this step will.
            self._words.wait(REPLY, self._unawaited)
            self._unawaited = self._owed = None
        self._words.write(BEGUN, number)
        mark("begun")
        num_tokens = len(step.positions)
        features = offer.projection(torch.cat([h[:num_tokens] for h in states], dim=-1))
        mark("features")
        self._pack(step, as_rows(features, self._mailbox.layout.dtype), number, coming.longest)
        self._words.write(DOORBELL, number)
        mark("sent")
        if not wanted or comes_later:
            self._unawaited = number
            self._owed = (num_rows, k) if wanted else None
            return torch.full((num_rows, self._mailbox.layout.max_k), self._absent, device=self._device)
        return self._take(number, num_rows, k, mark)

    @property
    def is_owing(self) -> bool:
        """Whether `collect` has proposals to bring."""
        return self._owed is not None

    def collect(self) -> Tensor:
        """Proposals of the step that was last asked with `comes_later`, as `propose` returns them; queued likewise.

        Raises:
            RuntimeError: nothing is owed (see `is_owing`).
        """
        if self._owed is None or self._unawaited is None:
            raise RuntimeError("no proposals are to come")
        number, (num_rows, k) = self._unawaited, self._owed
        self._unawaited = self._owed = None
        return self._take(number, num_rows, k, _no_mark)

    def _take(self, number: int, num_rows: int, k: int, mark: Mark) -> Tensor:
        self._words.wait(REPLY, number)
        mark("answered")
        token_words = self._token_words[:num_rows].to(self._device, non_blocking=True, copy=True)
        tokens = take_tokens(token_words, number, self._shape.vocab_size, self._absent)
        mark("taken")
        return tokens if k else torch.full_like(tokens, self._absent)

    def warm_up(self, step: StepTensors) -> None:
        """Compile what a step launches, on tensors like its own: the first step would hold the GPU meanwhile. Rows that
        nobody waits for are overwritten."""
        layout = self._mailbox.layout
        features = torch.empty(len(step.positions), layout.width, dtype=layout.dtype, device=step.positions.device)
        self._pack(step, features, self._step, 1)

    def _pack(self, step: StepTensors, features: Tensor, number: int, longest: int) -> None:
        if features.is_cuda:
            from unmask.pairing.packed_rows_triton import pack_rows_on_gpu

            pack_rows_on_gpu(self._mailbox, self._words.address, step, features, number, longest)
        else:
            pack_rows(self._mailbox, step, features, number)

    def _unread_finished(self) -> np.ndarray:
        """Ended requests that the draft's side has not read of, as many as fit; they are repeated until it has."""
        taken = self._mailbox.word(TAKEN)
        self._finished = [(since, n) for since, n in self._finished if not is_reached(taken, since)]
        first = self._finished[: self._mailbox.layout.max_requests]
        # The others count from the step that names them first.
        self._finished[len(first) :] = [(self._step + 1, n) for _, n in self._finished[len(first) :]]
        return np.array([number for _, number in first], dtype=np.uint64)

    def _follow_offers(self) -> None:
        """Take over the projection of every draft that is offered, beside the per-step path."""
        while not self._closing.wait(_POLL_S):
            self._look()

    def _look(self) -> None:
        version = self._mailbox.long_word(OFFERED)
        if version in (0, self._refused) or (self._offer is not None and version == self._offer.draft_version):
            return
        try:
            hello = read_offer(self._mailbox)
            self._shape.check(hello)
            if hello.draft_version == version:
                self._offer = _on_device(hello, self._device)
            self._reason = ""
        except UserError as error:
            logger.warning("no proposals for now: %s", error)
            self._refused = version
        except (OSError, RuntimeError) as error:
            # Such as a device that has no memory left, or a shortage of descriptors: it is tried again.
            if (reason := str(error)) != self._reason:
                logger.warning("the draft's projection is not taken over yet: %s", reason)
            self._reason = reason


def _told(hashes: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    counts = np.array([len(row) for row in hashes], dtype=np.int64)
    if not 0 < counts.sum() <= MAX_HASHES:
        return {}
    return {"num_hashes": counts, "page_hashes": np.array([h for row in hashes for h in row], dtype=np.uint64)}


def write_offer(mailbox: Mailbox, hello: Hello) -> None:
    """Lay a draft's projection beside a mailbox, and say so."""
    with atomic_path(mailbox.offer_path) as temporary, temporary.open("wb") as file:
        for part in encode_hello(hello):
            file.write(part)
    mailbox.set_long_word(OFFERED, hello.draft_version)


def read_offer(mailbox: Mailbox) -> Hello:
    """The draft that is offered beside a mailbox. Raises OSError, WireError."""
    with mailbox.offer_path.open("rb", buffering=0) as file:
        # Memory that Python does not clear: other threads of the target could not run meanwhile.
        payload = np.empty(mailbox.offer_path.stat().st_size, dtype=np.uint8)
        filled = 0
        while read := file.readinto(payload.data[filled:]):
            filled += read
    return decode_hello(payload.data[:filled])


def _on_device(hello: Hello, device: torch.device) -> Hello:
    """The copy is complete when this returns, so that any stream may use it."""
    fc, norm = (copied_beside(tensor, device) for tensor in (hello.projection.fc, hello.projection.norm))
    return replace(hello, projection=replace(hello.projection, fc=fc, norm=norm))


def _no_mark(name: str) -> None:
    """Nobody measures."""
