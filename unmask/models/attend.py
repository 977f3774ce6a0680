"""Attention over a window: scaled dot products under a mask, with the keys of the window or of a cache."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from unmask.denoiser import MaskSpec
from unmask.masking.attention import Causal, Full, dense_form, flex_form
from unmask.models.cache import CacheView

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, queries [B, T, N, D], keys [B, T, M, D], values [B, T, M, D]) -> [B, T, N, D]; N a multiple of M."""


def window_attend(mask: MaskSpec, positions_BT: torch.Tensor, *, flex: bool) -> Attend:
    """Attention inside the fed columns alone. `flex` compiles the predicate into flex_attention (GPU training)."""
    num_rows, num_columns = positions_BT.shape
    if isinstance(mask, Causal):
        return _PlainAttend(is_causal=True)
    if isinstance(mask, Full) and mask.lengths_B is None:
        return _PlainAttend(is_causal=False)
    if flex:
        return _FlexAttend(flex_form(mask, num_rows, num_columns, positions_BT.device))
    columns_BT = torch.arange(num_columns, device=positions_BT.device).expand(num_rows, -1)
    return _MaskedAttend(dense_form(mask, columns_BT, num_columns))


def cached_attend(mask: MaskSpec, columns_BT: torch.Tensor, cache: CacheView) -> Attend:
    """Attention of the fed columns to everything the cache holds, the fed columns included."""
    masked = _MaskedAttend(dense_form(mask, columns_BT, cache.num_keys))
    return lambda layer, q, k, v: masked(layer, q, *cache.scatter(layer, columns_BT, k, v))


class _PlainAttend:
    """No padding, no cache: the kernels' own fast paths."""

    def __init__(self, *, is_causal: bool) -> None:
        self.is_causal = is_causal

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        grouped = q.shape[2] != k.shape[2]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal, enable_gqa=grouped).transpose(1, 2)


class _MaskedAttend:
    """A dense mask. Query heads that share a key head become more query columns, so no kernel must know of groups."""

    def __init__(self, allowed_B1TS: torch.Tensor) -> None:
        self.allowed_B1TS = allowed_B1TS
        self.bias: torch.Tensor | None = None

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        num_rows, num_columns, num_heads, head_dim = q.shape
        num_groups = num_heads // k.shape[2]
        if self.bias is None:  # once a forward, not once a layer
            bias = torch.zeros(self.allowed_B1TS.shape, dtype=q.dtype, device=q.device)
            self.bias = bias.masked_fill_(~self.allowed_B1TS, -torch.inf).repeat(1, 1, num_groups, 1)
        q = q.unflatten(2, (-1, num_groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=self.bias)
        out = out.unflatten(2, (num_groups, num_columns)).permute(0, 3, 1, 2, 4)
        return out.reshape(num_rows, num_columns, num_heads, head_dim)


@functools.cache
def compiled_flex() -> Callable[..., torch.Tensor]:
    """flex_attention as a compiled kernel; inside a compiled region it is inlined."""
    return torch.compile(flex_attention, dynamic=False)


class _FlexAttend:
    """A BlockMask: compiled on a GPU, eager (and slow) elsewhere."""

    def __init__(self, block_mask: BlockMask) -> None:
        self.block_mask = block_mask

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        kernel = compiled_flex() if q.is_cuda else flex_attention
        grouped = q.shape[2] != k.shape[2]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return kernel(q, k, v, block_mask=self.block_mask, enable_gqa=grouped).transpose(1, 2)
