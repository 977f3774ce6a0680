"""Fewer, larger deltas where nobody watches them come: each costs a message between processes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from unmask.types import TokenDelta


async def gathered(deltas: AsyncIterator[TokenDelta], gather_s: float) -> AsyncIterator[TokenDelta]:
    """The same tokens in the same order: the first at once, then no more often than every `gather_s` seconds.

    A delta waits for the next one at most, as no timer ends its wait; the last is passed on as it comes.
    """
    held, passed_on = None, float("-inf")
    async for delta in deltas:
        held = delta if held is None else _joined(held, delta)
        now = time.monotonic()
        if held.finish_reason is not None or now - passed_on >= gather_s:
            yield held
            held, passed_on = None, now


def _joined(first: TokenDelta, second: TokenDelta) -> TokenDelta:
    logprobs = None
    if first.logprobs is not None and second.logprobs is not None:
        logprobs = first.logprobs + second.logprobs
    return TokenDelta(
        token_ids=first.token_ids + second.token_ids,
        finish_reason=second.finish_reason,
        logprobs=logprobs,
        num_forwards=second.num_forwards,
    )
