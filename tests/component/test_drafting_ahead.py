"""Steps that are queued before their rows are known: the same proposals as from rows that have come."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.ahead_tools import CountingEngine, NeighbourPair, Pair, RelayedPair
from tests.mailbox_tools import LAYOUT, ImaginedTarget, TargetStep
from tests.pairing_tools import HIDDEN, LAYER_IDS, eventually, raw_features
from unmask.pairing import draft_session, local_drafting
from unmask.pairing.coming_rows import ComingRows
from unmask.pairing.handover import Handover
from unmask.pairing.mailbox import Control, Mailbox
from unmask.pairing.mailbox_words import DOORBELL, LATE, REPLY, STEP_MASK
from unmask.pairing.packed_rows import StepTensors
from unmask.pairing.page_hashes import hash_pages
from unmask.pairing.wire import EIGHT_BIT

K = LAYOUT.max_k


@pytest.fixture
def pair(tmp_path) -> Iterator[Pair]:
    with Pair(tmp_path) as pair:
        yield pair


@pytest.mark.parametrize("rows", [torch.float32, EIGHT_BIT], ids=["whole rows", "rows in eight bits"])
@pytest.mark.parametrize("kind", [Pair, RelayedPair, NeighbourPair])
@pytest.mark.parametrize("says", [True, False], ids=["begins where it says", "does not say where it begins"])
def test_proposals_do_not_depend_on_when_the_step_was_queued(
    kind: type[Pair], rows: torch.dtype, says: bool, tmp_path
) -> None:
    imagined = ImaginedTarget(seed=11)
    with kind(tmp_path, rows=rows) as pair:
        for _ in range(150):
            step, k = imagined.step(), imagined.random.randint(1, K)
            if not says:
                step = replace(step, coming=ComingRows.following(step.coming.most))
            assert pair.ask(step, k) == pair.ask_twin(step, k)
            pair.finish(imagined.end())
        if says:
            assert pair.engine.ahead_steps == 150
        else:
            # The others bring a request that was not known before.
            assert 10 < pair.engine.ahead_steps < 150
        assert pair.engine.resident_requests == pair.twin.resident_requests
    eventually(lambda: pair.engine.resident_requests == 0)


@pytest.mark.parametrize("rows", [torch.float32, EIGHT_BIT], ids=["whole rows", "rows in eight bits"])
def test_a_draft_without_room_for_a_mailbox_takes_the_rows_of_announced_steps_all_the_same(
    rows: torch.dtype, tmp_path, monkeypatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(draft_session, "Relay", full)
    imagined = ImaginedTarget(seed=12)
    with RelayedPair(tmp_path, rows=rows) as pair:
        for _ in range(60):
            step, k = imagined.step(), imagined.random.randint(1, K)
            assert pair.ask(step, k) == pair.ask_twin(step, k)
            pair.finish(imagined.end())
        assert pair.engine.ahead_steps == 0
        assert pair.engine.resident_requests == pair.twin.resident_requests


def one_step(imagined: ImaginedTarget, pair: Pair) -> TargetStep:
    step = imagined.step()
    assert pair.ask(step, K) == pair.ask_twin(step, K)
    return step


def preempted(imagined: ImaginedTarget, pair: Pair) -> TargetStep:
    """Some steps of one request, and then its rows again from the start."""
    one_step(imagined, pair)
    one_step(imagined, pair)
    (name,) = imagined.reached
    imagined.reached[name], imagined.prompts[name] = 0, 1
    return imagined.step()


def test_a_request_that_went_back_is_served_at_once(pair) -> None:
    imagined = ImaginedTarget(seed=2, num_slots=1)
    step = preempted(imagined, pair)
    queued = pair.engine.ahead_steps
    tokens = pair.ask(step, K)
    assert tokens == pair.ask_twin(step, K) != [[-1] * K]
    one_step(imagined, pair)
    assert pair.engine.ahead_steps == queued + 2
    assert pair.engine.proposals_with_gap == 0


def test_a_request_that_went_back_unsaid_is_left_to_the_engine_and_served_again(pair) -> None:
    imagined = ImaginedTarget(seed=2, num_slots=1)
    step = preempted(imagined, pair)
    queued = pair.engine.ahead_steps
    assert queued
    step = replace(step, coming=ComingRows.following(step.coming.most))
    assert pair.ask(step, K) == [[-1] * K]
    pair.ask_twin(step, K)
    assert pair.engine.ahead_steps == queued + 1
    # What could not be placed is a gap; the next rows come by the engine's own rules, those after them ahead again.
    pair.ask(imagined.step(), K)
    assert pair.engine.ahead_steps == queued + 1
    pair.ask(imagined.step(), K)
    assert pair.engine.ahead_steps == queued + 2


@pytest.mark.parametrize("is_alone", [True, False])
def test_only_a_target_that_is_alone_keeps_the_engine_while_it_does_not_ring(pair, is_alone: bool) -> None:
    imagined = ImaginedTarget(seed=2, num_slots=1)
    one_step(imagined, pair)
    one_step(imagined, pair)
    queued = pair.engine.ahead_steps
    if not is_alone:
        pair.batcher._asked_at[99] = time.monotonic() + 60
    one_step(imagined, pair)
    assert pair.engine.ahead_steps == queued + 1
    number = (pair.mailbox.word(DOORBELL) + 1) & STEP_MASK
    known = np.array([pair.target._numbers.of(name) for name in imagined.reached], dtype=np.uint64)
    pair.mailbox.post(
        Control(
            number=number,
            num_speculative_tokens=K,
            draft_version=pair.engine.version,
            requests=known,
            finished=np.empty(0, dtype=np.uint64),
            coming=ComingRows.following([2] * len(known)),
        )
    )
    try:
        if is_alone:
            eventually(pair.engine._lock.locked)
        else:
            time.sleep(0.05)
            assert not pair.engine._lock.locked()
    finally:
        pair.mailbox.set_word(DOORBELL, number)


def test_what_rings_while_the_engine_is_busy_is_batched(pair) -> None:
    imagined = ImaginedTarget(seed=2, num_slots=1)
    one_step(imagined, pair)
    one_step(imagined, pair)
    queued = pair.engine.ahead_steps
    pair.batcher._asked_at[99] = time.monotonic() + 60
    step, tokens = imagined.step(), []
    with pair.engine._lock:
        asker = threading.Thread(target=lambda: tokens.extend(pair.ask(step, K)))
        asker.start()
        eventually(lambda: not pair.batcher._arrived.empty() or pair.batcher._asked_at.keys() - {99})
        time.sleep(0.05)
        assert not tokens
    asker.join()
    assert tokens == pair.ask_twin(step, K)
    assert pair.engine.ahead_steps == queued


def test_a_step_that_was_released_before_its_reply_counts_as_late(pair) -> None:
    imagined = ImaginedTarget(seed=2, num_slots=1)
    one_step(imagined, pair)
    answer, entered = pair.engine._blocks._append_pass, threading.Event()

    def held_up(rows: int) -> None:
        entered.set()
        eventually(lambda: pair.mailbox.word(REPLY) == pair.mailbox.word(DOORBELL))
        answer(rows)

    pair.engine._blocks._append_pass = held_up

    def release() -> None:
        entered.wait()
        pair.mailbox.release(pair.mailbox.word(DOORBELL))

    watchdog = threading.Thread(target=release)
    watchdog.start()
    step = imagined.step()
    assert pair.ask(step, K) == [[-1] * K]
    watchdog.join()
    pair.ask_twin(step, K)
    pair.engine._blocks._append_pass = answer
    eventually(lambda: pair.mailbox.word(LATE) == 1)
    # Its rows were taken all the same.
    one_step(imagined, pair)


def prefill(name: str, start: int, raw: torch.Tensor, anchor: int) -> TargetStep:
    """A prompt whose rows begin at `start`, as one chunk."""
    states = [raw[:, HIDDEN * i : HIDDEN * (i + 1)] for i in range(len(LAYER_IDS))]
    tensors = StepTensors(
        positions=torch.arange(start, start + len(raw)),
        query_starts=torch.tensor([0, len(raw)]),
        num_sampled=torch.tensor([1]),
        num_rejected=torch.tensor([0]),
        slots=torch.tensor([0]),
        last_sampled=torch.tensor([[anchor]]),
    )
    coming = ComingRows(np.array([len(raw)]), np.array([start]))
    return TargetStep([name], states, tensors, coming, [(name, start, raw, anchor)])


@pytest.mark.parametrize("kind", [Pair, RelayedPair, NeighbourPair])
def test_a_prefix_that_the_target_had_cached_is_no_gap(kind: type[Pair], tmp_path) -> None:
    prompt, raw = np.arange(13), raw_features(13, seed=5)
    pages = hash_pages(prompt, 4)
    with kind(tmp_path) as pair:
        first = prefill("first", 0, raw, 7)
        assert pair.ask(first, K, hashes=[pages]) == pair.ask_twin(first, K)
        following = prefill("first", 13, raw_features(2, seed=6), 9)
        assert pair.ask(following, K) == pair.ask_twin(following, K)
        # The same prompt again, of which the target had two pages; its draft's twin is shown all of it.
        assert pair.ask(prefill("second", 8, raw[8:], 7), K, hashes=[pages]) == pair.ask_twin(
            prefill("second", 0, raw, 7), K
        )
        assert pair.engine.proposals_with_gap == 0
        # And told of no hashes it has a gap.
        pair.ask(prefill("third", 8, raw[8:], 7), K)
        assert pair.engine.proposals_with_gap == 1


def test_a_neighbour_that_goes_is_replaced_over_the_wire_and_comes_back(tmp_path) -> None:
    imagined = ImaginedTarget(seed=2, num_slots=1)
    with NeighbourPair(tmp_path) as pair:
        one_step(imagined, pair)
        asked_over_the_wire = pair.server.stats().connections
        assert pair.target.asked == 1
        # Another draft takes its place and serves no folder.
        boxes, old = pair.boxes, pair.server
        pair.boxes = None
        pair.server = pair.new_server()
        pair.write_link()
        old.stop()
        eventually(lambda: not list(boxes.glob("*.mailbox")), 20)
        eventually(lambda: pair.target.is_ready, 20)
        pair.batcher = pair.server._batcher
        pair.before = pair.batcher.steps - pair.target.asked
        before = pair.batcher.messages
        # It has not seen the first rows, so that what it drafts may differ.
        pair.ask(imagined.step(), K)
        assert pair.batcher.messages == before + 1
        assert asked_over_the_wire == 1


def test_a_folder_that_nobody_watches_is_given_up(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("unmask.pairing.handover._TAKEN_UP_S", 0.3)
    imagined = ImaginedTarget(seed=2, num_slots=1)
    with RelayedPair(tmp_path) as pair:
        empty = tmp_path / "nobody"
        empty.mkdir()
        pair.boxes = empty
        pair.write_link()
        eventually(lambda: list(empty.iterdir()))
        eventually(lambda: not list(empty.iterdir()))
        eventually(lambda: pair.target.is_ready)
        one_step(imagined, pair)


def test_nothing_is_drafted_beyond_the_last_position(tmp_path) -> None:
    imagined = ImaginedTarget(seed=4, num_slots=2)
    with Pair(tmp_path, max_position_embeddings=48) as pair:
        for _ in range(40):
            step = imagined.step()
            assert pair.ask(step, K) == pair.ask_twin(step, K)
        assert max(imagined.reached.values()) > 48
        assert pair.engine.ahead_steps


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_behind_a_doorbell_ends_the_draft(pair, monkeypatch) -> None:
    imagined = ImaginedTarget(seed=2, num_slots=1)
    one_step(imagined, pair)
    one_step(imagined, pair)

    def fail(step, seen):
        raise RuntimeError("the device has failed")

    monkeypatch.setattr(pair.engine, "book", fail)
    step = imagined.step()
    pair.target.propose(step.names, step.states, step.tensors, coming=step.coming, k=K)
    eventually(lambda: not pair.batcher.alive)
    eventually(lambda: not pair.target.is_ready)


def test_a_sidecar_that_follows_another_adopts_what_was_handed_over(tmp_path) -> None:
    mailbox = Mailbox.create(tmp_path / "box.mailbox", LAYOUT)
    folder = tmp_path / "boxes"
    folder.mkdir()
    first, second = Handover(mailbox), Handover(Mailbox(mailbox.path))
    first.follow(str(folder))
    assert first.is_given
    second.adopt(str(folder))
    assert second.is_given
    second.take_back()
    assert not list(folder.iterdir())
    third = Handover(Mailbox(mailbox.path))
    third.adopt(str(folder))
    assert not third.is_given


def test_a_mailbox_that_cannot_be_prepared_is_served_once_its_doorbell_has_rung(tmp_path, monkeypatch) -> None:
    """Such as one whose pages cannot be pinned; others must not suffer."""
    unpinned = []

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(CountingEngine, "prepare_ahead", fail)
    monkeypatch.setattr(local_drafting, "_unpin", unpinned.append)
    imagined = ImaginedTarget(seed=5)
    with Pair(tmp_path) as pair:
        for _ in range(20):
            step, k = imagined.step(), imagined.random.randint(1, K)
            assert pair.ask(step, k) == pair.ask_twin(step, k)
            pair.finish(imagined.end())
        assert pair.engine.ahead_steps == 0
        assert len(unpinned) == 1
