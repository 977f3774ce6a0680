from __future__ import annotations

import random
import threading
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from tests.mailbox_tools import LAYOUT, ImaginedTarget, answers
from tests.pairing_tools import SHAPE, eventually, tiny_draft
from unmask.errors import ConfigError, WireError
from unmask.files import private_folder
from unmask.pairing import mailbox_reader
from unmask.pairing.coming_rows import ComingRows
from unmask.pairing.hello import NO_DIGEST, Hello, hello_of
from unmask.pairing.link_file import LinkConfig, write_link_file
from unmask.pairing.mailbox import Control, Mailbox, is_orphaned, take_tokens
from unmask.pairing.mailbox_folder import new_path
from unmask.pairing.mailbox_layout import Layout
from unmask.pairing.mailbox_reader import Asked, MailboxReader, MailboxService
from unmask.pairing.mailbox_target import MailboxTarget, write_offer
from unmask.pairing.mailbox_words import (
    ALIVE,
    BEGUN,
    CONTROL,
    DEPTH,
    DOORBELL,
    HEARTBEAT,
    LATE,
    OFFERED,
    OPEN_UNTIL,
    REPLY,
    SERVING,
    TAKEN,
    is_reached,
    signed,
)
from unmask.pairing.sidecar import target_shape
from unmask.pairing.stream_words import HostWords
from unmask.pairing.watchdog import Watchdog

K = LAYOUT.max_k
CPU = torch.device("cpu")


@pytest.fixture
def mailbox(tmp_path) -> Mailbox:
    return Mailbox.create(tmp_path / "box", LAYOUT)


def control(number: int, requests: list[int], finished: list[int] = (), k: int = K) -> Control:
    return Control(
        number=number,
        num_speculative_tokens=k,
        draft_version=2**63 + 5,
        requests=np.array(requests, dtype=np.uint64),
        finished=np.array(finished, dtype=np.uint64),
        coming=ComingRows(np.arange(len(requests)) + number % 7, np.arange(len(requests)) - 1),
    )


def start_at(mailbox: Mailbox, step: int) -> None:
    """As if `step` steps had gone by."""
    for word in (BEGUN, DOORBELL, REPLY, CONTROL, TAKEN):
        mailbox.set_word(word, step)


def ring(mailbox: Mailbox, number: int, rows: list[tuple[int, int, int]]) -> None:
    """What the GPU does."""
    mailbox.set_word(BEGUN, number)
    for i, row in enumerate(rows):
        mailbox.rows[i] = *row, signed(number & 0xFFFFFFFF)
    mailbox.features[: sum(count for _, count, _ in rows)] = float(number % 1000)
    mailbox.set_word(DOORBELL, number)


@pytest.mark.parametrize("step", [0, 5, 2**31 - 1, 2**31, 2**32 - 1])
def test_steps_compare_cyclically(step: int) -> None:
    for ahead in (0, 1, 2**31 - 1):
        assert is_reached((step + ahead) % 2**32, step)
    for behind in (1, 2**31):
        assert not is_reached((step - behind) % 2**32, step)


def test_a_layout_survives_its_header_and_its_parts_do_not_overlap(mailbox) -> None:
    assert Mailbox(mailbox.path).layout == LAYOUT
    ends = [
        (LAYOUT.control_at, DEPTH * LAYOUT.entry_bytes),
        (LAYOUT.rows_at, 16 * LAYOUT.max_requests),
        (LAYOUT.tokens_at, 8 * LAYOUT.max_requests * K),
        (LAYOUT.features_at, 4 * LAYOUT.max_rows * LAYOUT.width),
        (LAYOUT.num_bytes, 0),
    ]
    for (at, size), (after, _) in pairwise(ends):
        assert at + size <= after
        assert at % 4096 == 0


@pytest.mark.parametrize("damage", ["magic", "cut", "longer"])
def test_another_file_is_refused(mailbox, damage: str) -> None:
    content = mailbox.path.read_bytes()
    changed = {"magic": b"X" + content[1:], "cut": content[:20], "longer": content + b"0"}[damage]
    mailbox.path.write_bytes(changed)
    with pytest.raises(WireError):
        Mailbox(mailbox.path)


@pytest.mark.parametrize("first", [0, 2**31 - 20, 2**32 - 20])
def test_control_and_rows_arrive_as_through_a_queue(mailbox, first: int) -> None:
    """Across the wrap-around, with the CPU ahead of the GPU by a random number of steps."""
    rng = random.Random(first)
    start_at(mailbox, first)
    reader, posted, rung, answered = MailboxReader(mailbox), [], first, first
    finished_sent, finished_read = [], []
    for _ in range(200):
        if len(posted) < DEPTH - 1 and rng.random() < 0.6:
            number = (first + 1 if not posted else posted[-1][0] + 1) if posted or rung == first else rung + 1
            ended = [rng.randrange(2**64) for _ in range(rng.randint(0, 2))]
            finished_sent += ended
            count = rng.randint(1, 8)
            rows = [(rng.randrange(2**31), rng.randint(0, 8), rng.randint(-1, 96)) for _ in range(count)]
            entry = control(number, [rng.randrange(2**64) for _ in range(count)], ended, rng.randint(1, K))
            if rng.random() < 0.3:
                told = np.array([rng.randint(0, 3) for _ in range(count)])
                hashes = np.array([rng.randrange(2**64) for _ in range(told.sum())], dtype=np.uint64)
                # Of some requests fewer rows come than were foretold: their pages are not full.
                most = np.array([rows_come + (rng.random() < 0.2) for _, rows_come, _ in rows])
                coming = ComingRows(most, np.arange(count))
                entry = replace(entry, num_hashes=told, page_hashes=hashes, coming=coming)
            mailbox.post(entry)
            posted.append((number, entry, rows))
        if posted and answered == rung and rng.random() < 0.7:
            rung = posted[0][0]
            ring(mailbox, rung % 2**32, posted[0][2])
        asked = reader.next()
        if asked is None:
            assert answered == rung
            continue
        number, entry, rows = posted.pop(0)
        assert (asked.number, asked.k, asked.draft_version) == (
            number % 2**32,
            entry.num_speculative_tokens,
            entry.draft_version,
        )
        assert [row[:4] for row in asked.rows.tolist()] == [
            (request, *row) for request, row in zip(entry.requests.tolist(), rows, strict=True)
        ]
        told = entry.num_hashes if len(entry.page_hashes) else np.zeros(len(rows), dtype=np.int64)
        came = np.array([rows_come for _, rows_come, _ in rows]) == entry.coming.most
        assert asked.rows["num_hashes"].tolist() == np.where(came, told, 0).tolist()
        assert asked.page_hashes.tolist() == entry.page_hashes[np.repeat(came, told)].tolist()
        assert len(asked.features) == sum(count for _, count, _ in rows)
        assert (asked.features == number % 2**32 % 1000).all()
        finished_read += asked.finished
        assert mailbox.answer(asked.number, *answers(*[[7] * entry.num_speculative_tokens] * len(rows)))
        tokens = take_tokens(torch.from_numpy(mailbox.tokens), number % 2**32, 1000, -1)
        assert (tokens[: len(rows), : entry.num_speculative_tokens] == 7).all()
        assert int((tokens == 7).sum()) == len(rows) * entry.num_speculative_tokens
        answered = rung
    assert answered > first + 25
    assert finished_read == finished_sent[: len(finished_read)]


def test_what_was_written_for_another_step_is_never_read(mailbox) -> None:
    start_at(mailbox, 2**32 - 3)
    reader = MailboxReader(mailbox)
    mailbox.post(control(2**32 - 2, [1, 2]))
    ring(mailbox, 2**32 - 2, [(0, 2, 5), (0, 3, 5)])
    assert reader.next() is not None
    assert mailbox.answer(2**32 - 2, *answers([1] * K, [2] * K))
    # A draft that stood still while it wrote: half of its tokens lie there when the next step is answered.
    mailbox.post(control(2**32 - 1, [1, 2]))
    ring(mailbox, 2**32 - 1, [(2, 1, 5), (3, 1, 5)])
    asked = reader.next()
    mailbox.release(asked.number)
    assert (take_tokens(torch.from_numpy(mailbox.tokens), asked.number, 1000, -1) == -1).all()
    assert not mailbox.answer(asked.number, *answers([9] * K, [9] * K))
    assert mailbox.word(LATE) == 1
    # Rows of which one is another step's, and features that the GPU has begun to overwrite.
    mailbox.post(control(0, [1, 2]))
    ring(mailbox, 0, [(3, 1, 5), (4, 1, 5)])
    assert mailbox.is_intact(0)
    mailbox.rows[1, 3] = signed(2**32 - 1)
    assert reader.next() is None
    mailbox.release(0)
    mailbox.set_word(BEGUN, 1)
    assert not mailbox.is_intact(0)


def test_a_reader_that_was_passed_by_goes_on_with_the_newest_step(mailbox) -> None:
    reader = MailboxReader(mailbox)
    for number in range(1, 2 * DEPTH + 2):
        mailbox.post(control(number, [1]))
        ring(mailbox, number, [(number, 1, 5)])
        if number < 2 * DEPTH + 1:
            mailbox.release(number)
    asked = [step for _ in range(4) if (step := reader.next())]
    assert [step.number for step in asked] == [2 * DEPTH + 1]


class Echo:
    """Proposes what it was sent: the first feature of each row's last vector, as an id."""

    def __init__(self) -> None:
        self.hello = hello_of(tiny_draft(), 77, None)
        self.seen: list[Asked] = []
        self.forgotten = 0
        self.delay = threading.Event()

    def propose(self, asked: Asked) -> tuple[np.ndarray, np.ndarray]:
        while self.delay.is_set():
            time.sleep(0.001)
        self.seen.append(asked)
        last = asked.rows["last_token"]
        return np.repeat(last[:, None], asked.k, axis=1), np.where(last >= 0, asked.k, 0)

    is_elsewhere = False

    def look_around(self) -> None:
        """Nobody else serves it."""

    def ahead(self, control: Control, finished: list[int], await_end) -> bool:
        return False

    def forget(self) -> None:
        self.forgotten += 1


@pytest.fixture
def echo(mailbox):
    proposer = Echo()
    service = MailboxService(Mailbox(mailbox.path), proposer)
    service.start()
    yield proposer
    proposer.delay.clear()
    service.close()


@pytest.fixture
def target(mailbox, echo):
    target = MailboxTarget(mailbox, HostWords(mailbox), SHAPE, CPU)
    target.start()
    mailbox.set_long_word(HEARTBEAT, time.monotonic_ns() + 3600 * 10**9)
    eventually(lambda: target.is_ready)
    yield target
    target.close()


def test_two_threads_exchange_steps_and_every_row_is_the_targets_own(mailbox, target, echo) -> None:
    imagined = ImaginedTarget(seed=3)
    numbers: dict[str, int] = {}
    projection = echo.hello.projection
    ended: list[str] = []
    for _ in range(60):
        step = imagined.step()
        k = imagined.random.randint(1, K)
        tokens = target.propose(step.names, step.states, step.tensors, coming=step.coming, k=k)
        asked = echo.seen[-1]
        for row, (name, start, raw, anchor), ids in zip(asked.rows.tolist(), step.seen, tokens.tolist(), strict=True):
            assert numbers.setdefault(name, row[0]) == row[0]
            assert row[1:4] == (start, len(raw), anchor)
            assert ids == ([anchor] * k if anchor >= 0 else [-1] * k) + [-1] * (K - k)
        expected = projection(torch.cat([raw for *_, raw, _ in step.seen]))
        torch.testing.assert_close(asked.features[: len(expected)], expected)
        gone = imagined.end()
        ended += [name for name in gone if name in numbers]
        target.finish(gone)
    assert (target.asked, target.passed) == (60, 0)
    told = [number for asked in echo.seen for number in asked.finished]
    assert set(told) == {numbers[name] for name in ended[: len(set(told))]}
    assert len(set(told)) > 3


def test_only_the_step_after_a_prompts_middle_waits_for_it(mailbox, target, echo) -> None:
    imagined = ImaginedTarget(seed=5)
    echo.delay.set()
    step = imagined.step()
    tokens = target.propose(step.names, step.states, step.tensors, coming=step.coming, k=K, wanted=False)
    assert (tokens == -1).all()
    assert mailbox.is_waiting
    following = imagined.step()
    asked = threading.Thread(
        target=lambda: target.propose(
            following.names, following.states, following.tensors, coming=following.coming, k=K
        )
    )
    asked.start()
    time.sleep(0.05)
    # The first step's rows are still there.
    assert mailbox.word(BEGUN) == mailbox.word(DOORBELL)
    assert not echo.seen
    echo.delay.clear()
    asked.join()
    assert [seen.number for seen in echo.seen] == [1, 2]
    expected = echo.hello.projection(torch.cat([raw for *_, raw, _ in following.seen]))
    torch.testing.assert_close(echo.seen[1].features[: len(expected)], expected)


def test_proposals_that_come_later_are_those_that_come_at_once(mailbox, target, echo) -> None:
    imagined = ImaginedTarget(seed=8)
    owed = None
    for number in range(30):
        step, late = imagined.step(), number % 3 != 2
        if owed is not None:
            echo.delay.clear()
            tokens = target.collect()
            for (*_, anchor), ids in zip(owed.seen, tokens.tolist(), strict=True):
                assert ids == [anchor if anchor >= 0 else -1] * K
            expected = echo.hello.projection(torch.cat([raw for *_, raw, _ in owed.seen]))
            torch.testing.assert_close(echo.seen[-1].features[: len(expected)], expected)
            owed = None
        assert not target.is_owing
        if late:
            echo.delay.set()
        wanted = any(anchor >= 0 for *_, anchor in step.seen)
        tokens = target.propose(
            step.names, step.states, step.tensors, coming=step.coming, k=K, wanted=wanted, comes_later=late
        )
        if late:
            assert (tokens == -1).all()
            assert mailbox.is_waiting
            assert target.is_owing == wanted
            owed = step if wanted else None
            if not wanted:
                echo.delay.clear()
                eventually(lambda: not mailbox.is_waiting)
    assert (target.asked, target.passed) == (30, 0)


def test_proposals_that_are_not_collected_are_lost_with_the_next_step(mailbox, target, echo) -> None:
    imagined = ImaginedTarget(seed=8)
    first = imagined.step()
    while not any(anchor >= 0 for *_, anchor in first.seen):
        first = imagined.step()
    target.propose(first.names, first.states, first.tensors, coming=first.coming, k=K, comes_later=True)
    second = imagined.step()
    tokens = target.propose(second.names, second.states, second.tensors, coming=second.coming, k=K)
    for (*_, anchor), ids in zip(second.seen, tokens.tolist(), strict=True):
        assert ids == [anchor if anchor >= 0 else -1] * K
    assert [seen.number for seen in echo.seen] == [1, 2]
    with pytest.raises(RuntimeError, match="no proposals are to come"):
        target.collect()


def test_steps_under_way_are_answered_while_another_draft_is_offered(mailbox, target, echo, monkeypatch) -> None:
    """The projection of a large draft takes longer to write than a target waits."""
    may_write = threading.Event()

    def slow(*arguments: Any) -> None:
        assert may_write.wait(20)
        write_offer(*arguments)

    monkeypatch.setattr(mailbox_reader, "write_offer", slow)
    echo.hello = hello_of(tiny_draft(seed=1), 78, None)
    # The target knows of nothing yet, and has asked already.
    mailbox.post(control(1, [1]))
    ring(mailbox, 1, [(0, 1, 5)])
    eventually(lambda: not mailbox.is_waiting)
    eventually(lambda: not target.is_ready)
    mailbox.post(control(2, [1]))
    ring(mailbox, 2, [(1, 1, 6)])
    eventually(lambda: not mailbox.is_waiting)
    assert [asked.number for asked in echo.seen] == [1, 2]
    assert mailbox.long_word(OFFERED) == 77
    may_write.set()
    eventually(lambda: target.is_ready)
    assert mailbox.long_word(OFFERED) == 78


def test_nothing_is_asked_without_a_watchdog_a_draft_or_a_closed_breaker(mailbox, target, echo) -> None:
    step = ImaginedTarget(seed=0).step()

    def ask() -> torch.Tensor:
        return target.propose(step.names, step.states, step.tensors, coming=step.coming, k=K)

    for word, value in ((HEARTBEAT, 1), (OPEN_UNTIL, 2**63)):
        kept = mailbox.long_word(word)
        mailbox.set_long_word(word, value)
        assert (ask() == -1).all()
        mailbox.set_long_word(word, kept)
    hello, echo.hello = echo.hello, None
    eventually(lambda: not target.is_ready)
    assert (ask() == -1).all()
    assert (target.asked, target.passed) == (0, 3)
    echo.hello = hello
    eventually(lambda: target.is_ready)
    ask()
    assert target.asked == 1


def test_a_draft_of_another_target_is_not_asked(mailbox, echo) -> None:
    other = MailboxTarget(
        mailbox, HostWords(mailbox), type(SHAPE)(hidden_size=32, vocab_size=98, layer_ids=(1, 3)), CPU
    )
    other.start()
    mailbox.set_long_word(HEARTBEAT, time.monotonic_ns() + 3600 * 10**9)
    eventually(lambda: other._refused == 77)
    assert not other.is_ready
    other.close()


def test_the_breaker_opens_longer_each_time_and_stays_open_while_nobody_polls(mailbox) -> None:
    dog, second = Watchdog(mailbox, limit_s=0.1), 10**9
    now = second
    openings = []
    for number in (1, 2, 3):
        ring(mailbox, number, [(0, 1, 5)])
        dog.look(now)
        dog.look(now + second // 20)
        assert mailbox.is_waiting
        now += second // 10
        dog.look(now)
        assert not mailbox.is_waiting
        openings.append(mailbox.long_word(OPEN_UNTIL) - now)
        # Nobody polls: it stays open, and what was already under way is let go at once.
        now += 5 * second
        dog.look(now)
        assert mailbox.long_word(OPEN_UNTIL) > now
        mailbox.set_long_word(ALIVE, number)
        dog.look(now + 1)
        dog.look(now + 2)
        assert mailbox.long_word(OPEN_UNTIL) <= now + openings[-1]
        now += second
    assert openings == sorted(set(openings))
    # An answered step closes the book.
    ring(mailbox, 4, [(0, 1, 5)])
    dog.look(now)
    mailbox.release(4)
    dog.look(now + 1)
    ring(mailbox, 5, [(0, 1, 5)])
    dog.look(now + 2)
    dog.look(now + second)
    assert mailbox.long_word(OPEN_UNTIL) - (now + second) == openings[0]


def test_layouts_beyond_the_wire_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="num_speculative_tokens"):
        Mailbox.create(tmp_path / "x", Layout(max_requests=1, max_rows=1, width=1, dtype=torch.float32, max_k=256))


def test_what_a_killed_target_leaves_behind_is_cleared_away(tmp_path) -> None:
    mailbox = Mailbox.create(new_path(tmp_path), LAYOUT)
    write_offer(mailbox, hello_of(tiny_draft(), 77, None))
    assert new_path(tmp_path) != mailbox.path
    assert mailbox.path.exists()
    mailbox._owned.close()
    assert is_orphaned(mailbox.path)
    new_path(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_features_that_were_overwritten_while_they_were_read_are_forgotten(mailbox, target, echo) -> None:
    echo.delay.set()
    mailbox.post(control(1, [1]))
    ring(mailbox, 1, [(0, 1, 5)])
    eventually(lambda: mailbox.word(TAKEN) == 1)
    mailbox.release(1)
    mailbox.set_word(BEGUN, 2)
    echo.delay.clear()
    eventually(lambda: echo.forgotten == 1)
    assert (take_tokens(torch.from_numpy(mailbox.tokens), 1, 1000, -1) == -1).all()


def test_a_folder_that_others_can_write_to_is_refused(tmp_path) -> None:
    assert private_folder(tmp_path / "new").stat().st_mode & 0o777 == 0o700
    (tmp_path / "new").chmod(0o722)
    with pytest.raises(ConfigError, match="other users"):
        private_folder(tmp_path / "new")


def test_ids_beyond_the_vocabulary_are_none(mailbox) -> None:
    mailbox.answer(5, *answers([1, 96, 97, 2**31 - 1]))
    assert take_tokens(torch.from_numpy(mailbox.tokens), 5, 97, -1)[0, :4].tolist() == [1, 96, -1, -1]


def test_a_projection_that_cannot_be_read_yet_is_tried_again(mailbox, echo, monkeypatch) -> None:
    tries = []

    def read(box: Mailbox) -> Hello:
        tries.append(box)
        if len(tries) < 3:
            raise OSError("descriptors are short")
        return echo.hello

    monkeypatch.setattr("unmask.pairing.mailbox_target.read_offer", read)
    target = MailboxTarget(mailbox, HostWords(mailbox), SHAPE, CPU)
    mailbox.set_long_word(HEARTBEAT, time.monotonic_ns() + 3600 * 10**9)
    eventually(lambda: mailbox.long_word(OFFERED) == 77)
    target.start()
    eventually(lambda: target.is_ready)
    assert len(tries) == 3
    target.close()


def test_a_target_is_who_its_link_file_says_it_is(mailbox, echo, tmp_path) -> None:
    write_link_file(tmp_path / "link", LinkConfig(address=None, secret_file="s", target_digest="0f" * 32))
    sizes = (SHAPE.hidden_size, SHAPE.vocab_size, SHAPE.layer_ids)
    assert target_shape(*sizes, None).target_digest == NO_DIGEST
    shape = target_shape(*sizes, tmp_path / "link")
    echo.hello = replace(echo.hello, target_digest=b"\xf0" * 32, draft_version=78)
    mailbox.set_long_word(HEARTBEAT, time.monotonic_ns() + 3600 * 10**9)
    eventually(lambda: mailbox.long_word(OFFERED) == 78)
    # All else is there.
    eventually(lambda: mailbox.word(SERVING) == 1 and mailbox.is_guarded)
    target = MailboxTarget(mailbox, HostWords(mailbox), shape, CPU)
    target.start()
    assert not target.is_ready
    echo.hello = replace(echo.hello, target_digest=b"\x0f" * 32, draft_version=79)
    eventually(lambda: target.is_ready)
    target.close()


def test_a_late_reply_does_not_bring_back_what_was_let_go(mailbox) -> None:
    watchdog = Watchdog(mailbox, limit_s=1.0)
    start_at(mailbox, 2**32 - 2)
    mailbox.set_word(BEGUN, 2**32 - 1)
    for now_s in (10, 11):
        watchdog.look(now_s * 10**9)
    assert mailbox.word(REPLY) == 2**32 - 1
    mailbox.set_word(BEGUN, 0)
    for late_ns in (1, 2):
        watchdog.look(11 * 10**9 + late_ns)
    assert mailbox.word(REPLY) == 0
    # The draft's stream stores its answer to the step before.
    mailbox.set_word(REPLY, 2**32 - 1)
    watchdog.look(11 * 10**9 + 3)
    assert mailbox.word(REPLY) == 0
    # Half a cycle later the same number would be one that is still to come.
    start_at(mailbox, DEPTH)
    watchdog.look(12 * 10**9)
    start_at(mailbox, 2**31 + 5)
    watchdog.look(13 * 10**9)
    assert mailbox.word(REPLY) == 2**31 + 5
