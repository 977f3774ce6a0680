"""Likeliest token, log of the sum of exponentials and entropy of each row in one pass over the vocabulary.

With the running peak m, s = sum exp(x - m) and u = sum exp(x - m) (x - m): log Z = m + log s, H = log s - u / s. When
the peak rises by d, s becomes exp(-d) s and u becomes exp(-d) (u - d s).
"""

from __future__ import annotations

import torch
import triton  # pyrefly: ignore[missing-import]
import triton.language as tl  # pyrefly: ignore[missing-import]
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _digest(logits, row_stride, best, logsumexp, entropy, forbidden, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    source = logits + row.to(tl.int64) * row_stride
    peak, total, moment = float("-inf"), 0.0, 0.0
    # Of a row without any number, a token that may be committed.
    winner = tl.where(forbidden == 0, 1, 0)
    for begin in range(0, VOCAB, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        x = tl.load(source + token, mask=(token < VOCAB) & (token != forbidden), other=float("-inf")).to(tl.float32)
        highest = tl.max(x, axis=0)
        # The first of equal ones wins, in a tile and among tiles.
        winner = tl.where(highest > peak, begin + tl.argmax(x, axis=0), winner)
        new_peak = tl.maximum(peak, highest)
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        rise = tl.where(peak == float("-inf"), 0.0, shift - peak)
        decay = tl.where(peak == float("-inf"), 0.0, tl.exp(-rise))
        below = x - shift
        weight = tl.exp(below)
        moment = decay * (moment - rise * total) + tl.sum(tl.where(weight > 0, weight * below, 0.0), axis=0)
        total = decay * total + tl.sum(weight, axis=0)
        peak = new_peak
    tl.store(best + row, winner)
    tl.store(logsumexp + row, peak + tl.log(total))
    uncertain = tl.log(total) - moment / total
    # Rounding may leave a little below 0; what is no number stays none, and is never taken for certain.
    tl.store(entropy + row, tl.where(uncertain < 0, 0.0, uncertain))


def digest(raw_BKV: Tensor, forbidden: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """See `digest_reference`, which this equals up to rounding.

    Args:
        raw_BKV: on a GPU, in any float dtype; every row contiguous.
        forbidden: token that does not count.
    """
    rows = raw_BKV.flatten(0, 1)
    best = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    logsumexp, entropy = (torch.empty(len(rows), dtype=torch.float32, device=rows.device) for _ in range(2))
    if len(rows):
        excluded = -1 if forbidden is None else forbidden
        _digest[(len(rows),)](
            rows, rows.stride(0), best, logsumexp, entropy, excluded, VOCAB=rows.shape[1], BLOCK=_BLOCK, num_warps=8
        )
    shape = raw_BKV.shape[:2]
    return best.view(shape), logsumexp.view(shape), entropy.view(shape)
