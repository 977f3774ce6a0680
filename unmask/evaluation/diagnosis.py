"""Why a pairing serves another acceptance length than was evaluated: the likely cause, from what can be seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unmask.evaluation.metrics import acceptance_length
from unmask.types import SamplingOptions

if TYPE_CHECKING:
    from unmask.models.dflash import DFlashDraft
    from unmask.models.target import TargetModel

TOLERANCE = 0.03
"""Relative difference of acceptance lengths that numerics and the end of responses may make."""


_Pair = tuple[Sequence[int], Sequence[int]]
"""`accepted` as served and as evaluated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """A prompt as the plain loop decoded it."""

    text: str
    """What the user wrote."""
    prompt_ids: Sequence[int]
    accepted: Sequence[int]
    """Accepted drafts of each verification."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A request as the engine saw it."""

    prompt_ids: Sequence[int]
    accepted: Sequence[int]
    cached_tokens: int = 0
    """Prompt tokens that the engine took from its prefix cache."""
    undrafted: int = 0
    """Forwards behind the first for which the draft had proposed nothing."""


def likely_cause(
    evaluated: Sequence[Evaluated],
    served: Sequence[Served],
    *,
    decode: Callable[[Sequence[int]], str],
    shifted: Mapping[int, Sequence[Sequence[int]]],
) -> str:
    """The first of these that fits.

    chat template: other prompts than evaluated, with the user's text in them. tokenizer: without it. prefix cache:
    requests with cached tokens lose acceptance and the others do not, because cached prompts gave no features. layer
    ids: the loop accepts what was served, or what was evaluated, when it reads its features from layers shifted by one.
    RoPE: acceptance falls off along a response, while its beginning is as evaluated. Otherwise the weights or the
    precision differ.

    Args:
        decode: ids to text, by the tokenizer that was evaluated with.
        shifted: `accepted_with_shift` of the first evaluated prompts, by the shift, 0 among them.

    Every evaluated prompt was served, once or several times.
    """
    if wrong := _wrong_prompts(evaluated, served, decode):
        return wrong
    wanted_of = {tuple(one.prompt_ids): one.accepted for one in evaluated}
    pairs = [(one, wanted_of[tuple(one.prompt_ids)]) for one in served]
    cached = [(one.accepted, wanted) for one, wanted in pairs if one.cached_tokens]
    fresh = [(one.accepted, wanted) for one, wanted in pairs if not one.cached_tokens]
    if cached and _kept(cached) < 1 - TOLERANCE and (not fresh or _kept(fresh) > 1 - TOLERANCE):
        return "prefix cache: prompts taken from the cache gave the draft no features"
    # Of a prompt that was served several times, the first: nothing of it was cached.
    first = {tuple(one.prompt_ids): one for one in reversed(served)}
    matched = [(first[tuple(one.prompt_ids)], one.accepted) for one in evaluated]
    if wrong := _wrong_layers(matched, shifted):
        return wrong
    beginnings, ends = zip(*(_halves(one.accepted, wanted) for one, wanted in matched), strict=True)
    if _kept(beginnings) > 1 - TOLERANCE and _kept(ends) < 1 - 2 * TOLERANCE:
        return "RoPE: acceptance falls with the position; base or scaling differ from those trained with"
    return "other weights or another precision than were evaluated"


def accepted_with_shift(
    target: TargetModel,
    draft: DFlashDraft,
    prompts: Sequence[Sequence[int]],
    shift: int,
    *,
    num_speculative_tokens: int,
    max_new_tokens: int,
    eos_ids: frozenset[int],
) -> list[list[int]]:
    """Accepted drafts of each verification of the greedy loop when features come from layers shifted by `shift`."""
    # Here, so that who only reads a verdict does without torch.
    from unmask.decoding.speculative import speculative_decode
    from unmask.models.target import TargetModel

    other = TargetModel(target.model, [layer + shift for layer in draft.config.target_layer_ids])
    options = SamplingOptions(max_tokens=max_new_tokens)
    return [
        speculative_decode(
            other, draft, list(ids), options, num_speculative_tokens=num_speculative_tokens, eos_ids=eos_ids
        ).accepted
        for ids in prompts
    ]


def _wrong_prompts(
    evaluated: Sequence[Evaluated], served: Sequence[Served], decode: Callable[[Sequence[int]], str]
) -> str | None:
    known = {tuple(one.prompt_ids) for one in evaluated}
    others = [decode(one.prompt_ids) for one in served if tuple(one.prompt_ids) not in known]
    if not others:
        return None
    if all(any(one.text in text for one in evaluated) for text in others):
        return "chat template: the users' texts were served in other surroundings than evaluated"
    return "tokenizer: the users' texts were served as other tokens than evaluated"


def _wrong_layers(
    matched: Sequence[tuple[Served, Sequence[int]]], shifted: Mapping[int, Sequence[Sequence[int]]]
) -> str | None:
    prompts = len(shifted[0])
    served = _length([one.accepted for one, _ in matched[:prompts]])
    evaluated = _length([wanted for _, wanted in matched[:prompts]])
    as_served, as_evaluated = (
        [shift for shift, accepted in shifted.items() if abs(length / _length(accepted) - 1) <= TOLERANCE]
        for length in (served, evaluated)
    )
    if 0 in as_evaluated and as_served and 0 not in as_served:
        return f"layer ids: served with features {as_served[0]:+d} from the layers that the draft names"
    if 0 in as_served and as_evaluated and 0 not in as_evaluated:
        return f"layer ids: the draft names layers {-as_evaluated[0]:+d} from those that were evaluated"
    return None


def _length(accepted: Iterable[Sequence[int]]) -> float:
    return acceptance_length([count for of_one in accepted for count in of_one])


def _kept(pairs: Sequence[_Pair]) -> float:
    """Share of the evaluated drafts (bonus tokens not counted) that serving accepts too."""
    served, evaluated = (_length(side) - 1 for side in zip(*pairs, strict=True))
    return served / evaluated if evaluated else 1.0


def _halves(served: Sequence[int], evaluated: Sequence[int]) -> tuple[_Pair, _Pair]:
    """The verifications of a response's first half, and those of its second."""
    middle, wanted = len(served) // 2, len(evaluated) // 2
    return (served[:middle], evaluated[:wanted]), (served[middle:], evaluated[wanted:])
