"""Steps over the wire, announced or not, through a mailbox beside the draft."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ahead_tools import CountingEngine, new_engine
from tests.pairing_tools import BLOCK_SIZE, HIDDEN, SECRET, eventually, row, tiny_draft, tiny_vocabulary
from unmask.errors import WireError
from unmask.pairing.announcement import Announcement, check_tokens, decode_tokens
from unmask.pairing.batcher import Batcher
from unmask.pairing.channel import Channel
from unmask.pairing.coming_rows import ComingRows
from unmask.pairing.draft_engine import DraftEngine
from unmask.pairing.local_drafting import LocalDrafting
from unmask.pairing.mailbox import Mailbox
from unmask.pairing.mailbox_words import STEP_MASK, signed
from unmask.pairing.relay import Relay
from unmask.pairing.server import DraftServer
from unmask.pairing.stream_end import StreamEnd
from unmask.pairing.wire import MAX_MESSAGE_BYTES, Kind, Proposals, Step, pack_rows, tensor_bytes

K = BLOCK_SIZE - 1
TAG = 2**32 - 3
"""Where the target's own numbers of steps begin; they go round."""


def numbered(step: int) -> int:
    return (TAG + step) & STEP_MASK


def announced(
    engine: DraftEngine,
    requests: list[int],
    k: int = K,
    longest: int = 6,
    max_rows: int = 64,
    number: int = TAG,
    dtype: torch.dtype = torch.float32,
) -> Announcement:
    return Announcement(
        number=number,
        draft_version=engine.version,
        num_speculative_tokens=k,
        requests=np.array(requests, dtype=np.uint64),
        finished=np.empty(0, dtype=np.uint64),
        coming=ComingRows.following([longest] * len(requests)),
        max_requests=8,
        max_rows=max_rows,
        dtype=dtype,
    )


def step_of(engine: DraftEngine, number: int, rows: list[tuple[int, int, int, int]], k: int = K) -> Step:
    """(request, start, number of features, last token) a row."""
    generator = torch.Generator().manual_seed(number)
    return Step(
        draft_version=engine.version,
        epoch=5,
        number=number,
        num_speculative_tokens=k,
        rows=pack_rows([row(request, start, count, last) for request, start, count, last in rows]),
        features=torch.randn(sum(count for _, _, count, _ in rows), HIDDEN, generator=generator),
        finished=np.empty(0, dtype="<u8"),
    )


def laid_rows(step: Step, tag: int) -> np.ndarray:
    """int32 [R, 4] as a target's GPU lays them, with a tag of its own."""
    rows = np.full((len(step.rows), 4), signed(tag), dtype=np.int32)
    for column, name in enumerate(("start", "num_features", "last_token")):
        rows[:, column] = step.rows[name]
    return rows


class Relayed:
    """A relay, and a draft of the same weights that is asked directly."""

    def __init__(self, engine: DraftEngine) -> None:
        self.engine, self.twin = engine, new_engine(DraftEngine, "cpu")
        self.batcher = Batcher(engine, on_end=lambda: None)
        self.batcher.start()
        self.vocab_size = engine.hello.vocab_size
        drafting = LocalDrafting(engine, self.batcher, itertools.count().__next__)
        self.relay = Relay(drafting, announced(engine, []), HIDDEN, self.vocab_size)
        self.theirs, self.channel = (Channel(sock) for sock in socket.socketpair())

    def check(self, step: Step) -> Proposals:
        reply = self.relay.answer(step)
        self.relay.reply_sent()
        (expected,) = self.twin.step([(0, step)])
        assert reply.counts.tolist() == expected.counts.tolist()
        assert reply.tokens.tolist() == expected.tokens.tolist()
        assert (reply.number, reply.epoch, reply.draft_version) == (step.number, step.epoch, step.draft_version)
        self.check_context()
        return reply

    def check_context(self) -> None:
        """Drafts of so few weights say the same to much: what they know is compared, too."""
        eventually(lambda: self.engine.resident_pages == self.twin.resident_pages)
        eventually(lambda: self.engine.proposals_with_gap == self.twin.proposals_with_gap)

    def send_rows(self, step: Step, tag: int) -> np.ndarray:
        self.theirs.send(Kind.ROWS, [laid_rows(step, tag).data, tensor_bytes(step.features)])
        _, num_bytes = self.channel.begin([Kind.ROWS], MAX_MESSAGE_BYTES)
        payload = self.relay.answer_announced(self.channel, num_bytes)
        self.relay.reply_sent()
        check_tokens(payload, len(step.rows), step.num_speculative_tokens, self.vocab_size)
        tokens, counts = decode_tokens(payload, len(step.rows), tag)
        return np.where(np.arange(tokens.shape[1]) < counts[:, None], tokens, -1)

    def check_announced(self, step: Step, k: int = K, longest: int = 6, number: int | None = None) -> None:
        number = numbered(step.number) if number is None else number
        self.relay.announce(announced(self.engine, step.rows["request"].tolist(), k, longest, number=number))
        tokens = self.send_rows(step, number)
        (expected,) = self.twin.step([(0, step)])
        kept = np.arange(k) < expected.counts[:, None]
        assert tokens.tolist() == np.where(kept, expected.tokens, -1).tolist()
        self.check_context()


@pytest.fixture(params=[CountingEngine, DraftEngine])
def relayed(request) -> Iterator[Relayed]:
    relayed = Relayed(new_engine(request.param, "cpu"))
    yield relayed
    relayed.relay.close()
    relayed.batcher.stop()
    relayed.theirs.close()
    relayed.channel.close()


def test_what_was_announced_or_not_is_answered_alike(relayed) -> None:
    engine = relayed.engine
    relayed.check(step_of(engine, 1, [(7, 0, 9, 3), (8, 0, 4, -1)]))
    relayed.check_announced(step_of(engine, 2, [(7, 9, 2, 5), (8, 4, 3, 6)]))
    relayed.check_announced(step_of(engine, 3, [(7, 11, 6, 5)], k=2), k=2)
    relayed.check(step_of(engine, 4, [(7, 17, 1, 5), (8, 7, 1, 6)]))
    if isinstance(engine, CountingEngine):
        # A step is booked when its reply is on its way.
        eventually(lambda: engine.ahead_steps == 4)


def test_a_step_keeps_the_number_of_its_target_where_that_is_new(relayed) -> None:
    """Old ones are those of steps that were let go, and of targets that are mistaken."""
    engine, relay = relayed.engine, relayed.relay
    relayed.check_announced(step_of(engine, 1, [(7, 0, 6, 3), (8, 0, 4, 4)]))
    assert relay._number == numbered(1)
    relayed.check_announced(step_of(engine, 2, [(7, 6, 2, 5), (8, 4, 3, 6)]), number=numbered(9))
    assert relay._number == numbered(9)
    for number in (9, 8, 10):
        at = 8 + relay._number - numbered(9)
        relayed.check_announced(step_of(engine, number, [(7, at, 1, 5)]))
    assert relay._number == numbered(12)
    relayed.check_announced(step_of(engine, 13, [(7, 11, 1, 5)]))
    assert relay._number == numbered(13)


def test_an_announced_step_that_never_comes_is_let_go(relayed) -> None:
    engine, relay = relayed.engine, relayed.relay
    relayed.check(step_of(engine, 1, [(7, 0, 9, 3), (8, 0, 4, 4)]))
    relay.announce(announced(engine, [7, 8]))
    relayed.check_announced(step_of(engine, 2, [(7, 9, 2, 5), (8, 4, 3, 6)]))
    # Another step than was announced: other requests, another K, more rows.
    for number, (rows, k) in enumerate(
        (
            ([(7, 11, 1, 5), (8, 7, 1, 6)], K),
            ([(7, 12, 1, 5), (8, 8, 1, 6)], 2),
            ([(7, 13, 9, 5)], K),
        ),
        start=3,
    ):
        relay.announce(announced(engine, [7]))
        relayed.check(step_of(engine, number, rows, k))


def test_more_than_was_announced_is_refused(relayed) -> None:
    engine, relay = relayed.engine, relayed.relay
    with pytest.raises(WireError, match="not announced"):
        relayed.send_rows(step_of(engine, 2, [(7, 0, 1, 3)]), TAG)
    with pytest.raises(WireError, match="requests"):
        relay.announce(announced(engine, list(range(9))))
    with pytest.raises(WireError, match="other rows"):
        relay.announce(announced(engine, [7], dtype=torch.bfloat16))
    with pytest.raises(WireError, match="rows"):
        relay.answer(step_of(engine, 1, [(7, 0, 65, 3)]))
    with pytest.raises(WireError, match="a message holds"):
        Relay(relay._drafting, announced(engine, [], max_rows=2**31), HIDDEN, relayed.vocab_size)


@pytest.mark.parametrize(
    ("rows", "tag", "message"),
    [
        ([(7, 0, 7, 3)], TAG, "more than were announced"),
        ([(7, 0, 2, 3), (8, 0, 2, 3)], TAG, "bytes for 1 requests"),
        ([(7, 0, 2, 10**6)], TAG, "outside the sequence or the vocabulary"),
        ([(7, 2**31, 2, 3)], TAG, "outside the sequence or the vocabulary"),
        ([(7, 0, 2, 3)], TAG + 1, "of another step"),
    ],
)
def test_rows_that_are_not_what_was_announced_are_refused(relayed, rows, tag: int, message: str) -> None:
    """Even with the number that the mailbox would believe."""
    relay = relayed.relay
    relay.announce(announced(relayed.engine, [7]))
    assert relay._number == TAG
    before = relay._box.rows.copy()
    with pytest.raises(WireError, match=message):
        relayed.send_rows(step_of(relayed.engine, 1, rows), tag)
    assert (relay._box.rows == before).all()


def test_requests_that_ended_are_told_though_they_do_not_fit_one_entry(relayed) -> None:
    for number, first in enumerate((0, 8, 16), start=1):
        rows = [(first + i, 0, 2, 5) for i in range(8 if first < 16 else 4)]
        relayed.relay.answer(step_of(relayed.engine, number, rows))
        relayed.relay.reply_sent()
    eventually(lambda: relayed.engine.resident_requests == 20)
    ended = np.arange(20, dtype="<u8")
    for number in range(4, 7):
        step = replace(step_of(relayed.engine, number, [(50, 2 * (number - 4), 2, 5)]), finished=ended)
        relayed.relay.answer(step)
        relayed.relay.reply_sent()
        ended = ended[:0]
    eventually(lambda: relayed.engine.resident_requests == 1)


def test_a_request_that_is_named_twice_is_refused(relayed) -> None:
    step = step_of(relayed.engine, 1, [(7, 0, 2, 5), (8, 0, 1, 5), (7, 2, 2, 5)])
    with pytest.raises(WireError, match="named twice"):
        relayed.engine.check(step)


class NotingEngine(CountingEngine):
    """Notes for how many requests it was prepared."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.prepared: list[int] = []

    def prepare_ahead(self, end: StreamEnd, number: int) -> None:
        super().prepare_ahead(end, number)
        self.prepared.append(end.mailbox.layout.max_requests)


def test_a_draft_has_rehearsed_before_it_greets_a_target() -> None:
    vocabulary = tiny_vocabulary()
    server = DraftServer(tiny_draft(), vocabulary, vocabulary, SECRET, memory_mb=2)
    engine = server._engine = server._batcher._engine = new_engine(NotingEngine, "cpu")
    server._relays = True
    server.start()
    try:
        assert engine.prepared == [16, 32, 64, 128, 256]
        assert engine.resident_requests == 0
        assert not list(Path("/dev/shm").glob(f"unmask-*/{os.getpid()}-*"))
        assert server.stats().steps == 0
    finally:
        server.stop()


def test_a_draft_that_cannot_rehearse_serves_all_the_same(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Mailbox, "create", refuse)
    vocabulary = tiny_vocabulary()
    server = DraftServer(tiny_draft(), vocabulary, vocabulary, SECRET, memory_mb=2)
    server._relays = True
    server.start()
    try:
        assert "No space left on device" in caplog.text
        assert server.alive
    finally:
        server.stop()
