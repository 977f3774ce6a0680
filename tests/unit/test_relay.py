"""Steps over the wire, announced or not, through a mailbox beside the draft."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.ahead_tools import CountingEngine, new_engine
from tests.pairing_tools import BLOCK_SIZE, HIDDEN, row
from unmask.errors import WireError
from unmask.pairing.announcement import Announcement
from unmask.pairing.batcher import Batcher
from unmask.pairing.draft_engine import DraftEngine
from unmask.pairing.local_drafting import LocalDrafting
from unmask.pairing.relay import Relay
from unmask.pairing.wire import Proposals, Step, pack_rows

K = BLOCK_SIZE - 1


def announced(
    engine: DraftEngine, requests: list[int], k: int = K, longest: int = 6, max_rows: int = 64
) -> Announcement:
    return Announcement(
        draft_version=engine.version,
        num_speculative_tokens=k,
        requests=np.array(requests, dtype=np.uint64),
        finished=np.empty(0, dtype=np.uint64),
        longest=longest,
        max_requests=8,
        max_rows=max_rows,
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


class Relayed:
    """A relay, and a draft of the same weights that is asked directly."""

    def __init__(self, engine: DraftEngine) -> None:
        self.engine, self.twin = engine, new_engine(DraftEngine, "cpu")
        self.batcher = Batcher(engine, on_end=lambda: None)
        self.batcher.start()
        drafting = LocalDrafting(engine, self.batcher, itertools.count().__next__)
        self.relay = Relay(drafting, announced(engine, []), HIDDEN, torch.float32)

    def check(self, step: Step) -> Proposals:
        reply = self.relay.answer(step)
        (expected,) = self.twin.step([(0, step)])
        assert reply.counts.tolist() == expected.counts.tolist()
        assert reply.tokens.tolist() == expected.tokens.tolist()
        assert (reply.number, reply.epoch, reply.draft_version) == (step.number, step.epoch, step.draft_version)
        return reply


@pytest.fixture(params=[CountingEngine, DraftEngine])
def relayed(request) -> Iterator[Relayed]:
    relayed = Relayed(new_engine(request.param, "cpu"))
    yield relayed
    relayed.relay.close()
    relayed.batcher.stop()


def test_what_was_announced_or_not_is_answered_alike(relayed) -> None:
    engine, relay = relayed.engine, relayed.relay
    relayed.check(step_of(engine, 1, [(7, 0, 9, 3), (8, 0, 4, -1)]))
    relay.announce(announced(engine, [7, 8]))
    relayed.check(step_of(engine, 2, [(7, 9, 2, 5), (8, 4, 3, 6)]))
    relay.announce(announced(engine, [7], k=2))
    relayed.check(step_of(engine, 3, [(7, 11, 6, 5)], k=2))
    if isinstance(engine, CountingEngine):
        assert engine.ahead_steps == 2


def test_an_announced_step_that_never_comes_is_let_go(relayed) -> None:
    engine, relay = relayed.engine, relayed.relay
    relayed.check(step_of(engine, 1, [(7, 0, 9, 3), (8, 0, 4, 4)]))
    relay.announce(announced(engine, [7, 8]))
    relay.announce(announced(engine, [7, 8]))
    relayed.check(step_of(engine, 2, [(7, 9, 2, 5), (8, 4, 3, 6)]))
    # Other requests than were announced, another K, more rows.
    for number, (changes, rows, k) in enumerate(
        (
            ([7], [(7, 11, 1, 5), (8, 7, 1, 6)], K),
            ([7, 8], [(7, 12, 1, 5), (8, 8, 1, 6)], 2),
            ([7], [(7, 13, 9, 5)], K),
        ),
        start=3,
    ):
        relay.announce(announced(engine, changes))
        relayed.check(step_of(engine, number, rows, k))


def test_more_than_was_announced_is_refused(relayed) -> None:
    engine, relay = relayed.engine, relayed.relay
    with pytest.raises(WireError, match="requests"):
        relay.announce(announced(engine, list(range(9))))
    with pytest.raises(WireError, match="rows"):
        relay.answer(step_of(engine, 1, [(7, 0, 65, 3)]))
    with pytest.raises(WireError, match="a message holds"):
        Relay(relay._drafting, announced(engine, [], max_rows=2**31), HIDDEN, torch.float32)
    relayed.check(step_of(engine, 2, [(7, 0, 9, 3)]))
