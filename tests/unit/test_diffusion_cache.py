from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.diffusion_tools import random_ids, tiny
from unmask.masking.attention import Causal, Full
from unmask.models.cache import KVCache


def new_cache(num_rows: int = 2, capacity: int = 8, boundary: bool = True) -> KVCache:
    return KVCache(
        num_layers=1, num_rows=num_rows, capacity=capacity, num_kv_heads=1, head_dim=2, hidden_size=3,
        boundary=boundary, dtype=torch.float32, device="cpu",
    )  # fmt: skip


def test_a_window_may_append_overwrite_and_straddle_but_leave_no_gap() -> None:
    cache = new_cache()
    cache.extend(0, 0, 3)
    cache.extend(0, 3, 5)
    cache.extend(0, 1, 2)
    assert (cache.length(0), cache.length(1)) == (5, 0)
    cache.extend(0, 4, 7)
    assert cache.length(0) == 7
    with pytest.raises(ValueError, match="leaves a gap after 0"):
        cache.extend(1, 1, 2)
    with pytest.raises(ValueError, match="capacity of 8"):
        cache.extend(0, 7, 9)


def test_cropped_columns_must_be_written_again() -> None:
    cache = new_cache()
    cache.extend(0, 0, 6)
    cache.crop(0, 4)
    cache.crop(0, 5)
    assert cache.length(0) == 4
    with pytest.raises(ValueError, match="leaves a gap after 4"):
        cache.extend(0, 5, 6)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_scatter_puts_every_column_in_its_place(data: st.DataObject) -> None:
    cache = new_cache(num_rows=3)
    mirror = torch.zeros(3, 8, 1, 2)
    for value in range(1, data.draw(st.integers(1, 4)) + 1):
        rows = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))
        starts = torch.tensor([data.draw(st.integers(0, 5)) for _ in rows])
        columns = starts[:, None] + torch.arange(3)
        content = value + torch.rand(len(rows), 3, 1, 2, generator=torch.Generator().manual_seed(value))
        view = cache.select(torch.tensor(rows), num_keys=8)
        keys, values = view.scatter(0, columns, content, -content)
        for index, row in enumerate(rows):
            mirror[row, columns[index]] = content[index]
            assert torch.equal(keys[index], mirror[row])
            assert torch.equal(values[index], -mirror[row])


def test_the_scratch_row_and_column_take_padding() -> None:
    cache = new_cache(num_rows=1)
    view = cache.select(torch.tensor([0, 1]), num_keys=4)
    columns = torch.tensor([[0, 8], [0, 8]])
    keys, _ = view.scatter(0, columns, torch.ones(2, 2, 1, 2), torch.ones(2, 2, 1, 2))
    assert keys[0].sum().item() == 2
    assert cache.keys[0, 0, 1:8].abs().sum().item() == 0


def test_only_shifted_networks_pay_for_hidden_states() -> None:
    assert tiny("llada").new_cache(1, 4).hidden is None
    assert tiny("dream").new_cache(1, 4).hidden is not None
    with pytest.raises(ValueError, match="boundary=True"):
        new_cache(boundary=False).select(torch.tensor([0]), 4).gather_hidden(torch.tensor([[0]]))


def test_memory_is_what_the_sizes_say() -> None:
    cache = tiny("dream").new_cache(num_rows=3, capacity=9)
    assert cache.num_bytes == 4 * (2 * 2 * 4 * 10 * 2 * 8 + 4 * 10 * 32)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_feeding_a_row_piece_by_piece_equals_feeding_it_whole(family: str) -> None:
    network = tiny(family)
    ids = random_ids(2, 12)
    cache = network.new_cache(num_rows=4, capacity=16)
    view = cache.select(torch.tensor([2, 0]), num_keys=14)
    with torch.inference_mode():
        whole = network(ids, torch.arange(12).expand(2, -1), mask=Causal())
        for start, stop in ((0, 5), (5, 6), (6, 12)):
            columns = torch.arange(start, stop).expand(2, -1)
            piece = network(ids[:, start:stop], columns, mask=Causal(), cache=view)
            torch.testing.assert_close(piece, whole[:, start:stop], atol=1e-4, rtol=1e-4)


def test_a_refed_window_replaces_what_was_there() -> None:
    network = tiny("llada")
    ids, other = random_ids(1, 10, seed=0), random_ids(1, 10, seed=1)
    view = network.new_cache(1, 10).select(torch.tensor([0]), 10)
    columns = torch.arange(10)[None]
    with torch.inference_mode():
        network(other, columns, mask=Full(), cache=view)
        refed = network(ids, columns, mask=Full(), cache=view)
        torch.testing.assert_close(refed, network(ids, columns, mask=Full()), atol=1e-4, rtol=1e-4)
