from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from serve_app.gathering import gathered
from unmask.types import TokenDelta


async def steps(deltas: Sequence[TokenDelta]) -> AsyncIterator[TokenDelta]:
    for delta in deltas:
        await asyncio.sleep(0)
        yield delta


def response(num_tokens: int, *, logprobs: bool) -> list[TokenDelta]:
    return [
        TokenDelta(
            token_ids=[token],
            logprobs=[{token: -0.5}] if logprobs else None,
            finish_reason="stop" if token == num_tokens - 1 else None,
            num_forwards=num_tokens if token == num_tokens - 1 else None,
        )
        for token in range(num_tokens)
    ]


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 7])
async def test_the_first_comes_at_once_and_the_rest_together(num_tokens: int, logprobs: bool):
    parts = [part async for part in gathered(steps(response(num_tokens, logprobs=logprobs)), 60.0)]
    assert parts[0].token_ids == [0]
    assert len(parts) == min(num_tokens, 2)
    assert [token for part in parts for token in part.token_ids] == list(range(num_tokens))
    assert (parts[-1].finish_reason, parts[-1].num_forwards) == ("stop", num_tokens)
    if logprobs:
        assert [table for part in parts for table in part.logprobs or ()] == [{t: -0.5} for t in range(num_tokens)]


async def test_without_a_window_nothing_is_gathered():
    deltas = response(5, logprobs=True)
    assert [part async for part in gathered(steps(deltas), 0.0)] == deltas
