"""Paged context KV of a draft: what is known of every request, in one bounded pool of tensors.

A request's keys and values lie in pages of a fixed number of positions; `unmask.pairing.page_tables` says which.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from unmask.errors import ConfigError
from unmask.pairing.coming_rows import ComingRows
from unmask.pairing.page_hashes import PAGE_SIZE
from unmask.pairing.page_tables import Key, PageTable, PageTables, Reservation


class ContextCache:
    """Keys and values [L, page, slot, num_kv_heads, d] of many requests. Not thread-safe.

    Args:
        num_layers: draft layers L.
        memory_mb: bound of the pool in MiB, keys and values together.
        page_size: positions per page.

    Raises:
        ConfigError: `memory_mb` does not hold a single page.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        memory_mb: float,
        page_size: int = PAGE_SIZE,
    ) -> None:
        page_bytes = 2 * num_layers * page_size * num_kv_heads * head_dim * dtype.itemsize
        self.num_pages = int(memory_mb * 2**20) // page_bytes
        if self.num_pages < 1:
            raise ConfigError(
                f"{memory_mb} MiB do not hold one page of {page_bytes} bytes", field="serve.draft_memory_mb"
            )
        self.page_size = page_size
        self.spare_slot = self.num_pages * page_size
        """Belongs to no page: rows that pad a batch are written there."""
        shape = (num_layers, self.spare_slot + 1, num_kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.tables = PageTables(self.num_pages, page_size)

    def fits(self, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> bool:
        """Whether the pool can be used for a draft of these sizes."""
        shape = (self.keys.shape[0], *self.keys.shape[2:])
        return (*shape, self.keys.dtype) == (num_layers, num_kv_heads, head_dim, dtype)

    def reserve(
        self,
        keys: Sequence[Key],
        starts: np.ndarray,
        counts: np.ndarray,
        hashes: Sequence[Sequence[int]] | None = None,
    ) -> Reservation:
        """See `PageTables.reserve`; shared pages that are about to change are copied."""
        reservation = self.tables.reserve(keys, starts, counts, hashes)
        self._copy_pages()
        return reservation

    def cover(
        self,
        keys: Sequence[Key],
        coming: ComingRows,
        last_page: int,
        hashes: Sequence[Sequence[int]] | None = None,
    ) -> bool:
        """See `PageTables.cover`; copied likewise."""
        has_room = self.tables.cover(keys, coming, last_page, hashes)
        self._copy_pages()
        return has_room

    def _copy_pages(self) -> None:
        copies = self.tables.take_copies()
        if copies:
            offsets = torch.arange(self.page_size)
            old, new = (
                (torch.tensor(pages)[:, None] * self.page_size + offsets).flatten().to(self.keys.device)
                for pages in zip(*copies, strict=True)
            )
            for pool in (self.keys, self.values):
                pool.index_copy_(1, new, pool.index_select(1, old))

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store rows at reserved slots: int64 [T], and keys and values [L, T, num_kv_heads, d].

        Non-finite values are made finite: attention gives padding a weight of 0, and 0 * inf would carry a
        value left behind in a page into the result of the page's next owner.
        """
        self.keys.index_copy_(1, slots, torch.nan_to_num(keys).to(self.keys.dtype))
        self.values.index_copy_(1, slots, torch.nan_to_num(values).to(self.values.dtype))

    def gather(self, table: PageTable) -> tuple[Tensor, Tensor]:
        """Keys and values [L, B, S, num_kv_heads, d] of a page table, S its width in positions."""
        pages = torch.from_numpy(table.pages.astype(np.int64))
        slots = (pages[:, :, None] * self.page_size + torch.arange(self.page_size)).flatten().to(self.keys.device)
        shape = (pages.shape[0], pages.shape[1] * self.page_size)
        keys, values = (pool.index_select(1, slots).unflatten(1, shape) for pool in (self.keys, self.values))
        return keys, values
