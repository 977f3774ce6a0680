"""The shift rule: which column's output row predicts which column's token."""

from __future__ import annotations

import torch

from unmask.denoiser import MaskSpec
from unmask.masking.double_stream import DoubleStream
from unmask.models.cache import CacheView


class LogitAligner:
    """Picks the hidden rows that predict wanted columns. Nothing else in the project knows about the shift.

    Without a shift, row i predicts the token of column i (LLaDA). With it, row i - 1 does (Dream, and every model
    adapted from an AR one, whose head was trained that way). Column 0 then has no predictor; asking for it is an
    error, never a filled-in row. The row before a window of a cached forward comes from the cache, where it was
    kept when its column was last fed.
    """

    def __init__(self, shift: bool) -> None:
        self.shift = shift

    def source(self, row: torch.Tensor, column: torch.Tensor, mask: MaskSpec) -> torch.Tensor:
        """The columns whose rows predict `column`; integer tensors that broadcast together."""
        if not self.shift:
            return column
        return mask.previous(row, column) if isinstance(mask, DoubleStream) else column - 1

    def marked(self, hidden_BTH: torch.Tensor, marked_BT: torch.Tensor, mask: MaskSpec) -> torch.Tensor:
        """Hidden rows [N, H] that predict the marked columns of an uncached forward, in row-major order.

        Raises:
            ValueError: column 0 of a shifted model is marked.
        """
        row_N, column_N = marked_BT.nonzero(as_tuple=True)
        if self.shift and bool((column_N == 0).any()):
            raise ValueError("column 0 has no predictor in a shifted model: a prompt of at least one token comes first")
        return hidden_BTH[row_N, self.source(row_N, column_N, mask)]

    def gathered(
        self,
        hidden_BTH: torch.Tensor,
        columns_BK: torch.Tensor,
        mask: MaskSpec,
        *,
        cache: CacheView | None = None,
        first_column_B1: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden rows [B, K, H] that predict the columns `columns_BK`.

        Without a cache, hidden row t belongs to column t. With one it belongs to column `first_column + t`, and a
        shifted model finds the rows in the cache, among them the one before the window. There is no synchronising
        check here: KVCache.extend guarantees on the host that such a row has been written, and an index of -1 is
        out of range.
        """
        row = torch.arange(columns_BK.shape[0], device=columns_BK.device)[:, None]
        source_BK = self.source(row, columns_BK, mask)
        if cache is not None and self.shift:
            return cache.gather_hidden(source_BK)
        if first_column_B1 is not None:
            source_BK = source_BK - first_column_B1
        return hidden_BTH.gather(1, source_BK[:, :, None].expand(-1, -1, hidden_BTH.shape[2]))
