"""Attention of DFlash training: anchored blocks that see the target's features strictly before their anchor.

Keys are S context rows followed by the block rows; queries are the block rows. A query of block j sees
context row i if and only if i < a_j (arXiv 2602.06036, section 4). Strictly: the anchor's own feature already
encodes the distribution of the next token and does not exist yet when a pairing is served. It sees a
block row if and only if that row is of its own block; inside a block attention is bidirectional.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def anchored_block(anchors_BM: Tensor, block_size: int, num_context: int) -> MaskMod:
    """The predicate `allow(batch, head, query, key)` in the form that flex attention takes.

    Args:
        anchors_BM: int64 anchor positions; a negative anchor is a dead block, which sees only itself.
        block_size: rows of a block, the anchor included.
        num_context: S, context rows in front of the block rows among the keys.
    """

    def allow(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // block_size
        before_anchor = (key < num_context) & (key < anchors_BM[batch, block])
        same_block = (key >= num_context) & ((key - num_context) // block_size == block)
        return before_anchor | same_block

    return allow


def dense_mask(anchors_BM: Tensor, block_size: int, num_context: int) -> Tensor:
    """The predicate evaluated everywhere: bool [B, 1, M * block_size, S + M * block_size]."""
    batch, num_blocks = anchors_BM.shape
    rows = num_blocks * block_size
    device = anchors_BM.device
    allow = anchored_block(anchors_BM, block_size, num_context)
    return allow(
        torch.arange(batch, device=device).view(-1, 1, 1, 1),
        torch.zeros(1, dtype=torch.long, device=device).view(1, 1, 1, 1),
        torch.arange(rows, device=device).view(1, 1, -1, 1),
        torch.arange(num_context + rows, device=device).view(1, 1, 1, -1),
    )


def context_mask(context_lens_B: Tensor, num_context: int, num_queries: int) -> Tensor:
    """Serving: one block a request, right-padded context. bool [B, 1, num_queries, num_context + num_queries]."""
    device = context_lens_B.device
    context = torch.arange(num_context, device=device) < context_lens_B[:, None]
    block = torch.ones(len(context_lens_B), num_queries, dtype=torch.bool, device=device)
    allowed = torch.cat([context, block], dim=-1)
    return allowed[:, None, None, :].expand(-1, 1, num_queries, -1)
