"""Steps that are queued before their rows are known: the same proposals as from rows that have come."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from tests.ahead_tools import Pair, RelayedPair
from tests.mailbox_tools import LAYOUT, ImaginedTarget, TargetStep
from tests.pairing_tools import eventually
from unmask.pairing.mailbox_words import DOORBELL, LATE, REPLY

K = LAYOUT.max_k


@pytest.fixture
def pair(tmp_path) -> Iterator[Pair]:
    with Pair(tmp_path) as pair:
        yield pair


@pytest.mark.parametrize("kind", [Pair, RelayedPair])
def test_proposals_do_not_depend_on_when_the_step_was_queued(kind: type[Pair], tmp_path) -> None:
    imagined = ImaginedTarget(seed=11)
    with kind(tmp_path) as pair:
        for _ in range(150):
            step, k = imagined.step(), imagined.random.randint(1, K)
            assert pair.ask(step, k) == pair.ask_twin(step, k)
            pair.finish(imagined.end())
        # The others bring a request that was not known before.
        assert 30 < pair.engine.ahead_steps < 150
        assert pair.engine.resident_requests == pair.twin.resident_requests
    eventually(lambda: pair.engine.resident_requests == 0)


def one_step(imagined: ImaginedTarget, pair: Pair) -> TargetStep:
    step = imagined.step()
    assert pair.ask(step, K) == pair.ask_twin(step, K)
    return step


def test_a_request_that_went_back_is_left_to_the_engine_and_served_again(pair) -> None:
    imagined = ImaginedTarget(seed=2, num_slots=1)
    one_step(imagined, pair)
    one_step(imagined, pair)
    queued = pair.engine.ahead_steps
    assert queued
    # Preempted: its rows come again from the start.
    (name,) = imagined.reached
    imagined.reached[name] = 0
    step = imagined.step()
    assert pair.ask(step, K) == [[-1] * K]
    pair.ask_twin(step, K)
    assert pair.engine.ahead_steps == queued + 1
    # What could not be placed is a gap; the next rows come by the engine's own rules, those after them ahead again.
    pair.ask(imagined.step(), K)
    assert pair.engine.ahead_steps == queued + 1
    pair.ask(imagined.step(), K)
    assert pair.engine.ahead_steps == queued + 2


def test_others_who_ask_end_it(pair) -> None:
    imagined = ImaginedTarget(seed=2, num_slots=1)
    one_step(imagined, pair)
    one_step(imagined, pair)
    queued = pair.engine.ahead_steps
    pair.batcher._asked_at[99] = time.monotonic()
    one_step(imagined, pair)
    assert pair.engine.ahead_steps == queued
    pair.batcher._asked_at.pop(99)
    one_step(imagined, pair)
    assert pair.engine.ahead_steps == queued + 1


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
