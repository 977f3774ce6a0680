"""A correction to vLLM's rejection sampler on CPU, where sampled requests with drafts lost the target's distribution.

vLLM 0.32's CPU form of `expand_kernel` writes into an int64 copy that is then dropped, so that temperature, top-p and
top-k of drafted positions are left as uninitialised memory. Greedy requests do not use them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.sample import rejection_sampler


def expand_batch_to_tokens(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: float = 0, replace_to: float = 0
) -> Tensor:
    """Repeat each request's value for each of its tokens.

    Args:
        x: values [R].
        cu_num_tokens: tokens of the requests up to and including each [R].
        num_tokens: tokens of all requests, T.
        replace_from: value that is replaced.
        replace_to: what it is replaced by.

    Returns:
        Values [T], of the type of `x`.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    replaced = torch.where(x == replace_from, torch.as_tensor(replace_to, dtype=x.dtype), x)
    return replaced.repeat_interleave(counts, output_size=num_tokens)


def repair_cpu_sampling() -> None:
    """Put `expand_batch_to_tokens` in the place of vLLM's on CPU; does nothing elsewhere."""
    if current_platform.is_cpu():
        rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
