"""Block-causal attention (D2F, arXiv 2508.09192, section 3): bidirectional inside a block, causal across blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class BlockCausal:
    """Blocks are counted from the end of each row's prompt; the prompt sees itself, both ways, and nothing else.

    With blk(i) = -1 in the prompt and floor((i - P) / block_size) after it, column q sees column k iff
    blk(k) <= blk(q). The last block may be short.
    """

    prompt_lens_B: torch.Tensor
    """int64 [B], each at least 1."""
    block_size: int
    lengths_B: torch.Tensor | None = None
    """int64 [B]: columns from here on are padding; None when there is none."""

    def block_of(self, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """blk(column): -1 in the prompt, then 0, 1, ..."""
        offset = column - self.prompt_lens_B[row]
        return torch.where(offset < 0, -1, torch.div(offset, self.block_size, rounding_mode="floor"))

    def allow(self, row: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """See MaskSpec."""
        visible = self.block_of(row, key) <= self.block_of(row, query)
        return visible if self.lengths_B is None else visible & (key < self.lengths_B[row])
