"""Paged context KV of a draft: what is known of every request, in one bounded pool.

A request's keys and values lie in pages of a fixed number of positions. Rows arrive with the position at
which they start, and the start rule keeps draft and target in step without any other bookkeeping:

    start == length    append
    start <  length    the target went back (rejection, preemption): truncate to `start`, then append
    start >  length    a gap (lost message, eviction): the request is forgotten and gets no proposal
                       until the target starts it over at 0

Under pressure the least recently used request is forgotten, which is a gap like any other.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unmask.errors import ConfigError

Key = tuple[int, int]
"""(session, request)"""


@dataclass(slots=True)
class _Entry:
    row: int
    """Row of the page table."""
    length: int = 0
    num_pages: int = 0
    last_used: int = 0


@dataclass(frozen=True, slots=True)
class Reservation:
    """Places for the rows of one step.

    Attributes:
        kept: bool [R], False where a request has a gap and its rows must be dropped.
        positions: int64 [T] absolute positions of the kept rows' features, request after request.
        slots: int64 [T] places of those features in the pool.
    """

    kept: np.ndarray
    positions: np.ndarray
    slots: np.ndarray


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
        page_size: int = 16,
    ) -> None:
        page_bytes = 2 * num_layers * page_size * num_kv_heads * head_dim * dtype.itemsize
        self.num_pages = int(memory_mb * 2**20) // page_bytes
        if self.num_pages < 1:
            raise ConfigError(
                f"{memory_mb} MiB do not hold one page of {page_bytes} bytes", field="serve.draft_memory_mb"
            )
        self.page_size = page_size
        shape = (num_layers, self.num_pages * page_size, num_kv_heads, head_dim)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self._free_pages = list(range(self.num_pages - 1, -1, -1))
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._table = np.zeros((16, 16), dtype=np.int64)
        self._free_rows = list(range(len(self._table) - 1, -1, -1))
        self._clock = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def resident_pages(self) -> int:
        """Pages in use."""
        return self.num_pages - len(self._free_pages)

    def length(self, key: Key) -> int | None:
        """Context rows held of a request; None if it is unknown or has a gap."""
        entry = self._entries.get(key)
        return entry.length if entry else None

    def reserve(self, keys: Sequence[Key], starts: np.ndarray, counts: np.ndarray) -> Reservation:
        """Apply the start rule to the rows of one step and find places for their features.

        Args:
            keys: R distinct requests.
            starts: int64 [R] position of each request's first feature.
            counts: int64 [R] features of each request.
        """
        self._clock += 1
        for key in keys:
            if key in self._entries:
                self._touch(key)
        kept = np.array(
            [self._extend(k, s, n) for k, s, n in zip(keys, starts.tolist(), counts.tolist(), strict=True)], dtype=bool
        )
        table_rows = np.array(
            [self._entries[k].row for k, keep in zip(keys, kept, strict=True) if keep], dtype=np.int64
        )
        starts, counts = starts[kept], counts[kept]
        ends = np.cumsum(counts)
        total = int(ends[-1]) if len(ends) else 0
        positions = np.arange(total) + np.repeat(starts - ends + counts, counts)
        pages = self._table[np.repeat(table_rows, counts), positions // self.page_size]
        return Reservation(kept=kept, positions=positions, slots=pages * self.page_size + positions % self.page_size)

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store rows at reserved slots: int64 [T], and keys and values [L, T, num_kv_heads, d].

        Non-finite values are made finite: attention gives padding a weight of 0, and 0 * inf would carry a
        value left behind in a page into the result of the page's next owner.
        """
        self._keys.index_copy_(1, slots, torch.nan_to_num(keys).to(self._keys.dtype))
        self._values.index_copy_(1, slots, torch.nan_to_num(values).to(self._values.dtype))

    def gather(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor, Tensor]:
        """Context of known requests, right-padded to a whole page.

        Returns:
            Keys and values [L, B, S, num_kv_heads, d], and lengths int64 [B].
        """
        entries = [self._entries[key] for key in keys]
        width = max((entry.num_pages for entry in entries), default=0)
        device = self._keys.device
        pages = torch.from_numpy(self._table[[entry.row for entry in entries], :width])
        slots = (pages[:, :, None] * self.page_size + torch.arange(self.page_size)).flatten().to(device)
        shape = (len(entries), width * self.page_size)
        lengths = torch.tensor([entry.length for entry in entries], device=device)
        return (
            self._keys.index_select(1, slots).unflatten(1, shape),
            self._values.index_select(1, slots).unflatten(1, shape),
            lengths,
        )

    def free(self, key: Key) -> None:
        """Forget a request; nothing happens if it is unknown."""
        entry = self._entries.pop(key, None)
        if entry:
            self._resize(entry, 0)
            self._free_rows.append(entry.row)

    def free_session(self, session: int) -> None:
        """Forget every request of a session."""
        for key in [key for key in self._entries if key[0] == session]:
            self.free(key)

    def _extend(self, key: Key, start: int, count: int) -> bool:
        """Make a request `start + count` rows long; False, and the request forgotten, where there is a gap."""
        needed = -(-(start + count) // self.page_size)
        if start > (self.length(key) or 0) or needed > self.num_pages:
            self.free(key)
            return False
        if key not in self._entries:
            self._entries[key] = _Entry(row=self._new_row())
        self._touch(key)
        entry = self._entries[key]
        while needed - entry.num_pages > len(self._free_pages):
            if not self._evict():
                self.free(key)
                return False
        self._resize(entry, needed)
        entry.length = start + count
        return True

    def _touch(self, key: Key) -> None:
        self._entries[key].last_used = self._clock
        self._entries.move_to_end(key)

    def _evict(self) -> bool:
        """Forget the least recently used request that this step does not name; False if there is none."""
        key, entry = next(iter(self._entries.items()))
        if entry.last_used == self._clock:
            return False
        self.free(key)
        return True

    def _resize(self, entry: _Entry, num_pages: int) -> None:
        width = self._table.shape[1]
        if num_pages > width:
            self._table = np.pad(self._table, ((0, 0), (0, max(num_pages, 2 * width) - width)))
        row = self._table[entry.row]
        if num_pages < entry.num_pages:
            self._free_pages.extend(row[num_pages : entry.num_pages].tolist())
            row[num_pages : entry.num_pages] = 0
        elif num_pages > entry.num_pages:
            row[entry.num_pages : num_pages] = [self._free_pages.pop() for _ in range(num_pages - entry.num_pages)]
        entry.num_pages = num_pages

    def _new_row(self) -> int:
        if not self._free_rows:
            rows = len(self._table)
            self._table = np.pad(self._table, ((0, rows), (0, 0)))
            self._free_rows = list(range(2 * rows - 1, rows - 1, -1))
        return self._free_rows.pop()
