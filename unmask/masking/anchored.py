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
from torch.nn.attention.flex_attention import BlockMask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def anchored_block(anchors_BM: Tensor, block_size: int, num_context: int, starts_BM: Tensor | None = None) -> MaskMod:
    """The predicate `allow(batch, head, query, key)` in the form that flex attention takes.

    Args:
        anchors_BM: int64 anchor columns; a negative anchor is a dead block, which sees only itself.
        block_size: rows of a block, the anchor included.
        num_context: S, context rows in front of the block rows among the keys.
        starts_BM: first column of each anchor's own sequence where several are packed into a row; None is column 0.
    """

    def allow(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // block_size
        before_anchor = (key < num_context) & (key < anchors_BM[batch, block])
        if starts_BM is not None:
            before_anchor = before_anchor & (key >= starts_BM[batch, block])
        same_block = (key >= num_context) & ((key - num_context) // block_size == block)
        return before_anchor | same_block

    return allow


def dense_mask(anchors_BM: Tensor, block_size: int, num_context: int, starts_BM: Tensor | None = None) -> Tensor:
    """The predicate evaluated everywhere: bool [B, 1, M * block_size, S + M * block_size]."""
    batch, num_blocks = anchors_BM.shape
    rows = num_blocks * block_size
    device = anchors_BM.device
    allow = anchored_block(anchors_BM, block_size, num_context, starts_BM)
    return allow(
        torch.arange(batch, device=device).view(-1, 1, 1, 1),
        torch.zeros(1, dtype=torch.long, device=device).view(1, 1, 1, 1),
        torch.arange(rows, device=device).view(1, 1, -1, 1),
        torch.arange(num_context + rows, device=device).view(1, 1, 1, -1),
    )


def block_sparse_mask(
    anchors_BM: Tensor, block_size: int, num_context: int, starts_BM: Tensor, tile: int = 128
) -> BlockMask:
    """The predicate as a BlockMask, its tiles found from the anchors alone: no grid of rows, no host synchronisation.

    Tiles that hold nothing are left out; some that are kept may hold nothing where one tile of queries spans several
    sequences. Anchors that ascend make the tiles few.

    Args:
        num_context: S, a multiple of `tile`; so is M * block_size.
    """
    rows = anchors_BM.shape[1] * block_size
    alive = anchors_BM >= 0
    first, last = starts_BM.where(alive, num_context), anchors_BM.where(alive, -1)  # a dead block widens no tile
    first, last = (t.repeat_interleave(block_size, dim=1).unflatten(1, (-1, tile)) for t in (first, last))
    left = torch.arange(0, num_context, tile, device=anchors_BM.device)
    some = (first.amin(-1)[..., None] < left + tile) & (last.amax(-1)[..., None] > left)
    full = (first.amax(-1)[..., None] <= left) & (last.amin(-1)[..., None] >= left + tile)
    own = torch.arange(0, rows, tile, device=anchors_BM.device)
    blocks, ends = own // block_size, (own + tile - 1) // block_size
    same = (blocks[:, None] <= ends) & (blocks <= ends[:, None])
    partial = torch.cat([some & ~full, same.expand(len(anchors_BM), -1, -1)], dim=-1)
    full = torch.cat([full, torch.zeros_like(same).expand(len(anchors_BM), -1, -1)], dim=-1)
    return BlockMask.from_kv_blocks(
        *_ordered(partial),
        *_ordered(full),
        BLOCK_SIZE=tile,
        mask_mod=anchored_block(anchors_BM, block_size, num_context, starts_BM),
        seq_lengths=(rows, num_context + rows),
    )


def _ordered(tiles_BQK: Tensor) -> tuple[Tensor, Tensor]:
    """How many key tiles each query tile visits, and which: int32 [B, 1, Q] and [B, 1, Q, K]."""
    order = tiles_BQK.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles_BQK.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


def context_mask(context_lens_B: Tensor, num_context: int, num_queries: int, gaps_B2: Tensor | None = None) -> Tensor:
    """Serving: one block a request, right-padded context. bool [B, 1, num_queries, num_context + num_queries].

    `gaps_B2` names context positions (from, to) of each request that are not known and are not attended to.
    """
    device = context_lens_B.device
    positions = torch.arange(num_context, device=device)
    context = positions < context_lens_B[:, None]
    if gaps_B2 is not None:
        context &= (positions < gaps_B2[:, :1]) | (positions >= gaps_B2[:, 1:])
    block = torch.ones(len(context_lens_B), num_queries, dtype=torch.bool, device=device)
    allowed = torch.cat([context, block], dim=-1)
    return allowed[:, None, None, :].expand(-1, 1, num_queries, -1)
