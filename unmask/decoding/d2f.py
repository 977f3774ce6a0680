"""Pipelined parallel decoding (D2F, arXiv 2508.09192, algorithm 2): several unfinished blocks in one forward.

The network is block-causal, so a finished block's keys and values are exact once it has been fed again with all its
tokens; that second feeding rides on the next forward. Later blocks start while earlier ones are still noisy.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import numpy as np
import torch

from unmask.decoding.batch import Batch, Window
from unmask.decoding.decoder import Caches, Decoder, require, require_attention
from unmask.decoding.logits import Logits
from unmask.decoding.request import DecodeRequest
from unmask.decoding.selection import best_of, choose
from unmask.denoiser import DecodeState, Denoiser
from unmask.masking.block_causal import BlockCausal

_MOST_ACTIVE_BLOCKS = 62
"""One bit each in a window's flags."""


@dataclass(frozen=True, slots=True, kw_only=True)
class D2FConfig:
    """Defaults are the paper's thresholds."""

    block_size: int = 32
    """A multiple of the block that the network was trained with."""
    tau_add: float = 0.1
    """A new block is opened once this share of the last one is committed."""
    tau_act: float = 0.95
    """A block must make progress once this share of its predecessor is committed."""
    tau_conf: float = 0.9
    """Commit every open token of higher probability."""
    tau_entropy: float | None = None
    """Instead of tau_conf: commit every open token of at most this entropy, in nats (for a network that was trained
    with certainty forcing)."""
    fallback: Literal["probability", "margin", "entropy"] = "probability"
    """By what a block that must make progress picks its single token."""
    max_active_blocks: int = 6
    """Bounds the window, and with it memory."""
    cache: bool = True
    """Off feeds the whole row every time: the same tokens, more work."""

    def __post_init__(self) -> None:
        require(self.block_size >= 1, "block_size", "must be at least 1")
        for name in ("tau_add", "tau_act", "tau_conf"):
            require(0 <= getattr(self, name) <= 1, name, "must be in [0, 1]")
        require(self.tau_entropy is None or self.tau_entropy >= 0, "tau_entropy", "must be 0 nats or more")
        limits = f"must be between 1 and {_MOST_ACTIVE_BLOCKS}"
        require(1 <= self.max_active_blocks <= _MOST_ACTIVE_BLOCKS, "max_active_blocks", limits)


class Stage(Enum):
    """A block's way through the pipeline."""

    ACTIVE = "active"
    TO_CACHE = "to cache"
    IN_CACHE = "in cache"


@dataclass(slots=True)
class Block:
    """Columns [start, stop) that are denoised together; the prompt is block 0."""

    start: int
    stop: int
    num_masked: int
    """Columns that wait for their token."""
    stage: Stage = Stage.ACTIVE
    fully_activated: bool = False
    """Sticky: from now on every forward commits at least one of its tokens."""

    @property
    def ratio(self) -> float:
        """Committed share."""
        size = self.stop - self.start
        return (size - self.num_masked) / size


@dataclass(slots=True, kw_only=True)
class PipelineState(DecodeState):
    """A row and its blocks, in order."""

    blocks: list[Block]
    num_cached: int = 0
    """Blocks at the front that are in the cache."""
    has_ended: bool = False
    """Whether a stop id has been committed anywhere, and the request wants to end there."""

    @property
    def active(self) -> list[Block]:
        """Blocks that are being denoised: the contiguous tail."""
        return [block for block in self.blocks[self.num_cached :] if block.stage is Stage.ACTIVE]


class D2F(Decoder[PipelineState]):
    """The pipeline over a block-causal denoiser."""

    def __init__(self, denoiser: Denoiser, config: D2FConfig) -> None:
        require_attention(denoiser, "block_causal", "D2F")
        trained = denoiser.block_size or config.block_size
        multiple = config.block_size % trained == 0
        require(multiple, "block_size", f"must be a multiple of {trained}, with which the network was trained")
        self.denoiser = denoiser
        self.config = config
        self.cached_models = (denoiser,) if config.cache else ()
        self.open_multiple = config.block_size

    @property
    def max_open(self) -> int:
        """See Decoder."""
        return self.config.max_active_blocks * self.config.block_size

    def admit(self, request: DecodeRequest, slot: int) -> PipelineState:
        """See Decoder. The prompt is cached by the first forward, which already denoises the first block."""
        request.check(self.denoiser)
        prompt = Block(0, len(request.prompt_ids), num_masked=0, stage=Stage.TO_CACHE)
        state = request.fresh_state(PipelineState, self.denoiser, slot, blocks=[prompt])
        self._open_blocks(state)
        return state

    def window(self, state: PipelineState) -> Window:
        """Everything that is not cached yet: clean blocks that will be, then the active ones."""
        active = state.active
        flags = sum(1 << index for index, block in enumerate(active) if block.fully_activated)
        stop = active[-1].stop
        return Window(
            start=state.cached, stop=stop, open_start=active[0].start, open_stop=stop, visible=stop, flags=flags
        )

    def step(self, batch: Batch, caches: Caches) -> torch.Tensor:
        """Step 6 of the algorithm: each active block commits what is sure, or one token if it must move."""
        mask = BlockCausal(batch.prompt_lens_B, self.config.block_size, batch.visible_B)
        logits = self.denoise(batch, mask, caches)
        tokens = choose(logits, batch.open_columns_BK, batch.sampling)
        sure, rank = self._certainty(logits, tokens)
        blocks = (-1, self.config.block_size)
        open_BNJ = batch.is_open_BK.unflatten(1, blocks)
        sure_BNJ = sure.unflatten(1, blocks) & open_BNJ
        index_N = torch.arange(open_BNJ.shape[1], device=open_BNJ.device)
        fully_BN = (batch.flags_B[:, None] >> index_N) & 1 == 1
        must_move_BN1 = (fully_BN & ~sure_BNJ.any(-1))[:, :, None]
        commit = sure_BNJ | (best_of(rank.unflatten(1, blocks), open_BNJ) & must_move_BN1)
        return torch.where(commit.flatten(1), tokens, batch.open_ids_BK)

    def update(self, state: PipelineState, window: Window) -> None:
        """Steps 5 and 6 (what was fed clean is cached; complete blocks move on), then 1 to 3 of the next iteration."""
        active = state.active
        self._count(state, active, window)
        for block in state.blocks[state.num_cached :]:
            if block.stage is not Stage.TO_CACHE:
                break
            block.stage = Stage.IN_CACHE
            state.num_cached += 1
            state.cached = block.stop if self.config.cache else 0
        for block in active:
            if block.num_masked:
                break
            block.stage = Stage.TO_CACHE
        self._drop_after_stop(state)
        state.commit_to(max(block.stop for block in state.blocks if block.stage is not Stage.ACTIVE))
        self._open_blocks(state)
        if state.blocks[-1].stage is not Stage.ACTIVE:
            state.finish_reason = "stop" if state.saw_stop else "length"

    def _count(self, state: PipelineState, active: list[Block], window: Window) -> None:
        """What the last forward committed."""
        tokens = state.tokens[window.open_start : window.open_stop]
        is_masked = tokens == state.mask_id
        for block in active:
            own = is_masked[block.start - window.open_start : block.stop - window.open_start]
            block.num_masked = int(np.count_nonzero(own))
        state.has_ended |= state.stop_at_eos and any(np.count_nonzero(tokens == stop) for stop in state.stop_ids)

    def _open_blocks(self, state: PipelineState) -> None:
        """Step 1, admission (at most one block), and step 2, activation."""
        last, size = state.blocks[-1], self.config.block_size
        room = last.stop < state.length and len(state.active) < self.config.max_active_blocks
        if room and last.ratio >= self.config.tau_add and not state.has_ended:
            stop = min(last.stop + size, state.length)
            state.blocks.append(Block(last.stop, stop, num_masked=stop - last.stop))
        for before, block in itertools.pairwise(state.blocks[max(state.num_cached - 1, 0) :]):
            if not block.fully_activated:
                block.fully_activated = before.ratio >= self.config.tau_act

    def _drop_after_stop(self, state: PipelineState) -> None:
        """Blocks after a complete block that holds a stop id cannot be part of the answer, nor change it."""
        if not state.has_ended:
            return
        for index, block in enumerate(state.blocks[1:], start=1):
            if not block.num_masked and state.has_stop(block.start, block.stop):
                del state.blocks[index + 1 :]
                state.tokens[block.stop :] = state.mask_id
                state.commit_step[block.stop - state.prompt_len :] = 0
                return

    def _certainty(self, logits: Logits, tokens_BK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tokens are sure (bool [B, K]), and the score by which a block that must move picks one."""
        tau, fallback = self.config.tau_entropy, self.config.fallback
        sure = logits.probability(tokens_BK) > self.config.tau_conf if tau is None else logits.entropy_BK <= tau
        if fallback == "margin":
            return sure, logits.margin_BK
        return sure, logits.probability(tokens_BK) if fallback == "probability" else -logits.entropy_BK
