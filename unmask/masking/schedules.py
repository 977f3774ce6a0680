"""Forward (masking) processes: which response tokens are hidden, and with what probability.

Every function works on whole batches and row by row: no row's mask depends on another row. A row is a prompt of
`prompt_lens` tokens, its response up to `lengths` (EOS padding that is to be learned included), then dead columns.
The prompt is never masked. Dimension letters: B rows, T columns, N blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Noisy:
    """A masked batch. Loss positions are where `masked_BT` is true."""

    ids_BT: torch.Tensor
    masked_BT: torch.Tensor
    noise_BT: torch.Tensor
    """Float32: the probability with which each response column was masked; 1 outside of responses."""


@dataclass(frozen=True, slots=True)
class View:
    """One of two complementary inputs. The future of the active segment is masked too but not in the loss."""

    ids_BT: torch.Tensor
    loss_BT: torch.Tensor


def uniform_noise(
    ids_BT: torch.Tensor,
    prompt_lens_B: torch.Tensor,
    lengths_B: torch.Tensor,
    *,
    mask_id: int,
    generator: torch.Generator,
    epsilon: float = 1e-3,
) -> Noisy:
    """LLaDA's process (arXiv 2502.09992): t ~ U(0, 1) a row, every response token masked with p = (1 - eps) t + eps."""
    time_B1 = torch.rand(len(ids_BT), 1, generator=generator, device=ids_BT.device)
    noise_BT = ((1 - epsilon) * time_B1 + epsilon).expand(ids_BT.shape)
    return _mask(ids_BT, prompt_lens_B, lengths_B, noise_BT, mask_id, generator)


def monotone_block_noise(
    ids_BT: torch.Tensor,
    prompt_lens_B: torch.Tensor,
    lengths_B: torch.Tensor,
    *,
    block_size: int,
    mask_id: int,
    generator: torch.Generator,
    low: float = 0.2,
    high: float = 0.7,
    top: float = 0.7,
) -> Noisy:
    """D2F's process (arXiv 2508.09192, section 3.2): later blocks are at least as noisy as earlier ones.

    A row of N blocks draws p_1 ~ U[low, high], then p_j = p_{j-1} + U(0, 1) (top - p_1) / (N - 1), so p_N <= top.
    A `top` of 1 lets late blocks come as near to fully masked as decoding starts them.
    """
    device = ids_BT.device
    num_rows, num_columns = ids_BT.shape
    offset_BT = torch.arange(num_columns, device=device) - prompt_lens_B[:, None]
    block_BT = torch.div(offset_BT.clamp(min=0), block_size, rounding_mode="floor")
    num_blocks_B1 = torch.div(lengths_B - prompt_lens_B + block_size - 1, block_size, rounding_mode="floor")[:, None]
    most_blocks = -(-num_columns // block_size)
    first_B1 = low + (high - low) * torch.rand(num_rows, 1, generator=generator, device=device)
    steps_BN = torch.rand(num_rows, most_blocks, generator=generator, device=device)
    steps_BN = steps_BN * (top - first_B1).clamp(min=0) / (num_blocks_B1 - 1).clamp(min=1)
    steps_BN[:, 0] = 0
    noise_BN = (first_B1 + steps_BN.cumsum(1)).clamp(max=max(high, top))
    return _mask(ids_BT, prompt_lens_B, lengths_B, noise_BN.gather(1, block_BT), mask_id, generator)


def semi_autoregressive_views(
    ids_BT: torch.Tensor,
    prompt_lens_B: torch.Tensor,
    lengths_B: torch.Tensor,
    *,
    block_size: int | None,
    mask_id: int,
    generator: torch.Generator,
    ratio: float = 0.5,
    ratio_top: float | None = None,
    text_lens_B: torch.Tensor | None = None,
    epsilon: float = 1e-3,
) -> tuple[View, View]:
    """dParallel's process (arXiv 2509.26488, section 4.1): what a semi-autoregressive decoder sees inside a block.

    Each row draws n ~ U{0 .. K} with K = floor(response / block_size), inclusive; its active segment is block n, or
    the remainder (maybe empty) for n = K. Active tokens fall into S with probability q = (1 - eps) ratio + eps. View
    1 masks S, view 2 the rest of the segment; both mask everything after it. So each active token is in the loss of
    exactly one view.

    Args:
        block_size: None makes the whole response active, as for Dream: an AR-initialised model slides back to
            left-to-right decoding otherwise.
        ratio_top: draw each row's ratio from U[ratio, ratio_top]: near 1 a view shows a segment of which nothing is
            known yet, as every block is when its decoding begins. None is the published single ratio.
        text_lens_B: draw among the segments that hold text alone, prompt + response with its EOS being this long;
            decoding ends before the others. None draws among all, as published.
    """
    device = ids_BT.device
    column_T = torch.arange(ids_BT.shape[1], device=device)
    draw_B = torch.rand(len(ids_BT), generator=generator, device=device)
    start_B, stop_B = prompt_lens_B, lengths_B
    if block_size is not None:
        num_whole_B = torch.div(lengths_B - prompt_lens_B, block_size, rounding_mode="floor")
        last_B = num_whole_B
        if text_lens_B is not None:
            last_B = torch.div((text_lens_B - prompt_lens_B - 1).clamp(min=0), block_size, rounding_mode="floor")
        chosen_B = (draw_B * (last_B + 1)).long().clamp(max=last_B)
        start_B = prompt_lens_B + chosen_B * block_size
        stop_B = torch.where(chosen_B == num_whole_B, lengths_B, start_B + block_size)
    active_BT = (column_T >= start_B[:, None]) & (column_T < stop_B[:, None])
    future_BT = (column_T >= stop_B[:, None]) & (column_T < lengths_B[:, None])
    share_B1 = torch.full((len(ids_BT), 1), ratio, device=device)
    if ratio_top is not None:
        share_B1 += (ratio_top - ratio) * torch.rand(len(ids_BT), 1, generator=generator, device=device)
    chance = (1 - epsilon) * share_B1 + epsilon
    chosen_BT = torch.rand(ids_BT.shape, generator=generator, device=device) < chance
    first_BT, second_BT = active_BT & chosen_BT, active_BT & ~chosen_BT
    return (
        View(ids_BT.masked_fill(first_BT | future_BT, mask_id), first_BT),
        View(ids_BT.masked_fill(second_BT | future_BT, mask_id), second_BT),
    )


def _mask(
    ids_BT: torch.Tensor,
    prompt_lens_B: torch.Tensor,
    lengths_B: torch.Tensor,
    noise_BT: torch.Tensor,
    mask_id: int,
    generator: torch.Generator,
) -> Noisy:
    column_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    response_BT = (column_T >= prompt_lens_B[:, None]) & (column_T < lengths_B[:, None])
    draws_BT = torch.rand(ids_BT.shape, generator=generator, device=ids_BT.device)
    masked_BT = response_BT & (draws_BT < noise_BT)
    return Noisy(ids_BT.masked_fill(masked_BT, mask_id), masked_BT, noise_BT.where(response_BT, 1.0))
