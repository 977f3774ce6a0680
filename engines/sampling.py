"""`SamplingOptions` in vLLM's words, and vLLM's log-probabilities in ours."""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from unmask.types import SamplingOptions


def sampling_params(options: SamplingOptions, output_kind: RequestOutputKind) -> SamplingParams:
    """vLLM's parameters for one request, ids in and ids out. Raises ValueError for values that vLLM refuses."""
    grammar = None
    if options.json_schema is not None or options.structural_tag is not None:
        grammar = StructuredOutputsParams(json=options.json_schema, structural_tag=options.structural_tag)
    return SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed if options.temperature > 0 else None,
        ignore_eos=options.ignore_eos,
        stop_token_ids=list(options.stop_token_ids),
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        logprobs=options.logprobs,
        structured_outputs=grammar,
        detokenize=False,
        output_kind=output_kind,
    )


def plain_logprobs(logprobs: Any) -> list[dict[int, float]] | None:
    """Log-probabilities by token id, one mapping a token."""
    if logprobs is None:
        return None
    return [{token: float(entry.logprob) for token, entry in position.items()} for position in logprobs]
