"""Keys and values of decoded rows, addressed by column: the token at position c of a row is always at column c.

Writing is therefore a scatter whatever the decoder does: append (window after the valid columns), refresh (from
column 0), replace in place (dual cache) or recompute a tail (APD). What is stale is hidden by the attention mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


class KVCache:
    """Room for `num_rows` rows of `capacity` columns, plus one scratch row and column that padding may write to.

    With `boundary=True` the last hidden state of every column is kept too: with shifted logits, the column before a
    window predicts the window's first token (see LogitAligner).
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_rows: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        hidden_size: int,
        boundary: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (num_layers, num_rows + 1, capacity + 1, num_kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.hidden = (
            torch.zeros(num_rows + 1, capacity + 1, hidden_size, dtype=dtype, device=device) if boundary else None
        )
        self.num_rows = num_rows
        self.capacity = capacity
        self._lengths = [0] * num_rows

    @property
    def num_bytes(self) -> int:
        """Device memory held."""
        tensors = [self.keys, self.values] + ([] if self.hidden is None else [self.hidden])
        return sum(t.numel() * t.element_size() for t in tensors)

    def length(self, row: int) -> int:
        """Valid columns of a row: [0, length) have been written and not cropped since."""
        return self._lengths[row]

    def extend(self, row: int, start: int, stop: int) -> None:
        """Announce that columns [start, stop) of a row are about to be written.

        Raises:
            ValueError: the window leaves a gap after the valid columns, or does not fit. A forward would then read
                columns that nobody has written.
        """
        if not 0 <= start <= self._lengths[row]:
            raise ValueError(f"row {row}: a window from column {start} leaves a gap after {self._lengths[row]} columns")
        if not start < stop <= self.capacity:
            raise ValueError(f"row {row}: window [{start}, {stop}) does not fit a capacity of {self.capacity}")
        self._lengths[row] = max(self._lengths[row], stop)

    def crop(self, row: int, length: int) -> None:
        """Forget a row's columns from `length` on (0 frees the row)."""
        self._lengths[row] = min(self._lengths[row], length)

    def select(self, rows_B: torch.Tensor, num_keys: int, *, leading: bool = False) -> CacheView:
        """The rows of one forward, seen up to column `num_keys`.

        Args:
            rows_B: int64 [B]; num_rows is the scratch row.
            num_keys: columns that are seen.
            leading: `rows_B` is 0 .. B - 1, known on the host: keys and values are then seen in place, not copied.
        """
        return CacheView(self, rows_B, num_keys, leading)


@dataclass(frozen=True, slots=True)
class CacheView:
    """The rows of a cache that one forward works on."""

    cache: KVCache
    rows_B: torch.Tensor
    num_keys: int
    leading: bool = False

    def scatter(
        self, layer: int, columns_BT: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [B, T, heads, head_dim] at `columns_BT`; return all keys and values, [B, num_keys, heads, head_dim]."""
        place = (self.rows_B[:, None], columns_BT)
        self.cache.keys[layer].index_put_(place, keys.to(self.cache.keys.dtype))
        self.cache.values[layer].index_put_(place, values.to(self.cache.values.dtype))
        seen = self.cache.keys[layer, :, : self.num_keys], self.cache.values[layer, :, : self.num_keys]
        if self.leading:
            return seen[0][: len(self.rows_B)], seen[1][: len(self.rows_B)]
        return seen[0].index_select(0, self.rows_B), seen[1].index_select(0, self.rows_B)

    def scatter_hidden(self, columns_BT: torch.Tensor, hidden_BTH: torch.Tensor) -> None:
        """Keep the last hidden states of the fed columns, for windows that begin right after them."""
        if self.cache.hidden is not None:
            self.cache.hidden.index_put_((self.rows_B[:, None], columns_BT), hidden_BTH.to(self.cache.hidden.dtype))

    def gather_hidden(self, columns_BK: torch.Tensor) -> torch.Tensor:
        """Last hidden states [B, K, H] of columns fed in this or an earlier forward."""
        if self.cache.hidden is None:
            raise ValueError("this cache keeps no hidden states: build it with boundary=True")
        return self.cache.hidden[self.rows_B[:, None], columns_BK]
