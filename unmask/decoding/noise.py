"""Gumbel noise as a pure function of (request seed, column, token), so that no sample depends on its batch."""

from __future__ import annotations

import torch

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, odd, as int64
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


def gumbel_noise(seeds_B: torch.Tensor, columns_BK: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise, float32 [B, K, V].

    Element (b, k, v) is a counter-based hash (SplitMix64) of the request's seed, the column and the token, turned
    into -log(-log u): the same whatever the batch, the step or the device, and shared by all models that score the
    same column.

    Args:
        seeds_B: int64 request seeds.
        columns_BK: int64 absolute columns.
    """
    tokens_V = torch.arange(vocab_size, device=columns_BK.device)
    key_BK = _mix(_mix(seeds_B * _GOLDEN)[:, None] + columns_BK * _GOLDEN)
    bits = _mix(key_BK[:, :, None] + (tokens_V + 1) * _GOLDEN)
    uniform = (_shift_right(bits, 12).double() + 0.5) * 2.0**-52
    return (-(-uniform.log()).log()).float()


def _mix(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser: a bijection of 64-bit words (int64 arithmetic wraps around)."""
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift of int64 (torch shifts arithmetically)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
