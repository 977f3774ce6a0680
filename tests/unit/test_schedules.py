from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.diffusion_tools import MASK, random_ids
from unmask.masking.schedules import View, monotone_block_noise, semi_autoregressive_views, uniform_noise

rows_of_lengths = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 20)), min_size=1, max_size=5)
Rows = list[tuple[int, int]]


def batch(rows: Rows, size: int = 26) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    prompt_lens = torch.tensor([prompt for prompt, _ in rows])
    return random_ids(len(rows), size), prompt_lens, prompt_lens + torch.tensor([response for _, response in rows])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def views(rows: Rows, block_size: int | None, seed: int = 0) -> tuple[View, View]:
    ids, prompt_lens, lengths = batch(rows)
    return semi_autoregressive_views(
        ids, prompt_lens, lengths, block_size=block_size, mask_id=MASK, generator=seeded(seed)
    )


@settings(max_examples=150, deadline=None)
@given(rows=rows_of_lengths, block_size=st.integers(1, 7), seed=st.integers(0, 10_000))
def test_views_split_one_segment_and_hide_its_future(rows: Rows, block_size: int, seed: int) -> None:
    ids, _, _ = batch(rows)
    first, second = views(rows, block_size, seed)
    for row, (prompt, response) in enumerate(rows):
        length = prompt + response
        one, two = (view.loss_BT[row].nonzero().flatten().tolist() for view in (first, second))
        assert not set(one) & set(two)
        active = sorted(one + two)
        whole = response // block_size
        starts = [prompt + n * block_size for n in range(whole + 1)]
        segments = [list(range(start, min(start + block_size, length))) for start in starts]
        assert active in segments
        stop = active[-1] + 1 if active else length
        for view, loss in ((first, one), (second, two)):
            masked = (view.ids_BT[row] == MASK).nonzero().flatten().tolist()
            assert masked == sorted(loss + list(range(stop, length)))
            kept = view.ids_BT[row] != MASK
            assert torch.equal(view.ids_BT[row][kept], ids[row][kept])


def test_every_segment_is_drawn_the_remainder_and_the_empty_one_too() -> None:
    rows = [(2, 10)] * 400 + [(2, 8)] * 400
    first, second = views(rows, 4)
    active = (first.loss_BT | second.loss_BT).sum(1)
    begins = (first.loss_BT | second.loss_BT).long().argmax(1)
    drawn = {(int(a), int(b)) for a, b in zip(active[:400], begins[:400], strict=True)}
    assert drawn == {(4, 2), (4, 6), (2, 10)}
    assert set(active[400:].tolist()) == {4, 0}
    shares = [(begins[:400] == start).float().mean().item() for start in (2, 6, 10)]
    assert all(abs(share - 1 / 3) < 0.1 for share in shares)


def test_half_of_the_segment_falls_into_each_view() -> None:
    first, _ = views([(1, 20)] * 500, None)
    assert abs(first.loss_BT.float().sum().item() / (500 * 20) - 0.5005) < 0.02


def test_without_blocks_the_whole_response_is_active() -> None:
    first, second = views([(3, 15), (1, 0)], None)
    assert (first.loss_BT | second.loss_BT)[0].nonzero().flatten().tolist() == list(range(3, 18))
    assert not (first.loss_BT | second.loss_BT)[1].any()


@settings(max_examples=50, deadline=None)
@given(rows=rows_of_lengths, other=st.tuples(st.integers(1, 6), st.integers(0, 20)), seed=st.integers(0, 1000))
def test_a_row_is_masked_alike_whatever_the_other_rows_are(rows: Rows, other: tuple[int, int], seed: int) -> None:
    changed = [rows[0]] + [other] * (len(rows) - 1)
    ids, prompt_lens, lengths = batch(rows)
    _, prompt_lens_2, lengths_2 = batch(changed)
    for one, two in zip(views(rows, 4, seed), views(changed, 4, seed), strict=True):
        assert torch.equal(one.loss_BT[0], two.loss_BT[0])
        assert torch.equal(one.ids_BT[0], two.ids_BT[0])
    for process in (
        lambda p, n: uniform_noise(ids, p, n, mask_id=MASK, generator=seeded(seed)),
        lambda p, n: monotone_block_noise(ids, p, n, block_size=4, mask_id=MASK, generator=seeded(seed)),
    ):
        assert torch.equal(process(prompt_lens, lengths).ids_BT[0], process(prompt_lens_2, lengths_2).ids_BT[0])


@settings(max_examples=100, deadline=None)
@given(
    rows=rows_of_lengths,
    block_size=st.integers(1, 25),
    top=st.sampled_from([0.7, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_block_noise_is_monotone_bounded_and_spares_the_prompt(
    rows: Rows, block_size: int, top: float, seed: int
) -> None:
    ids, prompt_lens, lengths = batch(rows)
    noisy = monotone_block_noise(
        ids, prompt_lens, lengths, block_size=block_size, mask_id=MASK, generator=seeded(seed), top=top
    )
    assert torch.equal(noisy.ids_BT == MASK, noisy.masked_BT)
    for row, (prompt, response) in enumerate(rows):
        assert not noisy.masked_BT[row, :prompt].any()
        assert not noisy.masked_BT[row, prompt + response :].any()
        levels = noisy.noise_BT[row, prompt : prompt + response]
        for start in range(0, response, block_size):
            assert len(set(levels[start : start + block_size].tolist())) == 1
        assert (levels.diff() >= 0).all()
        assert ((levels >= 0.2) & (levels <= top + 1e-6)).all()


def test_block_noise_has_the_means_of_the_paper() -> None:
    ids, prompt_lens, lengths = batch([(2, 24)] * 4000)
    noisy = monotone_block_noise(ids, prompt_lens, lengths, block_size=3, mask_id=MASK, generator=seeded(0))
    assert abs(noisy.noise_BT[:, 2].mean().item() - 0.45) < 0.01
    assert abs(noisy.noise_BT[:, 25].mean().item() - 0.575) < 0.01
    hidden = noisy.masked_BT[:, 2:26].float().mean(0)
    assert torch.allclose(hidden, noisy.noise_BT[:, 2:26].mean(0), atol=0.05)


def test_uniform_noise_masks_each_row_at_its_own_rate() -> None:
    rows = [(2, 24)] * 3000
    ids, prompt_lens, lengths = batch(rows)
    noisy = uniform_noise(ids, prompt_lens, lengths, mask_id=MASK, generator=seeded(0))
    rates, shares = noisy.noise_BT[:, 5], noisy.masked_BT[:, 2:26].float().mean(1)
    assert rates.min() >= 1e-3
    assert abs(rates.mean().item() - 0.5) < 0.02
    assert (rates - shares).abs().mean() < 0.1
    assert not noisy.masked_BT[:, :2].any()
