from __future__ import annotations

import numpy as np
import pytest
import torch

from unmask.errors import ConfigError
from unmask.pairing.context_cache import ContextCache
from unmask.pairing.page_tables import Key

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


def put(cache: ContextCache, rows: list[tuple[Key, int, list[int]]], hashes: list | None = None) -> list[bool]:
    """Reserve and write the rows (key, start, numbers) of one step."""
    starts = np.array([start for _, start, _ in rows], dtype=np.int64)
    counts = np.array([len(stamps) for _, _, stamps in rows], dtype=np.int64)
    reserved = cache.reserve([key for key, _, _ in rows], starts, counts, hashes)
    kept = reserved.kept.tolist()
    stamps = [s for (_, _, ns), keep in zip(rows, kept, strict=True) if keep for s in ns]
    cache.write(torch.from_numpy(reserved.slots), content(stamps), -content(stamps))
    return kept


def held(cache: ContextCache, key: Key) -> list[int]:
    """What the cache holds of a request, through `gather`."""
    table = cache.tables.table([key])
    keys, values = cache.gather(table)
    assert torch.equal(keys, -values)
    assert torch.equal(keys[1][:, : table.lengths[0]], keys[0][:, : table.lengths[0]] + 1000)
    return keys[0, 0, : table.lengths[0], 0, 0].int().tolist()


def test_gather_pads_to_the_longest() -> None:
    cache = new_cache(8)
    put(cache, [((0, 1), 0, [1]), ((0, 2), 0, [2, 3, 4, 5, 6]), ((0, 3), 0, [])])
    table = cache.tables.table([(0, 2), (0, 3), (0, 1)])
    keys, _ = cache.gather(table)
    assert keys.shape == (LAYERS, 3, 2 * PAGE, HEADS, HEAD_DIM)
    assert table.lengths.tolist() == [5, 0, 1]
    assert keys[0, 0, :5, 0, 0].tolist() == [2, 3, 4, 5, 6]
    assert keys[0, 2, 0, 0, 0] == 1


def test_a_request_that_goes_back_says_something_else_from_there() -> None:
    cache = new_cache(8)
    put(cache, [((0, 1), 0, [1, 2, 3, 4, 5, 6])])
    put(cache, [((0, 1), 3, [7, 8])])
    assert held(cache, (0, 1)) == [1, 2, 3, 7, 8]


def test_a_shared_page_is_copied_with_its_content() -> None:
    cache = new_cache(8)
    put(cache, [((0, 1), 0, [1, 2, 3, 4, 5])], [[11]])
    put(cache, [((0, 2), 4, [6])], [[11]])
    assert held(cache, (0, 2)) == [1, 2, 3, 4, 6]
    put(cache, [((0, 1), 2, [9])])
    assert held(cache, (0, 1)) == [1, 2, 9]
    assert held(cache, (0, 2)) == [1, 2, 3, 4, 6]


def test_non_finite_rows_stay_in_their_request() -> None:
    cache = new_cache(2)
    reserved = cache.reserve([(0, 1)], np.array([0]), np.array([4]))
    cache.write(torch.from_numpy(reserved.slots), content([1] * 4) * torch.inf, content([1] * 4) * torch.nan)
    cache.tables.free((0, 1))
    put(cache, [((0, 2), 0, [5])])
    keys, values = cache.gather(cache.tables.table([(0, 2)]))
    assert keys.isfinite().all()
    assert values.isfinite().all()


def test_a_pool_without_a_page_is_refused() -> None:
    with pytest.raises(ConfigError, match="draft_memory_mb"):
        new_cache(0)
