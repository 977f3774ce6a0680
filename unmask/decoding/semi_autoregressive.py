"""Block after block, left to right; inside a block any order. One forward a step, with or without a cache.

The loop that LLaDA (arXiv 2502.09992), Fast-dLLM (arXiv 2505.22618) and dParallel (arXiv 2509.26488) share; they
differ in which open columns a step commits.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch

from unmask.decoding.batch import Batch, Window
from unmask.decoding.decoder import Caches, Decoder, require, require_attention
from unmask.decoding.logits import Logits
from unmask.decoding.request import DecodeRequest
from unmask.decoding.selection import choose
from unmask.denoiser import DecodeState, Denoiser
from unmask.masking.attention import Full


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockConfig:
    """Settings of every block-after-block decoder."""

    block_size: int = 32
    """Columns that are open together; the last block of a response may be short."""
    cache: Literal["none", "prefix", "dual"] = "none"
    """Fast-dLLM's approximate caches, refreshed by the full forward that begins each block: `prefix` reuses what
    lies before the block, `dual` also what lies after it."""

    def __post_init__(self) -> None:
        require(self.block_size >= 1, "block_size", "must be at least 1")


@dataclass(slots=True, kw_only=True)
class BlockState(DecodeState):
    """A row and its current block."""

    block_start: int
    refreshed: bool = False
    """Whether this block's full forward has filled the cache."""


class SemiAutoregressive(Decoder[BlockState]):
    """The shared loop; a subclass says which open columns to commit."""

    def __init__(self, denoiser: Denoiser, config: BlockConfig) -> None:
        require_attention(denoiser, "bidirectional", type(self).__name__)
        self.denoiser = denoiser
        self.config = config
        self.cached_models = () if config.cache == "none" else (denoiser,)
        self.open_multiple = config.block_size

    @property
    def max_open(self) -> int:
        """See Decoder."""
        return self.config.block_size

    @abstractmethod
    def select(self, logits: Logits, tokens_BK: torch.Tensor, is_open_BK: torch.Tensor) -> torch.Tensor:
        """Which open columns to commit, bool [B, K]: at least one a row that has any."""

    def admit(self, request: DecodeRequest, slot: int) -> BlockState:
        """See Decoder. Finished blocks of a prefix are not decoded again: nothing in them depends on how they came."""
        request.check(self.denoiser)
        start, known = len(request.prompt_ids), len(request.prefix)
        block_start = start + known // self.config.block_size * self.config.block_size
        state = request.fresh_state(BlockState, self.denoiser, slot, block_start=block_start)
        state.tokens[start : start + known] = request.prefix
        state.committed = block_start
        return state

    def window(self, state: BlockState) -> Window:
        """The whole row, or what the cache does not hold."""
        block = state.block_start, self._block_stop(state)
        fed = 0, state.length
        if state.refreshed and self.config.cache == "prefix":
            fed = state.block_start, state.length
        elif state.refreshed and self.config.cache == "dual":
            fed = block
        return Window(start=fed[0], stop=fed[1], open_start=block[0], open_stop=block[1], visible=state.length)

    def step(self, batch: Batch, caches: Caches) -> torch.Tensor:
        """See Decoder."""
        logits = self.denoise(batch, Full(batch.visible_B), caches)
        tokens = choose(logits, batch.open_columns_BK, batch.sampling)
        commit = self.select(logits, tokens, batch.is_open_BK) & batch.is_open_BK
        return torch.where(commit, tokens, batch.open_ids_BK)

    def update(self, state: BlockState, window: Window) -> None:
        """Stay in the block while it has masks; then end at a stop id or the last column, or open the next block."""
        state.refreshed = self.config.cache != "none"
        state.cached = state.length if state.refreshed else 0
        if state.is_masked(window.open_start, window.open_stop):
            return
        state.commit_to(window.open_stop)
        state.block_start, state.refreshed = window.open_stop, False
        if state.saw_stop or state.committed == state.length:
            state.finish_reason = "stop" if state.saw_stop else "length"

    def _block_stop(self, state: BlockState) -> int:
        return min(state.block_start + self.config.block_size, state.length)
