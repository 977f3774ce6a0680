"""Which hidden states of a target's step belong to the draft: kept rows, their positions, the anchors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from unmask.types import ProposalRow


def feature_rows(
    requests: Sequence[int],
    starts: np.ndarray,
    query_starts: np.ndarray,
    num_drafted: Sequence[int],
    sampled: Sequence[Sequence[int]],
) -> tuple[list[ProposalRow], Tensor | None]:
    """Rows of one step, rejected drafts dropped.

    A request's query is its anchor and the drafts that were verified (or a chunk of its prompt). Of these the anchor
    and the accepted drafts stay: as many rows as tokens were sampled. The last sampled token is the next anchor.

    Args:
        requests: R request numbers, in batch order.
        starts: position of each request's first query row, [R].
        query_starts: first query row of each request in the flat batch, and the end, [R + 1].
        num_drafted: drafts among each request's query rows.
        sampled: tokens that each request gained; empty inside a prompt.

    Returns:
        One `ProposalRow` a request, and the flat rows to keep (int64), None for all of them.
    """
    gained = np.array([len(tokens) for tokens in sampled], dtype=np.int64)
    drafted = np.array(num_drafted, dtype=np.int64)
    rejected = np.where(drafted > 0, drafted + 1 - np.maximum(gained, 1), 0)
    counts = np.diff(query_starts).astype(np.int64) - rejected
    rows = [
        ProposalRow(request=request, start=start, num_features=count, last_token=tokens[-1] if tokens else -1)
        for request, start, count, tokens in zip(requests, starts.tolist(), counts.tolist(), sampled, strict=True)
    ]
    if not rejected.any():
        return rows, None
    ends = np.cumsum(counts)
    kept = np.arange(ends[-1]) + np.repeat(query_starts[:-1] - ends + counts, counts)
    return rows, torch.from_numpy(kept)
