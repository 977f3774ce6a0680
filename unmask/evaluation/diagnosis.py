"""Why a pairing serves another acceptance length than was evaluated: the likely cause, from what can be seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unmask.evaluation.metrics import acceptance_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What is known of one served request and of its evaluation."""

    prompt_tokens: int
    prompt_tokens_evaluated: int
    cached_tokens: int
    """Prompt tokens that the engine took from its prefix cache."""
    accepted: Sequence[int]
    """Accepted drafts of each verification."""
    accepted_evaluated: Sequence[int]


def likely_cause(requests: Sequence[Served]) -> str:
    """The first of these that fits.

    chat template: prompts have other lengths than evaluated ones. prefix cache: requests with cached tokens lose
    acceptance and the others do not, because cached prompts gave no features. layer ids: nearly nothing is accepted.
    RoPE: acceptance falls off along a response, while its beginning is as evaluated. Otherwise the weights or the
    precision differ.
    """
    if any(r.prompt_tokens != r.prompt_tokens_evaluated for r in requests):
        return "another chat template: prompts have other lengths than the evaluated ones"
    cached, fresh = [r for r in requests if r.cached_tokens], [r for r in requests if not r.cached_tokens]
    if cached and _kept(cached) < 0.97 and (not fresh or _kept(fresh) > 0.97):
        return "prefix cache: prompts taken from the cache gave the draft no features"
    if _kept(requests) < 0.35:
        return "layer ids: the draft reads features that it was not trained on"
    halves = [_kept([_half(r, second) for r in requests]) for second in (False, True)]
    if halves[0] > 0.97 and halves[1] < 0.94:
        return "RoPE: acceptance falls with the position; base or scaling differ from those trained with"
    return "other weights or another precision than were evaluated"


def _kept(requests: Sequence[Served]) -> float:
    """Share of the evaluated drafts (bonus tokens not counted) that serving accepts too."""
    served = acceptance_length([a for r in requests for a in r.accepted]) - 1
    evaluated = acceptance_length([a for r in requests for a in r.accepted_evaluated]) - 1
    return served / evaluated if evaluated else 1.0


def _half(request: Served, second: bool) -> Served:
    parts = []
    for accepted in (request.accepted, request.accepted_evaluated):
        middle = len(accepted) // 2
        parts.append(accepted[middle:] if second else accepted[:middle])
    return Served(
        prompt_tokens=request.prompt_tokens,
        prompt_tokens_evaluated=request.prompt_tokens_evaluated,
        cached_tokens=request.cached_tokens,
        accepted=parts[0],
        accepted_evaluated=parts[1],
    )
