"""Sampled requests with drafts keep the target's distribution on CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.platforms import current_platform
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata

from engines.cpu_sampling import expand_batch_to_tokens, repair_cpu_sampling

K = 2
VOCAB = 7


@given(
    st.lists(st.tuples(st.integers(0, 4), st.floats(0, 2, width=32)), min_size=1, max_size=5),
    st.sampled_from([torch.float32, torch.int32]),
)
def test_each_value_is_repeated_for_each_token(requests: list[tuple[int, float]], dtype: torch.dtype):
    counts = torch.tensor([count for count, _ in requests], dtype=torch.int32)
    x = torch.tensor([value for _, value in requests]).to(dtype)
    expected = [
        1 if value == 0 else value for value, n in zip(x.tolist(), counts.tolist(), strict=True) for _ in range(n)
    ]
    got = expand_batch_to_tokens(x, counts.cumsum(0, dtype=torch.int32), len(expected), replace_from=0, replace_to=1)
    assert got.dtype == dtype
    assert got.tolist() == expected


def first_tokens(logits: torch.Tensor, temperature: float, top_k: int | None, rows: int) -> torch.Tensor:
    """What vLLM's sampler emits first for many requests that all draft the same block [rows]."""
    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()
    repair_cpu_sampling()
    metadata = SamplingMetadata(
        temperature=torch.full((rows,), temperature),
        all_greedy=False,
        all_random=True,
        top_p=None,
        top_k=None if top_k is None else torch.full((rows,), top_k, dtype=torch.int32),
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=torch.zeros(rows),
        presence_penalties=torch.zeros(rows),
        repetition_penalties=torch.ones(rows),
        output_token_ids=[[] for _ in range(rows)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )
    cumulative = torch.arange(K, rows * K + 1, K, dtype=torch.int32)
    target = rejection_sampler.apply_sampling_constraints(logits.repeat(rows * K, 1), cumulative, metadata)
    drafts = torch.tensor([1, 2], dtype=torch.int32).repeat(rows)
    bonus = torch.zeros(rows, 1, dtype=torch.int32)
    output = rejection_sampler.rejection_sample(drafts, [K] * rows, K, cumulative, None, target, bonus, metadata)
    return output[:, 0].long()


@pytest.mark.skipif(not current_platform.is_cpu(), reason="the CPU kernels are tested")
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.6, None), (1.7, 3)])
def test_the_first_token_follows_the_target(temperature: float, top_k: int | None):
    rows = 40_000
    torch.manual_seed(0)
    logits = torch.randn(VOCAB) * 2
    scaled = logits / temperature
    if top_k is not None:
        scaled[scaled < scaled.topk(top_k).values[-1]] = -torch.inf
    expected = scaled.softmax(0)
    counts = torch.bincount(first_tokens(logits, temperature, top_k, rows), minlength=VOCAB)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi_square = ((counts - rows * expected) ** 2 / (rows * expected))[kept].sum()
    assert chi_square < 30, "p = 4e-5 at 6 degrees of freedom"
