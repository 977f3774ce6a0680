"""One denoising pass over the blocks of a batch, and the most likely id at every mask."""

from __future__ import annotations

import logging
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.errors import PairingError
from unmask.masking.anchored import context_mask
from unmask.models.dflash import DFlashConfig, DFlashDraft
from unmask.objectives.confidence import ConfidenceHead
from unmask.pairing.context_cache import ContextCache
from unmask.pairing.page_tables import PageTable

warn_once = cache(logging.getLogger(__name__).warning)
"""Say the same thing once a process: drafts come and go."""

_LOGITS_PER_CHUNK = {"cpu": 2**26, "cuda": 2**28}
"""The head is applied to as many rows at a time as keep the logits below this number."""


class BlockDrafter:
    """Drafts blocks by gathering each request's context in front of them: the reference, and what a CPU runs.

    Args:
        draft: the network, on its device.
        embedding: the target's token embeddings [V, H]; `lm_head` its LM head [V, H].
        cache: context of the requests that page tables name.
        confidence: the draft's confidence head, if it has one.
    """

    uses_confidence = True
    """Whether blocks end where a confidence head doubts them."""

    def __init__(
        self,
        draft: DFlashDraft,
        embedding: Tensor,
        lm_head: Tensor,
        cache: ContextCache,
        confidence: ConfidenceHead | None = None,
    ) -> None:
        self._draft, self._embedding, self._lm_head, self._cache = draft, embedding, lm_head, cache
        self._confidence = confidence

    def append(self, context: Tensor, positions: np.ndarray, slots: np.ndarray) -> None:
        """Store what context rows [T, H] at `positions` [T] contribute to attention at `slots` [T] of the cache."""
        device = self._embedding.device
        on_device = torch.from_numpy(np.stack([positions, slots])).to(device)
        self._cache.write(on_device[1], *self._draft.context_kv(context.to(device), on_device[0]))

    def draft(self, last_tokens: np.ndarray, anchors: np.ndarray, table: PageTable, k: int) -> np.ndarray:
        """Greedy ids int32 [B, K] of requests with the anchor token `last_tokens` at position `anchors`."""
        return self._ids(self._states(last_tokens, anchors, table, k))

    def draft_worthwhile(
        self, last_tokens: np.ndarray, anchors: np.ndarray, table: PageTable, k: int, min_chance: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same, and how many of each block [B] to propose: those that are accepted with at least the chance
        `min_chance` [B] by the confidence head, but always the first. Without a head all."""
        if self._confidence is None or not min_chance.any():
            return self.draft(last_tokens, anchors, table, k), np.full(len(anchors), k)
        states_BKH = self._states(last_tokens, anchors, table, k)
        chances_BK = self._confidence.chances(states_BKH).cpu().numpy()
        return self._ids(states_BKH), (chances_BK >= min_chance[:, None]).sum(1).clip(min=1)

    def _states(self, last_tokens: np.ndarray, anchors: np.ndarray, table: PageTable, k: int) -> Tensor:
        """Final states [B, K, H] of the masked rows."""
        device = self._embedding.device
        ids_BQ = torch.full((len(anchors), k + 1), self._draft.config.mask_token_id, dtype=torch.int64)
        ids_BQ[:, 0] = torch.from_numpy(last_tokens)
        positions_BQ = torch.from_numpy(anchors)[:, None] + torch.arange(k + 1)
        x_BQH = F.embedding(ids_BQ.to(device), self._embedding)
        keys, values = self._cache.gather(table)
        lengths, gaps = (torch.from_numpy(a).to(device) for a in (table.lengths, table.gaps))
        mask = context_mask(lengths, keys.shape[2], k + 1, gaps)
        return self._draft(x_BQH, positions_BQ.to(device), keys, values, mask)[:, 1:]

    def _ids(self, states_BKH: Tensor) -> np.ndarray:
        ids = most_likely(states_BKH.flatten(0, 1), self._lm_head)
        return ids.view(states_BKH.shape[:2]).to("cpu", torch.int32).numpy()


def head_for(config: DFlashConfig, head: ConfidenceHead | None) -> ConfidenceHead | None:
    """The confidence head if it can be used; one that was trained on sampled text is not, with a warning.

    Targets name a chance for steps of greedy requests alone.

    Raises:
        PairingError: it is the head of another draft.
    """
    if head is None:
        return None
    sizes, wanted = (len(head.weight), len(head.bias)), (config.hidden_size, config.block_size - 1)
    if sizes != wanted:
        raise PairingError(
            f"the confidence head is for {sizes[0]} states and {sizes[1]} rows, the draft has {wanted[0]} and "
            f"{wanted[1]}; publish them together",
            field="confidence",
        )
    if head.temperature:
        warn_once(
            f"the draft's confidence head was trained on text of temperature {head.temperature:g} and says nothing of "
            "greedy requests: it is not used, blocks are proposed whole"
        )
        return None
    return head


def most_likely(hidden_NH: Tensor, lm_head: Tensor) -> Tensor:
    """Ids [N] over the full vocabulary."""
    chunk = max(1, _LOGITS_PER_CHUNK[lm_head.device.type] // len(lm_head))
    return torch.cat([F.linear(rows, lm_head).argmax(-1) for rows in hidden_NH.split(chunk)])
