from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.diffusion_tools import block_causal, random_ids, tiny
from unmask.denoiser import MaskSpec
from unmask.masking.attention import Causal, Dense, Full, dense_form, flex_form
from unmask.masking.block_causal import BlockCausal
from unmask.masking.double_stream import DoubleStream
from unmask.models.transformer import DiffusionLM

rows_of_lengths = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9)), min_size=1, max_size=4)


def square(mask: MaskSpec, num_rows: int, size: int) -> torch.Tensor:
    columns = torch.arange(size).expand(num_rows, -1)
    return dense_form(mask, columns, size)[:, 0]


@settings(max_examples=60, deadline=None)
@given(rows=rows_of_lengths, block_size=st.integers(1, 5))
def test_block_causal_is_the_rule_of_the_paper(rows: list[tuple[int, int]], block_size: int) -> None:
    prompt_lens = torch.tensor([prompt for prompt, _ in rows])
    lengths = torch.tensor([prompt + response for prompt, response in rows])
    size = int(lengths.max())
    allowed = square(BlockCausal(prompt_lens, block_size, lengths), len(rows), size)
    for row, (prompt, response) in enumerate(rows):
        rule = block_causal(prompt, block_size)
        for query in range(prompt + response):
            expected = [key < prompt + response and rule(query, key) for key in range(size)]
            assert allowed[row, query].tolist() == expected


@settings(max_examples=40, deadline=None)
@given(rows=rows_of_lengths, block_size=st.integers(1, 5))
def test_double_stream_is_noisy_own_block_clean_earlier_blocks(rows: list[tuple[int, int]], block_size: int) -> None:
    prompt_lens = torch.tensor([prompt for prompt, _ in rows])
    lengths = torch.tensor([prompt + response for prompt, response in rows])
    size = int(lengths.max())
    mask = DoubleStream(BlockCausal(prompt_lens, block_size, lengths), size)
    allowed = square(mask, len(rows), 2 * size)

    def block(row: int, column: int) -> int:
        offset = column % size - rows[row][0]
        return -1 if offset < 0 else offset // block_size

    for row in range(len(rows)):
        for query in range(2 * size):
            for key in range(2 * size):
                q, k = block(row, query), block(row, key)
                noisy_query = q == k if key < size else k < q
                expected = noisy_query if query < size else key >= size and k <= q
                expected = expected and key % size < int(lengths[row])
                assert bool(allowed[row, query, key]) == expected


def test_plain_masks() -> None:
    lengths = torch.tensor([2, 3])
    assert square(Full(), 2, 3).all()
    assert square(Full(lengths), 2, 3)[:, 0].tolist() == [[True, True, False], [True, True, True]]
    assert torch.equal(square(Causal(), 1, 4)[0], torch.ones(4, 4, dtype=torch.bool).tril())
    some = torch.rand(1, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(square(Dense(some), 2, 3), some.expand(2, 3, 3))


@pytest.mark.parametrize("prompt_len", [1, 3])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_block_cannot_change_what_comes_before_it(family: str, prompt_len: int) -> None:
    block_size, num_blocks = 3, 3
    network = tiny(family, attention="block_causal", block_size=block_size)
    length = prompt_len + block_size * num_blocks - 1
    mask = BlockCausal(torch.tensor([prompt_len]), block_size)
    ids, positions = random_ids(1, length), torch.arange(length)[None]
    with torch.inference_mode():
        before = network(ids, positions, mask=mask)
        for block in range(num_blocks):
            start = prompt_len + block * block_size
            changed = ids.clone()
            changed[0, start] = (ids[0, start] + 1) % 30
            after = network(changed, positions, mask=mask)
            assert torch.equal(after[0, :start], before[0, :start])
            assert not torch.equal(after[0, start:], before[0, start:])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["block_causal", "double_stream", "full"])
def test_flex_form_computes_what_the_dense_form_computes(kind: str) -> None:
    network = tiny("dream")
    size = 12
    blocks = BlockCausal(torch.tensor([2, 4]), 3, torch.tensor([12, 9]))
    masks: dict[str, MaskSpec] = {
        "block_causal": blocks,
        "double_stream": DoubleStream(BlockCausal(torch.tensor([2, 1]), 2, torch.tensor([6, 5])), size // 2),
        "full": Full(torch.tensor([12, 7])),
    }
    mask = masks[kind]
    ids, positions = random_ids(2, size), torch.arange(size).expand(2, -1)
    with torch.inference_mode():
        dense = network(ids, positions, mask=mask)
        network.use_flex_attention = True
        flex = network(ids, positions, mask=mask)
    torch.testing.assert_close(flex, dense, atol=1e-4, rtol=1e-4)
    assert flex_form(mask, 2, size, "cpu").shape == (2, 1, size, size)


@settings(max_examples=15, deadline=None)
@given(
    prompt_len=st.integers(1, 4),
    block_size=st.integers(1, 4),
    response=st.integers(1, 9),
    family=st.sampled_from(["llada", "dream"]),
)
def test_two_streams_show_each_block_what_a_block_by_block_decoder_shows_it(
    prompt_len: int, block_size: int, response: int, family: str
) -> None:
    network = tiny(family)
    length = prompt_len + response
    blocks = BlockCausal(torch.tensor([prompt_len]), block_size)
    clean = random_ids(1, length)
    noisy = clean.clone()
    noisy[:, prompt_len::2] = network.config.mask_id
    wanted = torch.arange(prompt_len, length)[None]
    with torch.inference_mode():
        ids, positions = DoubleStream.join(noisy, clean)
        together = network(ids, positions, mask=DoubleStream(blocks, length), logits_at=wanted)[0]
    for start in range(prompt_len, length, block_size):
        stop = min(start + block_size, length)
        row = torch.cat((clean[:, :start], noisy[:, start:stop]), dim=1)
        alone = _block_logits(network, row, blocks, start, stop)
        torch.testing.assert_close(together[start - prompt_len : stop - prompt_len], alone, atol=1e-4, rtol=1e-4)


def _block_logits(network: DiffusionLM, ids: torch.Tensor, mask: MaskSpec, start: int, stop: int) -> torch.Tensor:
    with torch.inference_mode():
        columns = torch.arange(start, stop)[None]
        return network(ids, torch.arange(stop)[None], mask=mask, logits_at=columns)[0]
