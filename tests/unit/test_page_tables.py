from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.pairing.coming_rows import ComingRows
from unmask.pairing.page_hashes import PageHashes, hash_pages
from unmask.pairing.page_pool import PagePool
from unmask.pairing.page_tables import Key, PageTables

PAGE = 4
TEXTS = [
    [1] * 40,
    [1] * 13 + [2] * 27,
    [1] * 13 + [2] * 9 + [3] * 18,
    [4] * 40,
]
"""What requests say: texts that share prefixes, as a tuple of ids their content is told apart by."""


class Simulation:
    """Tables with a pool of plain values: the value of a position is the text up to it."""

    def __init__(self, num_pages: int) -> None:
        self.tables = PageTables(num_pages, PAGE)
        self.pool: list[tuple[int, ...] | None] = [None] * (num_pages * PAGE)
        self.hashes = PageHashes(PAGE)
        self.text_of: dict[Key, list[int]] = {}
        self.stored: set[tuple[int, tuple[int, ...]]] = set()

    def step(self, rows: list[tuple[Key, int, int]], ahead: str = "never") -> list[bool]:
        """Rows (key, start, count) of one step, covered before they come or never; "in vain" they do not come."""
        hashes = [
            self.hashes.of(hash(key), start, start + count, np.array(self.text_of[key])) for key, start, count in rows
        ]
        keys = [key for key, _, _ in rows]
        starts, counts = np.array([start for _, start, _ in rows]), np.array([count for _, _, count in rows])
        slots_before = None if ahead == "never" else self.cover(keys, ComingRows(counts, starts), hashes)
        if ahead == "in vain":
            self.tables.trim(keys)
            return [True] * len(rows)
        reserved = self.tables.reserve(keys, starts, counts, hashes)
        assert slots_before is None or reserved.slots.tolist() == slots_before
        self.copy_pages()
        slots, positions = iter(reserved.slots.tolist()), iter(reserved.positions.tolist())
        for (key, _, count), keep in zip(rows, reserved.kept.tolist(), strict=True):
            for _ in range(count if keep else 0):
                position = next(positions)
                self.pool[next(slots)] = tuple(self.text_of[key][: position + 1])
        assert next(slots, None) is None
        return reserved.kept.tolist()

    def cover(self, keys: list[Key], coming: ComingRows, hashes: list[tuple[int, ...]]) -> list[int] | None:
        """Where a draft that knows of the rows would put them; None where it has to wait for them."""
        has_room = self.tables.cover(keys, coming, self.tables.pool.num_pages, hashes)
        self.copy_pages()
        if not has_room:
            return None
        table = self.tables.table(keys)
        assert table.lengths.tolist() == coming.starts.tolist()
        return [
            int(pages[position // PAGE]) * PAGE + position % PAGE
            for pages, start, count in zip(table.pages, coming.starts.tolist(), coming.most.tolist(), strict=True)
            for position in range(start, start + count)
        ]

    def copy_pages(self) -> None:
        copies = [(new, self.pool[old * PAGE : (old + 1) * PAGE]) for old, new in self.tables.take_copies()]
        for new, content in copies:
            self.pool[new * PAGE : (new + 1) * PAGE] = content

    def check(self) -> None:
        """Every position that is held has the value of its own text; no page is lost."""
        used = set()
        for key, text in self.text_of.items():
            length = self.tables.length(key)
            if length is None:
                continue
            table = self.tables.table([key])
            (gap_start, gap_end), pages = table.gaps[0].tolist(), table.pages[0].tolist()
            assert table.lengths.tolist() == [length]
            held = [p for p in range(length) if not gap_start <= p < gap_end]
            assert len(held) == self.tables.num_rows(key)
            for position in held:
                page = pages[position // PAGE]
                used.add(page)
                assert self.pool[page * PAGE + position % PAGE] == tuple(text[: position + 1])
            for end in range(PAGE, length + 1, PAGE):
                if end <= gap_start or end - PAGE >= gap_end:
                    self.stored.add((key[0], tuple(text[:end])))
        assert len(used) == self.tables.resident_pages

    def findable(self, session: int, text: list[int], start: int) -> int:
        """Positions of a prefix that a new request should find, where nothing was ever evicted."""
        end = 0
        while end + PAGE <= start and (session, tuple(text[: end + PAGE])) in self.stored:
            end += PAGE
        return end


KEYS = st.tuples(st.integers(0, 1), st.integers(0, 5))
ROWS = st.lists(st.tuples(KEYS, st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=4, unique_by=lambda r: r[0])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.one_of(ROWS, KEYS, st.integers(0, 1)), max_size=25),
    st.sampled_from([3, 9, 200]),
    st.lists(st.integers(0, 3), min_size=12, max_size=12),
    st.lists(st.sampled_from(["never", "covered", "in vain"]), min_size=25, max_size=25),
)
def test_whatever_happens_a_request_sees_its_own_context(
    program: list, num_pages: int, texts: list[int], aheads: list[str]
) -> None:
    simulation = Simulation(num_pages)
    for operation, ahead in zip(program, aheads, strict=False):
        if isinstance(operation, list):
            rows = []
            for key, how, count in operation:
                simulation.text_of.setdefault(key, TEXTS[texts[6 * key[0] + key[1]]])
                length = simulation.tables.length(key) or 0
                start = [length, length // 2, length + 3, 0][how]
                rows.append((key, start, max(0, min(count, 40 - start))))
            rows = [row for row in rows if row[1] <= 40]
            fresh = [row for row in rows if simulation.tables.length(row[0]) is None]
            expected = [simulation.findable(key[0], simulation.text_of[key], start) for key, start, _ in fresh]
            kept = dict(zip([key for key, _, _ in rows], simulation.step(rows, ahead), strict=True))
            for (key, start, _), found in zip(fresh, expected, strict=True):
                if num_pages == 200:
                    gap_start, gap_end = simulation.tables.table([key]).gaps[0].tolist()
                    # More may be found than was known before: pages of rows of the same step.
                    assert gap_end in (0, start)
                    assert gap_start >= found or gap_end == 0
            assert all(kept.values()) or num_pages < 200
        elif isinstance(operation, tuple):
            simulation.tables.free(operation)
            simulation.hashes.forget(hash(operation))
        else:
            simulation.tables.free_session(operation)
            simulation.stored = {key for key in simulation.stored if key[0] != operation}
        simulation.check()
    simulation.tables.clear()
    assert simulation.tables.pool.num_available == num_pages
    assert simulation.tables.idle_pages == 0


def started(num_pages: int, *requests: tuple[Key, int, int], text: int = 0) -> Simulation:
    simulation = Simulation(num_pages)
    for key, start, count in requests:
        simulation.text_of[key] = TEXTS[text]
        assert simulation.step([(key, start, count)]) == [True]
        simulation.check()
    return simulation


def test_a_prefix_is_found_after_its_request_has_gone() -> None:
    simulation = started(20, ((0, 1), 0, 18))
    simulation.tables.free((0, 1))
    assert simulation.tables.idle_pages == 4
    simulation.text_of |= {(0, 2): TEXTS[0], (0, 3): TEXTS[1], (1, 4): TEXTS[0]}
    simulation.step([((0, 2), 16, 5), ((0, 3), 16, 5), ((1, 4), 16, 5)])
    simulation.check()
    gaps = [simulation.tables.table([key]).gaps[0].tolist() for key in simulation.text_of if key != (0, 1)]
    # The same text, a text that parts ways after 13 ids, and another session.
    assert gaps == [[0, 0], [12, 16], [0, 16]]


def test_pages_are_shared_and_copied_before_they_change() -> None:
    simulation = started(20, ((0, 1), 0, 16), ((0, 2), 16, 4))
    assert simulation.tables.resident_pages == 5
    # The first goes back into a shared page and says something else from there.
    simulation.text_of[0, 1] = TEXTS[1]
    simulation.step([((0, 1), 13, 3)])
    simulation.check()
    assert simulation.tables.table([(0, 1)]).pages[0, 3] != simulation.tables.table([(0, 2)]).pages[0, 3]


def test_idle_pages_go_before_requests() -> None:
    simulation = started(6, ((0, 1), 0, 8), ((0, 2), 0, 4))
    simulation.tables.free((0, 1))
    simulation.text_of[0, 3] = TEXTS[3]
    assert simulation.step([((0, 3), 0, 20)]) == [True]
    assert simulation.tables.length((0, 2)) == 4
    assert simulation.tables.idle_pages == 0
    simulation.check()


def test_a_second_gap_gives_up_what_lies_between() -> None:
    simulation = started(20, ((0, 1), 0, 6), ((0, 1), 9, 5))
    assert simulation.tables.table([(0, 1)]).gaps.tolist() == [[6, 9]]
    simulation.step([((0, 1), 20, 2)])
    simulation.check()
    assert simulation.tables.table([(0, 1)]).gaps.tolist() == [[6, 20]]
    assert simulation.tables.num_rows((0, 1)) == 8
    simulation.step([((0, 1), 3, 2)])
    assert simulation.tables.table([(0, 1)]).gaps.tolist() == [[0, 0]]
    simulation.check()


def test_hashes_are_told_once_and_again_after_a_restart() -> None:
    hashes, tokens = PageHashes(PAGE), np.array(TEXTS[1])
    chain = tuple(hash_pages(tokens, PAGE))
    assert hashes.of(7, 0, 9, tokens) == chain[:2]
    assert hashes.of(7, 9, 11, tokens) == ()
    assert hashes.of(7, 11, 17, tokens) == chain[2:4]
    assert hashes.of(7, 8, 17, tokens) == chain[:4]
    assert hashes.of(8, 8, 17, tokens) == chain[:4]
    hashes.forget(7)
    assert hashes.of(7, 17, 20, tokens) == chain[:5]
    shared = [a == b for a, b in zip(chain, hash_pages(np.array(TEXTS[0]), PAGE), strict=True)]
    assert shared == [True] * 3 + [False] * 7
    assert len(set(chain)) == len(chain)


def test_a_pool_gives_each_page_once() -> None:
    pool = PagePool(3)
    pages = [pool.take() for _ in range(3)]
    assert sorted(pages) == [0, 1, 2]
    assert pool.num_available == 0
    pool.register(pages[0], (0, 5))
    pool.register(pages[1], (0, 5))
    assert pool.share((0, 5)) == pages[0]
    assert [pool.is_fixed(page) for page in pages] == [True, False, False]
    pool.release(pages[0])
    pool.release(pages[0])
    assert (pool.num_available, pool.num_idle) == (1, 1)
    assert pool.take() == pages[0]
    assert pool.share((0, 5)) is None
    assert pool.share((1, 5)) is None


@pytest.mark.parametrize("num_pages", [1, 2])
def test_a_request_larger_than_the_pool_drives_nobody_out(num_pages: int) -> None:
    simulation = started(num_pages, ((0, 1), 0, 1))
    simulation.text_of[0, 2] = TEXTS[0]
    assert simulation.step([((0, 2), 0, 9)]) == [False]
    assert simulation.tables.length((0, 1)) == 1


def test_pages_that_were_covered_are_those_that_rows_are_put_into() -> None:
    """Whatever share of the covered rows comes, and with the requests of others in between."""
    rng = random.Random(4)
    covered, plain = PageTables(64, 4), PageTables(64, 4)
    keys = [(0, i) for i in range(5)]
    starts = np.zeros(5, dtype=np.int64)
    for _ in range(40):
        counts = np.array([rng.randint(1, 6) for _ in keys])
        assert covered.cover(keys, ComingRows.following([6] * 5), 64) == starts.all()
        for tables in (covered, plain):
            reserved = tables.reserve(keys, starts, counts)
            assert reserved.kept.all()
        assert (covered.lengths(keys) == starts + counts).all()
        starts = starts + counts
        if starts.max() > 40:
            victim = rng.randrange(5)
            for tables in (covered, plain):
                tables.free(keys[victim])
            starts[victim] = 0
            assert not covered.cover(keys, ComingRows.following([6] * 5), 64)
    held = [key for key in keys if covered.length(key)]
    pages = [page for key in held for page in covered.table([key]).pages[0, : -(-covered.length(key) // 4)].tolist()]
    assert len(set(pages)) == len(pages) > 8


def test_only_a_request_of_its_own_pages_is_covered() -> None:
    tables = PageTables(3, 4)
    tables.reserve([(0, 1)], np.array([0]), np.array([6]))
    assert tables.cover([(0, 1)], ComingRows.following([6]), 3)
    assert not tables.cover([(0, 1)], ComingRows.following([7]), 3)
    assert not tables.cover([(0, 1)], ComingRows.following([6]), 2)
    assert not tables.cover([(0, 2)], ComingRows.following([1]), 3)
    tables.reserve([(0, 1)], np.array([5]), np.array([0]))
    assert not tables.cover([(0, 1)], ComingRows.following([1]), 3)
    # Where it says where it begins, it is placed.
    assert tables.cover([(0, 1)], ComingRows(np.array([1]), np.array([5])), 3)
    assert tables.cover([(0, 2)], ComingRows(np.array([1]), np.array([0])), 3)
    assert not tables.cover([(0, 2)], ComingRows(np.array([13]), np.array([0])), 3)


@pytest.mark.parametrize("start", [3, 4, 70])
def test_rows_that_did_not_come_leave_a_gap_that_holds_no_page(start: int) -> None:
    simulation = Simulation(40)
    simulation.text_of[0, 1] = [5] * 90
    simulation.step([((0, 1), start, 9)], "in vain")
    assert (simulation.tables.num_rows((0, 1)), simulation.tables.resident_pages) == (0, 0)
    simulation.check()
    assert simulation.step([((0, 1), start, 1)]) == [True]
    simulation.check()


def test_a_request_that_went_back_into_its_gap_holds_no_page() -> None:
    tables = PageTables(3, 4)
    tables.reserve([(0, 1)], np.array([3]), np.array([1]))
    assert tables.resident_pages == 1
    tables.reserve([(0, 1)], np.array([2]), np.array([0]))
    assert (tables.length((0, 1)), tables.num_rows((0, 1)), tables.resident_pages) == (2, 0, 0)
    tables.reserve([(0, 1)], np.array([2]), np.array([5]))
    assert (tables.num_rows((0, 1)), tables.resident_pages) == (5, 2)


def test_what_was_covered_in_vain_is_given_back() -> None:
    tables = PageTables(128, 4)
    tables.reserve([(0, 1)], np.array([0]), np.array([160]))
    assert tables.cover([(0, 1)], ComingRows.following([200]), 128)
    assert tables.resident_pages == 90
    # A gap, in place of the rows that were to come.
    tables.reserve([(0, 1)], np.array([163]), np.array([2]))
    assert tables.resident_pages == 42
    assert tables.cover([(0, 1)], ComingRows.following([20]), 128)
    tables.trim([(0, 1), (0, 9)])
    assert tables.resident_pages == 42
    assert not tables.cover([(0, 1)], ComingRows.following([900]), 128)
    assert tables.resident_pages == 42
    tables.free((0, 1))
    assert tables.resident_pages == 0
