"""What decoders share on the device: choose a token a column, and the surest of them.

Everything is float32, row-wise and free of synchronisation. Dimension letters: B rows, K read columns, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unmask.decoding.logits import Logits
from unmask.decoding.noise import gumbel_noise


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the rows of a batch are sampled; absent where all of them are greedy."""

    temperature_B: torch.Tensor
    """Float32; 0 is greedy."""
    top_p_B: torch.Tensor
    """Float32; 1 keeps the whole vocabulary."""
    seeds_B: torch.Tensor
    nucleus: bool
    """Whether any row has top_p < 1 (sorting the vocabulary is worth avoiding)."""


def tempered(logits_BKV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Log-probabilities at each row's temperature (greedy rows: at 1, which leaves the argmax)."""
    temperature_B = torch.where(sampling.temperature_B > 0, sampling.temperature_B, 1.0)
    return (logits_BKV / temperature_B[:, None, None]).log_softmax(-1)


def nucleus(log_probs_BKV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Top-p: -inf outside of the smallest set of likeliest tokens whose mass reaches top_p, then renormalised."""
    if not sampling.nucleus:
        return log_probs_BKV
    top_p_B11 = sampling.top_p_B[:, None, None]
    ordered, order = log_probs_BKV.sort(dim=-1, descending=True)
    mass_before = ordered.exp().cumsum(-1) - ordered.exp()
    dropped = (mass_before >= top_p_B11) & (top_p_B11 < 1)
    dropped = torch.zeros_like(dropped).scatter(-1, order, dropped)
    return log_probs_BKV.masked_fill(dropped, -torch.inf).log_softmax(-1)


def row_noise(sampling: Sampling, columns_BK: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Gumbel noise [B, K, V] of the rows that sample; 0 for greedy rows."""
    noise = gumbel_noise(sampling.seeds_B, columns_BK, vocab_size)
    return noise * (sampling.temperature_B > 0)[:, None, None]


def choose(logits: Logits, columns_BK: torch.Tensor, sampling: Sampling | None) -> torch.Tensor:
    """A token for every column, int64 [B, K]: the likeliest one, or a sample by the Gumbel-max trick."""
    if sampling is None:
        return logits.best_BK
    values = logits.values_BKV
    log_probs = nucleus(tempered(values, sampling), sampling)
    return (log_probs + row_noise(sampling, columns_BK, values.shape[-1])).argmax(-1)


def best_of(score_BK: torch.Tensor, is_open_BK: torch.Tensor) -> torch.Tensor:
    """True at the open column of highest score, along the last axis; nowhere where none is open."""
    best = score_BK.masked_fill(~is_open_BK, -torch.inf).argmax(-1, keepdim=True)
    return torch.zeros_like(is_open_BK).scatter(-1, best, True) & is_open_BK
