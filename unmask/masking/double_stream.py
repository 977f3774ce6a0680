"""Double-stream attention for training block diffusion (BD3-LM, arXiv 2503.09573; Fast-dLLM v2, arXiv 2509.26328).

The input is [noisy ; clean], two copies of the same L positions. Each noisy block is denoised given the clean
blocks before it, all blocks at once: in one forward every block sees exactly what a block-by-block decoder with a
cache of clean blocks would show it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unmask.masking.block_causal import BlockCausal


@dataclass(frozen=True, slots=True)
class DoubleStream:
    """Noisy columns are 0 .. L - 1, clean columns L .. 2 L - 1.

    A noisy column of block b sees the noisy block b and the clean blocks before b; a clean column of block b sees
    the clean blocks up to b. The prompt counts as block -1 in both streams.
    """

    blocks: BlockCausal
    stream_length: int
    """L."""

    def allow(self, row: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """See MaskSpec."""
        query_noisy, key_noisy = query < self.stream_length, key < self.stream_length
        query_block = self.blocks.block_of(row, query % self.stream_length)
        key_block = self.blocks.block_of(row, key % self.stream_length)
        visible = torch.where(
            query_noisy,
            torch.where(key_noisy, key_block == query_block, key_block < query_block),
            ~key_noisy & (key_block <= query_block),
        )
        lengths_B = self.blocks.lengths_B
        return visible if lengths_B is None else visible & (key % self.stream_length < lengths_B[row])

    def previous(self, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """The column before `column` (of a position >= 1), as its block sees it: the clean one where a block begins."""
        position = column % self.stream_length
        begins = self.blocks.block_of(row, position) != self.blocks.block_of(row, position - 1)
        crosses = begins & (column < self.stream_length)
        return torch.where(crosses, column - 1 + self.stream_length, column - 1)

    @staticmethod
    def join(noisy_BL: torch.Tensor, clean_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The doubled ids and positions, each int64 [B, 2 L]."""
        positions_L = torch.arange(clean_BL.shape[1], device=clean_BL.device)
        positions = torch.cat((positions_L, positions_L)).expand(clean_BL.shape[0], -1)
        return torch.cat((noisy_BL, clean_BL), dim=1), positions
