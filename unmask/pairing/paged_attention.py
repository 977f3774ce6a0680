"""Attention of draft blocks over paged context: the reference that gathers pages, for tests and CPUs.

Dimension letters: B requests, Q block rows, N query heads, M key heads, d head size, P slots of the pool,
W page-table columns. A row attends to the context that its request holds and to every row of its own block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.masking.anchored import context_mask


def gathered_attention(
    queries: Tensor,
    block_keys: Tensor,
    block_values: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    lengths: Tensor,
    gaps: Tensor,
    page_size: int,
) -> Tensor:
    """Attend blocks to the context that page tables name.

    Args:
        queries: [B, Q, N, d], rotated; `block_keys` and `block_values` [B, Q, M, d] are those of the same rows.
        keys: pool [P, M, d] of one layer; so is `values`.
        pages: int32 [B, W].
        lengths: int32 [B] context positions.
        gaps: int32 [B, 2] positions (from, to) that are not attended to.
        page_size: slots per page.

    Returns:
        [B, Q, N, d].
    """
    slots = (pages.long()[:, :, None] * page_size + torch.arange(page_size, device=pages.device)).flatten(1)
    all_keys = torch.cat([keys[slots], block_keys], dim=1)
    all_values = torch.cat([values[slots], block_values], dim=1)
    mask = context_mask(lengths, slots.shape[1], queries.shape[1], gaps)
    attended = F.scaled_dot_product_attention(
        queries.transpose(1, 2), all_keys.transpose(1, 2), all_values.transpose(1, 2), attn_mask=mask, enable_gqa=True
    )
    return attended.transpose(1, 2)
