"""Attention masks: the plain ones, and the two ways in which any predicate becomes something a kernel can use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from unmask.denoiser import MaskSpec


@dataclass(frozen=True, slots=True)
class Full:
    """Every column sees every other. `lengths_B` (int64) hides the columns from a row's length on; None hides none."""

    lengths_B: torch.Tensor | None = None

    def allow(self, row: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """See MaskSpec."""
        if self.lengths_B is None:
            return (row >= 0) & (query >= 0) & (key >= 0)
        return (query >= 0) & (key < self.lengths_B[row])


@dataclass(frozen=True, slots=True)
class Causal:
    """A column sees itself and what comes before. Right padding needs no lengths: it is never before a token."""

    def allow(self, row: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """See MaskSpec."""
        return (row >= 0) & (key <= query)


@dataclass(frozen=True, slots=True)
class Dense:
    """Any mask at all, given as bool [B, T, S] (or [1, T, S] for all rows)."""

    allow_BTS: torch.Tensor

    def allow(self, row: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """See MaskSpec."""
        shared = self.allow_BTS.shape[0] == 1
        return self.allow_BTS[row * 0 if shared else row, query, key]


def dense_form(mask: MaskSpec, query_columns_BT: torch.Tensor, num_keys: int) -> torch.Tensor:
    """bool [B, 1, T, S]: the predicate for the given query columns against key columns 0 .. num_keys - 1."""
    num_rows = query_columns_BT.shape[0]
    device = query_columns_BT.device
    rows = torch.arange(num_rows, device=device)[:, None, None]
    keys = torch.arange(num_keys, device=device)[None, None, :]
    allowed = mask.allow(rows, query_columns_BT[:, :, None], keys)
    return allowed.expand(num_rows, query_columns_BT.shape[1], num_keys)[:, None]


def flex_form(mask: MaskSpec, num_rows: int, num_columns: int, device: torch.device | str) -> BlockMask:
    """The predicate as a BlockMask for flex_attention over a square of `num_columns` columns (one head for all)."""

    def mask_mod(
        row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:  # the signature is flex_attention's
        return mask.allow(row, query, key)

    return create_block_mask(mask_mod, num_rows, None, num_columns, num_columns, device=device)
