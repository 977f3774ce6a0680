"""What decoders share on the device: forbid the mask token, choose a token a column, measure certainty.

Everything is float32, row-wise and free of synchronisation. Dimension letters: B rows, K read columns, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

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


def forbid(logits_BKV: torch.Tensor, token: int | None) -> torch.Tensor:
    """Float32 logits in which `token` has probability 0: a mask token that is committed would never be denoised."""
    logits_BKV = logits_BKV.to(torch.float32, copy=True)
    if token is not None and token < logits_BKV.shape[-1]:
        logits_BKV[..., token] = -torch.inf
    return logits_BKV


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


def choose(logits_BKV: torch.Tensor, columns_BK: torch.Tensor, sampling: Sampling | None) -> torch.Tensor:
    """A token for every column, int64 [B, K]: the likeliest one, or a sample by the Gumbel-max trick."""
    if sampling is None:
        return logits_BKV.argmax(-1)
    log_probs = nucleus(tempered(logits_BKV, sampling), sampling)
    return (log_probs + row_noise(sampling, columns_BK, logits_BKV.shape[-1])).argmax(-1)


def probability(logits_BKV: torch.Tensor, tokens_BK: torch.Tensor) -> torch.Tensor:
    """softmax(z)[token], float32 [B, K]: the model's own confidence, whatever the sampling temperature."""
    chosen = logits_BKV.gather(-1, tokens_BK[:, :, None])[:, :, 0]
    return (chosen - logits_BKV.logsumexp(-1)).exp()


def margin(logits_BKV: torch.Tensor) -> torch.Tensor:
    """Probability of the likeliest token minus that of the second, float32 [B, K]."""
    best = logits_BKV.topk(2, dim=-1).values
    likeliest, second = (best - logits_BKV.logsumexp(-1, keepdim=True)).exp().unbind(-1)
    return likeliest - second


def entropy(logits_BKV: torch.Tensor) -> torch.Tensor:
    """Entropy of softmax(z) in nats, float32 [B, K]."""
    return torch.special.entr(logits_BKV.softmax(-1)).sum(-1)


def best_of(score_BK: torch.Tensor, is_open_BK: torch.Tensor) -> torch.Tensor:
    """True at the open column of highest score, along the last axis; nowhere where none is open."""
    best = score_BK.masked_fill(~is_open_BK, -torch.inf).argmax(-1, keepdim=True)
    return torch.zeros_like(is_open_BK).scatter(-1, best, True) & is_open_BK
