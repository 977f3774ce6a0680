"""The LM head during training: the whole vocabulary, or the ids that occur plus random negatives."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


class TrainingHead:
    """Rows of the frozen LM head against which a step is scored.

    With a small target the full head costs most of a step. Scoring against the ids that occur in the
    trajectories and freshly drawn others trains the same argmax at a fraction of the price (sampled softmax,
    without correction: the draft is only ever asked for its argmax).

    Args:
        lm_head_VH: the target's head.
        occurring: ids that occur in responses; ignored when `num_negatives` is None.
        num_negatives: other ids drawn anew each step, each at most once, or all others if they are fewer; None scores
            the whole vocabulary.
    """

    def __init__(self, lm_head_VH: Tensor, occurring: Iterable[int], num_negatives: int | None) -> None:
        self.lm_head, self.num_negatives = lm_head_VH, num_negatives
        vocab = len(lm_head_VH)
        if num_negatives is None:
            return
        occurs = torch.zeros(vocab, dtype=torch.bool, device=lm_head_VH.device)
        occurs[torch.tensor(sorted(set(occurring)), dtype=torch.long, device=lm_head_VH.device)] = True
        self.fixed = occurs.nonzero()[:, 0]
        self.others = (~occurs).nonzero()[:, 0]
        self.slot = torch.full((vocab,), 0, dtype=torch.long, device=lm_head_VH.device)
        self.slot[self.fixed] = torch.arange(len(self.fixed), device=lm_head_VH.device)
        self.fixed_rows = lm_head_VH[self.fixed]

    def rows(self, seed: int) -> Tensor:
        """Head rows [V', H] of a step, its negatives drawn by a seed: the same on every device."""
        if self.num_negatives is None:
            return self.lm_head
        count = min(self.num_negatives, len(self.others))
        if count == 0:
            return self.fixed_rows
        # By the number drawn, not by the vocabulary: a permutation of 152k ids takes milliseconds of each step.
        chosen = np.random.default_rng(seed).choice(len(self.others), count, replace=False, shuffle=False)
        drawn = torch.from_numpy(chosen)
        if self.others.is_cuda:
            drawn = drawn.pin_memory().to(self.others.device, non_blocking=True)
        return torch.cat([self.fixed_rows, self.lm_head[self.others[drawn]]])

    def labels(self, ids: Tensor) -> Tensor:
        """Ids translated to indices into `rows`."""
        return ids if self.num_negatives is None else self.slot[ids]
