"""`block_ops` as Triton kernels: one launch each, and rounding to the element type only where it is stored."""

from __future__ import annotations

import torch
import triton  # pyrefly: ignore[missing-import]
import triton.language as tl  # pyrefly: ignore[missing-import]
from torch import Tensor

_COLUMNS = 1024


@triton.jit
def _embed(
    embedding,
    last_tokens,
    weight,
    out,
    normed,
    eps,
    MASK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    token = tl.load(last_tokens + row // ROWS).to(tl.int64)
    token = tl.where(row % ROWS == 0, token, MASK)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(embedding + token * WIDTH + column, mask=inside, other=0.0)
    at = row.to(tl.int64) * WIDTH + column
    tl.store(out + at, x, mask=inside)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
    weights = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, (x * scale * weights).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _split(
    qkv,
    q_norm,
    k_norm,
    cos,
    sin,
    anchors,
    queries,
    keys,
    values,
    eps,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    """One row, and as many heads as there are key heads: query heads first, then keys, then values."""
    row, part = tl.program_id(0), tl.program_id(1)
    HALF: tl.constexpr = D // 2
    head, column = tl.arange(0, HEADS_BLOCK)[:, None], tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < HEADS) & (column < HALF)
    is_column = column < HALF
    source = qkv + row.to(tl.int64) * (GROUP + 2) * HEADS * D + (part * HEADS + head) * D + column
    # Of one type in both branches, as Triton wants it; back in that of the values nothing is rounded.
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    if part == GROUP + 1:
        out = values + (row.to(tl.int64) * HEADS + head) * D + column
        tl.store(out, first.to(values.dtype.element_ty), mask=inside)
        tl.store(out + HALF, second.to(values.dtype.element_ty), mask=inside)
    else:
        if part == GROUP:
            norm = k_norm
            out = keys + (row.to(tl.int64) * HEADS + head) * D + column
        else:
            norm = q_norm
            out = queries + (row.to(tl.int64) * GROUP * HEADS + part * HEADS + head) * D + column
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        scale = tl.rsqrt(squares / D + eps)[:, None]
        first *= scale * tl.load(norm + column, mask=is_column, other=0.0).to(tl.float32)
        second *= scale * tl.load(norm + HALF + column, mask=is_column, other=0.0).to(tl.float32)
        position = (tl.load(anchors + row // ROWS) + row % ROWS).to(tl.int64)
        at = position * D + column
        low_cos = tl.load(cos + at, mask=is_column, other=0.0).to(tl.float32)
        high_cos = tl.load(cos + at + HALF, mask=is_column, other=0.0).to(tl.float32)
        low_sin = tl.load(sin + at, mask=is_column, other=0.0).to(tl.float32)
        high_sin = tl.load(sin + at + HALF, mask=is_column, other=0.0).to(tl.float32)
        tl.store(out, (first * low_cos - second * low_sin).to(queries.dtype.element_ty), mask=inside)
        tl.store(out + HALF, (second * high_cos + first * high_sin).to(queries.dtype.element_ty), mask=inside)


@triton.jit
def _add_norm(x, y, weight, total, normed, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + column
    added = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + tl.load(y + at, mask=inside, other=0.0)
    stored = added.to(total.dtype.element_ty)
    tl.store(total + at, stored, mask=inside)
    # The norm is that of the residual stream as it goes on.
    added = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(added * added, axis=0) / WIDTH + eps)
    weights = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, (added * scale * weights).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    source = gate_up + row * 2 * WIDTH + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


def embed_blocks(
    embedding: Tensor, last_tokens: Tensor, mask_token_id: int, num_rows: int, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `block_ops.embed_blocks`."""
    width = embedding.shape[1]
    x = embedding.new_empty(len(last_tokens) * num_rows, width)
    normed = torch.empty_like(x)
    _embed[(len(x),)](
        embedding,
        last_tokens,
        weight,
        x,
        normed,
        eps,
        MASK=mask_token_id,
        ROWS=num_rows,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        num_warps=8,
    )
    return x, normed


def split_heads(
    qkv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    eps: float,
    rotary: tuple[Tensor, Tensor],
    anchors: Tensor,
    num_rows: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `block_ops.split_heads`."""
    head_dim, batch = len(q_norm), len(anchors)
    group = qkv.shape[1] // head_dim // num_kv_heads - 2
    queries = qkv.new_empty(batch, num_rows, group * num_kv_heads, head_dim)
    keys, values = (qkv.new_empty(batch, num_rows, num_kv_heads, head_dim) for _ in range(2))
    _split[(len(qkv), group + 2)](
        qkv,
        q_norm,
        k_norm,
        *rotary,
        anchors,
        queries,
        keys,
        values,
        eps,
        ROWS=num_rows,
        GROUP=group,
        HEADS=num_kv_heads,
        D=head_dim,
        HEADS_BLOCK=triton.next_power_of_2(num_kv_heads),
        HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
        num_warps=4,
    )
    return queries, keys, values


def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `block_ops.add_norm`."""
    total, normed, width = torch.empty_like(x), torch.empty_like(x), x.shape[1]
    _add_norm[(len(x),)](
        x, y, weight, total, normed, eps, WIDTH=width, BLOCK=triton.next_power_of_2(width), num_warps=8
    )
    return total, normed


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `block_ops.silu_mul`."""
    width = gate_up.shape[1] // 2
    out = gate_up.new_empty(len(gate_up), width)
    _silu_mul[(len(out), triton.cdiv(width, _COLUMNS))](gate_up, out, WIDTH=width, BLOCK=_COLUMNS, num_warps=4)
    return out
