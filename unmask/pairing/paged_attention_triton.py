"""Attention of draft blocks over paged context as a Triton kernel that reads the pages where they lie.

One program takes one request, one key head and one share of the context; all query heads of the key head and all
block rows are its rows, so that a context key is read once. The last share also takes the block's own keys. Shares are
merged by their log-sum-exp (flash decoding).
"""

from __future__ import annotations

import torch
import triton  # pyrefly: ignore[missing-import]
import triton.language as tl  # pyrefly: ignore[missing-import]
from torch import Tensor

_KEYS_PER_TILE = 64
_PROGRAMS = 264
"""Enough to fill a large GPU twice."""
_SHARES = (16, 4)
"""Few choices: each is a kernel of its own to compile."""


def paged_attention(
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
    """See `unmask.pairing.paged_attention.gathered_attention`, which this equals up to rounding."""
    batch, num_rows, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    group = num_heads // num_kv_heads
    shares = next((n for n in _SHARES if n * batch * num_kv_heads <= _PROGRAMS), 1)
    rows = max(16, triton.next_power_of_2(num_rows * group))
    width = max(16, triton.next_power_of_2(head_dim))
    partial = torch.empty(batch, num_kv_heads, shares, rows, width, dtype=torch.float32, device=queries.device)
    logsum = torch.empty(batch, num_kv_heads, shares, rows, dtype=torch.float32, device=queries.device)
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    sizes = {"Q": num_rows, "GROUP": group, "HEADS": num_kv_heads, "D": head_dim, "ROWS": rows, "WIDTH": width}
    _attend[(batch, num_kv_heads, shares)](
        queries.contiguous(),
        block_keys.contiguous(),
        block_values.contiguous(),
        keys,
        values,
        pages,
        *pages.stride(),
        lengths,
        lengths.stride(0),
        gaps,
        *gaps.stride(),
        partial,
        logsum,
        head_dim**-0.5 * 1.4426950408889634,
        PAGE=page_size,
        SHARES=shares,
        TILE=_KEYS_PER_TILE,
        OWN=max(16, triton.next_power_of_2(num_rows)),
        PRECISION="ieee" if queries.dtype == torch.float32 else "tf32",
        **sizes,
        num_warps=4,
        num_stages=2,
    )
    _merge[(batch, num_kv_heads)](partial, logsum, out, SHARES=shares, **sizes, num_warps=4)
    return out


@triton.jit
def _fold(q, k, v, allowed, scale, peak, total, acc, PRECISION: tl.constexpr):
    """Fold one tile of keys into a running softmax (base 2)."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    scores = tl.where(allowed[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # A tile, or all of a share, may lie in a gap: there is nothing to weigh yet.
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(peak - shift)
    acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return new_peak, total * decay + tl.sum(weights, 1), acc


@triton.jit
def _attend(
    queries,
    block_keys,
    block_values,
    keys,
    values,
    pages,
    pages_row,
    pages_column,
    lengths,
    lengths_row,
    gaps,
    gaps_row,
    gaps_column,
    partial,
    logsum,
    scale,
    PAGE: tl.constexpr,
    SHARES: tl.constexpr,
    TILE: tl.constexpr,
    OWN: tl.constexpr,
    PRECISION: tl.constexpr,
    Q: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    request, head, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    is_row, is_column = row < Q * GROUP, column < D
    query_at = ((request * Q + row // GROUP) * HEADS + head) * GROUP + row % GROUP
    q = tl.load(queries + query_at[:, None] * D + column, mask=is_row[:, None] & is_column, other=0.0)

    length = tl.load(lengths + request * lengths_row)
    gap_start = tl.load(gaps + request * gaps_row)
    gap_end = tl.load(gaps + request * gaps_row + gaps_column)
    per_share = tl.cdiv(tl.cdiv(length, SHARES), TILE) * TILE
    first, last = share * per_share, tl.minimum((share + 1) * per_share, length)

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for begin in range(first, last, TILE):
        position = begin + tl.arange(0, TILE)
        known = position < last
        allowed = known & ((position < gap_start) | (position >= gap_end))
        page = tl.load(pages + request * pages_row + position // PAGE * pages_column, mask=known, other=0)
        slot = page.to(tl.int64) * PAGE + position % PAGE
        at = (slot * HEADS + head)[:, None] * D + column
        mask = known[:, None] & is_column
        k = tl.load(keys + at, mask=mask, other=0.0)
        v = tl.load(values + at, mask=mask, other=0.0)
        peak, total, acc = _fold(q, k, v, allowed, scale, peak, total, acc, PRECISION)
    if share == SHARES - 1:
        own = tl.arange(0, OWN)
        at = ((request * Q + own) * HEADS + head)[:, None] * D + column
        mask = (own < Q)[:, None] & is_column
        k = tl.load(block_keys + at, mask=mask, other=0.0)
        v = tl.load(block_values + at, mask=mask, other=0.0)
        peak, total, acc = _fold(q, k, v, own < Q, scale, peak, total, acc, PRECISION)

    part = ((request * HEADS + head) * SHARES + share) * ROWS + row
    found = total > 0
    result = tl.where(found[:, None], acc / tl.where(found, total, 1.0)[:, None], 0.0)
    tl.store(partial + part[:, None] * WIDTH + column, result)
    tl.store(logsum + part, tl.where(found, peak + tl.log2(tl.where(found, total, 1.0)), float("-inf")))


@triton.jit
def _merge(
    partial,
    logsum,
    out,
    SHARES: tl.constexpr,
    Q: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    request, head = tl.program_id(0), tl.program_id(1)
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    start = (request * HEADS + head) * SHARES * ROWS
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    for share in range(SHARES):
        peak = tl.maximum(peak, tl.load(logsum + start + share * ROWS + row))
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for share in range(SHARES):
        part = start + share * ROWS + row
        # The last share holds the block's own keys: the peak is finite.
        weight = tl.exp2(tl.load(logsum + part) - peak)
        total += weight
        acc += weight[:, None] * tl.load(partial + part[:, None] * WIDTH + column)
    at = ((request * Q + row // GROUP) * HEADS + head) * GROUP + row % GROUP
    mask = (row < Q * GROUP)[:, None] & (column < D)
    tl.store(out + at[:, None] * D + column, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
