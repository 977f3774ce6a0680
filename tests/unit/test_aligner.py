from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.diffusion_tools import VOCAB, block_causal, causal, everything, random_ids, raw_rows, tiny
from unmask.masking.attention import Causal, Full
from unmask.masking.block_causal import BlockCausal
from unmask.masking.double_stream import DoubleStream
from unmask.models.transformer import DiffusionLM


def call(network: DiffusionLM, ids: torch.Tensor, mask: object, logits_at: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.inference_mode():
        return network(ids, positions, mask=mask, logits_at=logits_at)


@pytest.mark.parametrize(("family", "offset"), [("llada", 0), ("dream", 1), ("adapted", 1)])
def test_row_i_or_row_i_minus_1_predicts_column_i(family: str, offset: int) -> None:
    network = tiny(family)
    ids = random_ids(1, 9)
    wanted = torch.tensor([[8, 3, 1]])
    rows = raw_rows(network, ids[0].tolist(), everything)
    torch.testing.assert_close(call(network, ids, Full(), wanted)[0], rows[wanted[0] - offset])


@pytest.mark.parametrize("family", ["dream", "adapted"])
def test_a_shifted_causal_prediction_never_sees_its_own_column(family: str) -> None:
    network = tiny(family)
    ids = random_ids(1, 9)
    other = ids.clone()
    other[0, 5] = (ids[0, 5] + 7) % VOCAB
    wanted = torch.arange(1, 6)[None]
    torch.testing.assert_close(call(network, ids, Causal(), wanted), call(network, other, Causal(), wanted))


def test_the_tokens_under_masks_cannot_leak_into_an_unshifted_prediction() -> None:
    network = tiny("llada")
    ids = random_ids(2, 9)
    ids[1, :6] = ids[0, :6]
    ids[:, 6:] = network.config.mask_id
    logits = call(network, ids, Full(), torch.tensor([[6, 7], [6, 7]]))
    torch.testing.assert_close(logits[0], logits[1])


@pytest.mark.parametrize("family", ["llada", "dream", "adapted"])
def test_marked_and_listed_columns_agree(family: str) -> None:
    network = tiny(family)
    ids = random_ids(2, 7)
    marked = torch.zeros(2, 7, dtype=torch.bool)
    marked[0, [2, 5]] = marked[1, [1, 6]] = True
    listed = call(network, ids, Full(), torch.tensor([[2, 5], [1, 6]]))
    torch.testing.assert_close(call(network, ids, Full(), marked), listed.flatten(0, 1))


def test_column_0_has_no_predictor_in_a_shifted_network() -> None:
    marked = torch.ones(1, 4, dtype=torch.bool)
    assert call(tiny("llada"), random_ids(1, 4), Full(), marked).shape == (4, VOCAB)
    with pytest.raises(ValueError, match="column 0 has no predictor"):
        call(tiny("dream"), random_ids(1, 4), Full(), marked)


@settings(max_examples=25, deadline=None)
@given(
    prompt_len=st.integers(1, 6),
    block_size=st.integers(1, 4),
    num_blocks=st.integers(1, 4),
    cached_blocks=st.integers(0, 3),
    family=st.sampled_from(["llada", "dream"]),
)
def test_the_row_before_a_window_is_the_same_with_and_without_a_cache(
    prompt_len: int, block_size: int, num_blocks: int, cached_blocks: int, family: str
) -> None:
    network = tiny(family, attention="block_causal", block_size=block_size)
    length = prompt_len + block_size * num_blocks
    split = prompt_len + block_size * min(cached_blocks, num_blocks - 1)
    ids = random_ids(1, length)
    mask = BlockCausal(torch.tensor([prompt_len]), block_size)
    cache = network.new_cache(1, length)
    view = cache.select(torch.tensor([0]), length)
    with torch.inference_mode():
        for start, stop in ((0, split), (split, length)):
            columns = torch.arange(start, stop)[None]
            wanted = columns.clamp(min=int(network.config.shift))
            logits = network(ids[:, start:stop], columns, mask=mask, cache=view, logits_at=wanted)
            rows = raw_rows(network, ids[0].tolist(), block_causal(prompt_len, block_size))
            torch.testing.assert_close(logits[0], rows[wanted[0] - int(network.config.shift)], atol=1e-4, rtol=1e-4)


def test_a_bool_selection_is_refused_with_a_cache() -> None:
    network = tiny("dream")
    view = network.new_cache(1, 8).select(torch.tensor([0]), 8)
    ids = random_ids(1, 4)
    with pytest.raises(ValueError, match="with a cache"):
        network(ids, torch.arange(4)[None], mask=Full(), cache=view, logits_at=torch.ones(1, 4, dtype=torch.bool))


def test_in_two_streams_the_clean_column_before_a_block_predicts_its_first_token() -> None:
    prompt_len, block_size, length = 3, 2, 8
    mask = DoubleStream(BlockCausal(torch.tensor([prompt_len]), block_size), length)
    row = torch.zeros(1, dtype=torch.long)
    noisy = mask.previous(row, torch.arange(3, 8))
    assert noisy.tolist() == [length + 2, 3, length + 4, 5, length + 6]
    assert mask.previous(row, length + torch.arange(3, 8)).tolist() == (length + torch.arange(2, 7)).tolist()


def test_causal_rows_are_those_of_the_reference() -> None:
    network = tiny("causal")
    ids = random_ids(1, 6)
    wanted = torch.arange(1, 6)[None]
    rows = raw_rows(network, ids[0].tolist(), causal)
    torch.testing.assert_close(call(network, ids, Causal(), wanted)[0], rows[:-1])
