"""An announced step is sent from the mailbox when it rings, and only what is its own is answered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.mailbox_tools import LAYOUT
from unmask.pairing.announcement import encode_tokens
from unmask.pairing.coming_rows import ComingRows
from unmask.pairing.mailbox import Control, Mailbox
from unmask.pairing.mailbox_words import ANSWERED, BEGUN, DOORBELL, LATE, REPLY, signed
from unmask.pairing.wire_end import WireEnd

K = LAYOUT.max_k
NUMBER = 2**32 - 2


class Step:
    """Two requests, and what their draft is asked."""

    def __init__(self, path: Path) -> None:
        self.box = Mailbox.create(path, LAYOUT)
        self.asked: list[tuple[list[list[int]], list[float]]] = []
        self.control = Control(
            number=NUMBER,
            num_speculative_tokens=K,
            draft_version=1,
            requests=np.array([7, 8], dtype=np.uint64),
            finished=np.empty(0, dtype=np.uint64),
            coming=ComingRows.following([4, 4]),
        )
        for word in (BEGUN, DOORBELL, REPLY):
            self.box.set_word(word, NUMBER - 1)
        self.end = WireEnd(self.box, self.control, self.ask)
        valid = np.ones((2, K), dtype=bool)
        valid[1, 1:] = False
        self.reply: bytes | None = encode_tokens(np.arange(2 * K).reshape(2, K), valid, NUMBER)

    def ask(self, parts: list[memoryview], deliver: Callable[[memoryview], None]) -> bool:
        rows, features = parts
        laid = np.frombuffer(rows, dtype=np.int32).reshape(2, 4)
        self.asked.append((laid.tolist(), np.frombuffer(features, np.float32)[:: LAYOUT.width].tolist()))
        self.before()
        if self.reply is not None:
            deliver(memoryview(self.reply))
        return self.reply is not None

    def before(self) -> None:
        """What happens while the draft is asked."""

    def ring(self, tag: int = signed(NUMBER)) -> None:
        self.box.set_word(BEGUN, NUMBER)
        self.box.rows[:2] = [[3, 2, 9, tag], [5, 1, -1, tag]]
        self.box.features[:3] = torch.arange(3)[:, None]
        self.box.set_word(DOORBELL, NUMBER)

    def tokens(self) -> list[list[int]]:
        words = self.box.tokens[:2]
        return np.where(words >> 32 == signed(NUMBER), words & 0xFFFFFFFF, -1).tolist()


@pytest.fixture
def step(tmp_path) -> Step:
    return Step(tmp_path / "box")


def test_rows_are_sent_as_they_lie_and_the_tokens_stored(step) -> None:
    assert not step.end.is_done
    assert not step.asked
    step.ring()
    assert step.end.is_done
    assert step.end.is_done
    [(rows, features)] = step.asked
    assert rows == [[3, 2, 9, signed(NUMBER)], [5, 1, -1, signed(NUMBER)]]
    assert features == [0, 1, 2]
    assert step.box.word(REPLY) == NUMBER
    assert step.tokens() == [list(range(K)), [K, *[-1] * (K - 1)]]
    assert step.box.long_word(ANSWERED) == 1


def test_without_proposals_the_target_goes_on_all_the_same(step) -> None:
    step.reply = None
    step.ring()
    assert step.end.is_done
    assert step.box.word(REPLY) == NUMBER
    assert step.tokens() == [[-1] * K] * 2


def test_rows_of_another_step_are_not_sent(step) -> None:
    step.ring(tag=5)
    assert step.end.is_done
    assert not step.asked
    assert step.box.word(REPLY) == NUMBER - 1


def test_a_step_that_was_released_is_not_sent_or_counts_as_late(step) -> None:
    step.box.set_word(REPLY, NUMBER)
    step.ring()
    assert step.end.is_done
    assert not step.asked
    step.box.set_word(REPLY, NUMBER - 1)
    step.before = lambda: step.box.release(NUMBER)
    assert WireEnd(step.box, step.control, step.ask).is_done
    assert step.box.word(LATE) == 1
    assert step.tokens() == [[-1] * K] * 2


def test_features_that_were_overwritten_meanwhile_are_not_answered(step) -> None:
    step.before = lambda: step.box.set_word(BEGUN, NUMBER + 1)
    step.ring()
    assert step.end.is_done
    assert not step.end.is_intact
    assert step.box.word(REPLY) == NUMBER - 1


def test_a_step_that_does_not_ring_is_left_alone(step) -> None:
    step.end.let_go(NUMBER)
    assert step.end.is_done
    assert step.end.was_let_go
    step.ring()
    assert step.end.is_done
    assert not step.asked
