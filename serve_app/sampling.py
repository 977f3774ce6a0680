"""From the fields of a request to what the backend is asked for."""

from __future__ import annotations

import json
from dataclasses import replace

from serve_app import errors
from serve_app.generation import ChoiceSpec
from serve_app.protocol import MAX_SCHEMA_CHARS, GenerationRequest
from unmask.types import SamplingOptions

_GATHER_S = 0.05
"""Of an answer that goes out whole: short enough for stop strings and leaving clients to take effect soon."""


def choice_specs(body: GenerationRequest, prompts: list[list[int]], options: list[SamplingOptions]) -> list[ChoiceSpec]:
    """`n` choices for each prompt, in the API's order; a seeded request gives each of the `n` its own seed."""
    specs = []
    for prompt_ids, base in zip(prompts, options, strict=True):
        for index in range(body.n or 1):
            seed = None if base.seed is None else (base.seed + index) % 2**63
            specs.append(
                ChoiceSpec(prompt_ids=prompt_ids, options=replace(base, seed=seed), stops=tuple(body.stop or ()))
            )
    return specs


def sampling_options(body: GenerationRequest, *, max_tokens: int, logprobs: int | None) -> SamplingOptions:
    """The options of one prompt; the API samples at temperature 1 unless told otherwise."""
    return SamplingOptions(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        seed=body.seed,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logprobs=logprobs,
        json_schema=_json_schema(body),
        gather_s=0.0 if body.stream else _GATHER_S,
        decoder=body.decoder,
    )


def fit_context(
    prompt_len: int, wanted: int | None, *, default: int | None, max_model_len: int, prompt_param: str, max_param: str
) -> int:
    """Tokens that a response may have.

    Args:
        prompt_len: tokens of the prompt.
        wanted: what the request asks for, or None.
        default: used when nothing is asked for; None takes all that fits.
        max_model_len: longest prompt + response, in tokens.
        prompt_param: name of the request's prompt field, for errors.
        max_param: name of the request's length field, for errors.

    Raises:
        ApiError: the prompt, or the prompt with the response asked for, does not fit.
    """
    code = "context_length_exceeded"
    room = max_model_len - prompt_len
    if prompt_len == 0:
        raise errors.invalid("the prompt is empty", prompt_param)
    if room < 1:
        raise errors.invalid(
            f"the prompt has {prompt_len} tokens; prompt and response may have {max_model_len} together",
            prompt_param,
            code,
        )
    if wanted is not None and wanted > room:
        raise errors.invalid(
            f"asks for {wanted} tokens after a prompt of {prompt_len}; both may have {max_model_len} together",
            max_param,
            code,
        )
    return wanted or min(room, default or room)


def _json_schema(body: GenerationRequest) -> str | None:
    form = body.response_format
    if form is None or form.type == "text":
        return None
    if form.json_schema is None:
        return '{"type": "object"}'
    text = json.dumps(form.json_schema.schema_)
    if len(text) > MAX_SCHEMA_CHARS:
        raise errors.invalid(f"the schema exceeds {MAX_SCHEMA_CHARS} characters", "response_format.json_schema.schema")
    return text
