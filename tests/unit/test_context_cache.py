from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.errors import ConfigError
from unmask.pairing.context_cache import ContextCache, Key

LAYERS, HEADS, HEAD_DIM, PAGE = 2, 1, 2, 4
PAGE_BYTES = 2 * LAYERS * PAGE * HEADS * HEAD_DIM * 4


def new_cache(num_pages: int) -> ContextCache:
    return ContextCache(
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_dim=HEAD_DIM,
        dtype=torch.float32,
        device=torch.device("cpu"),
        memory_mb=(num_pages * PAGE_BYTES + 0.5) / 2**20,
        page_size=PAGE,
    )


def content(stamps: list[int]) -> torch.Tensor:
    """Rows [L, T, heads, d] that are told apart by a number."""
    layer = torch.arange(LAYERS).view(-1, 1, 1, 1) * 1000.0
    return layer + torch.tensor(stamps, dtype=torch.float32).view(1, -1, 1, 1).expand(LAYERS, -1, HEADS, HEAD_DIM)


def put(cache: ContextCache, rows: list[tuple[Key, int, list[int]]]) -> list[bool]:
    """Reserve and write the rows (key, start, numbers) of one step."""
    starts = np.array([start for _, start, _ in rows], dtype=np.int64)
    counts = np.array([len(stamps) for _, _, stamps in rows], dtype=np.int64)
    reserved = cache.reserve([key for key, _, _ in rows], starts, counts)
    kept = reserved.kept.tolist()
    stamps = [s for (_, _, ns), keep in zip(rows, kept, strict=True) if keep for s in ns]
    positions = [start + i for (_, start, ns), keep in zip(rows, kept, strict=True) if keep for i in range(len(ns))]
    assert reserved.positions.tolist() == positions
    cache.write(torch.from_numpy(reserved.slots), content(stamps), -content(stamps))
    return kept


def held(cache: ContextCache, key: Key) -> list[int] | None:
    """What the cache holds of a request, through `gather`."""
    if cache.length(key) is None:
        return None
    keys, values, lengths = cache.gather([key])
    assert torch.equal(keys, -values) or keys.numel() == 0
    assert torch.equal(keys[1][:, : lengths[0]], keys[0][:, : lengths[0]] + 1000)
    return keys[0, 0, : lengths[0], 0, 0].int().tolist()


class Reference:
    """The same rules on lists, page by page counted."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.lists: OrderedDict[Key, list[int]] = OrderedDict()

    def pages(self, key: Key) -> int:
        return -(-len(self.lists[key]) // PAGE)

    def put(self, rows: list[tuple[Key, int, list[int]]]) -> list[bool]:
        named = [key for key, _, _ in rows if key in self.lists]
        for key in named:
            self.lists.move_to_end(key)
        busy = set(named)
        kept = []
        for key, start, stamps in rows:
            old = self.lists.pop(key, [])
            new = old[:start] + stamps
            needed = -(-len(new) // PAGE)
            kept.append(start <= len(old) and needed <= self.num_pages and self.make_room(needed, busy))
            if kept[-1]:
                self.lists[key] = new
                busy.add(key)
        return kept

    def make_room(self, needed: int, busy: set[Key]) -> bool:
        while sum(map(self.pages, self.lists)) + needed > self.num_pages:
            idle = [key for key in self.lists if key not in busy]
            if not idle:
                return False
            del self.lists[idle[0]]
        return True


KEYS = st.tuples(st.integers(0, 1), st.integers(0, 4))


@st.composite
def programs(draw: st.DrawFn) -> list:
    put_rows = st.lists(st.tuples(KEYS, st.integers(0, 3), st.integers(0, 9)), max_size=4, unique_by=lambda r: r[0])
    operations = st.one_of(put_rows, KEYS, st.sampled_from(["close 0", "close 1"]))
    return draw(st.lists(operations, max_size=25))


@settings(max_examples=300, deadline=None)
@given(programs(), st.integers(1, 9))
def test_cache_equals_lists(program: list, num_pages: int) -> None:
    cache, reference = new_cache(num_pages), Reference(num_pages)
    assert cache.num_pages == num_pages
    stamp = 0
    for operation in program:
        if isinstance(operation, list):
            rows = []
            for key, how, count in operation:
                length = len(reference.lists.get(key, []))
                start = [length, length // 2, length + 1, 0][how]
                rows.append((key, start, list(range(stamp, stamp + count))))
                stamp += count
            assert put(cache, rows) == reference.put(rows)
        elif isinstance(operation, tuple):
            cache.free(operation)
            reference.lists.pop(operation, None)
        else:
            session = int(operation[-1])
            cache.free_session(session)
            for key in [key for key in reference.lists if key[0] == session]:
                del reference.lists[key]
        assert len(cache) == len(reference.lists)
        for key in [(s, r) for s in range(2) for r in range(5)]:
            assert held(cache, key) == reference.lists.get(key)
        assert cache.resident_pages == sum(map(reference.pages, reference.lists))


def test_gather_pads_to_the_longest() -> None:
    cache = new_cache(8)
    put(cache, [((0, 1), 0, [1]), ((0, 2), 0, [2, 3, 4, 5, 6]), ((0, 3), 0, [])])
    keys, _, lengths = cache.gather([(0, 2), (0, 3), (0, 1)])
    assert keys.shape == (LAYERS, 3, 2 * PAGE, HEADS, HEAD_DIM)
    assert lengths.tolist() == [5, 0, 1]
    assert keys[0, 0, :5, 0, 0].tolist() == [2, 3, 4, 5, 6]
    assert keys[0, 2, 0, 0, 0] == 1


def test_a_gap_lasts_until_the_request_starts_over() -> None:
    cache = new_cache(8)
    assert put(cache, [((0, 1), 0, [1, 2])]) == [True]
    assert put(cache, [((0, 1), 3, [3])]) == [False]
    assert put(cache, [((0, 1), 2, [3])]) == [False]
    assert put(cache, [((0, 1), 0, [7])]) == [True]
    assert held(cache, (0, 1)) == [7]


def test_a_request_larger_than_the_pool_drives_nobody_out() -> None:
    cache = new_cache(2)
    put(cache, [((0, 1), 0, [1])])
    assert put(cache, [((0, 2), 0, list(range(9)))]) == [False]
    assert held(cache, (0, 1)) == [1]


def test_non_finite_rows_stay_in_their_request() -> None:
    cache = new_cache(2)
    reserved = cache.reserve([(0, 1)], np.array([0]), np.array([4]))
    cache.write(torch.from_numpy(reserved.slots), content([1] * 4) * torch.inf, content([1] * 4) * torch.nan)
    cache.free((0, 1))
    put(cache, [((0, 2), 0, [5])])
    keys, values, _ = cache.gather([(0, 2)])
    assert keys.isfinite().all()
    assert values.isfinite().all()


def test_a_pool_without_a_page_is_refused() -> None:
    with pytest.raises(ConfigError, match="draft_memory_mb"):
        new_cache(0)
