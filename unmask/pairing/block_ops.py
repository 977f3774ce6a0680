"""The small operations between the products of a draft's block pass: reference of the kernels, and what a CPU runs.

Dimension letters: B requests, Q block rows, T = B * Q, H hidden size, N query heads, M key heads, d head size, P
positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.models.dflash import rotate


def embed_blocks(
    embedding: Tensor, last_tokens: Tensor, mask_token_id: int, num_rows: int, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Rows [anchor, mask, mask, ...] of each request, and their root-mean-square norm.

    Args:
        embedding: [V, H].
        last_tokens: int32 [B].
        num_rows: Q.
        weight, eps: of the norm.

    Returns:
        Both [T, H].
    """
    ids = torch.full((len(last_tokens), num_rows), mask_token_id, device=embedding.device)
    ids[:, 0] = last_tokens
    x = F.embedding(ids.flatten(), embedding)
    return x, F.rms_norm(x, weight.shape, weight, eps)


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
    """Queries and keys normed by head and rotated, and values.

    Args:
        qkv: [T, (N + 2 M) d], N a multiple of M.
        q_norm, k_norm: weights [d].
        rotary: cosines and sines [P, 1, d].
        anchors: int32 [B], position of each request's first row.
        num_rows, num_kv_heads: Q and M.

    Returns:
        Contiguous [B, Q, N, d], [B, Q, M, d], [B, Q, M, d].
    """
    head_dim, batch = len(q_norm), len(anchors)
    positions = anchors[:, None] + torch.arange(num_rows, device=anchors.device)
    cos, sin = (table[positions] for table in rotary)
    heads = qkv.view(batch, num_rows, -1, head_dim)
    queries, keys, values = heads.split([heads.shape[2] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=2)
    queries = rotate(F.rms_norm(queries, (head_dim,), q_norm, eps), cos, sin)
    keys = rotate(F.rms_norm(keys, (head_dim,), k_norm, eps), cos, sin)
    return queries.contiguous(), keys.contiguous(), values.contiguous()


def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of two [T, H], and its root-mean-square norm."""
    total = x + y
    return total, F.rms_norm(total, weight.shape, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU's product [T, F] of both halves of [T, 2 F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
