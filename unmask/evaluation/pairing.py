"""A pairing on held-out prompts: acceptance by the real loop, identity with the target's own text, speed, n-grams."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from unmask.decoding.ngram import NgramProposer, replay
from unmask.decoding.speculative import SpeculativeResult, speculative_decode
from unmask.evaluation.metrics import acceptance_by_position, acceptance_length, bootstrap_interval
from unmask.models.dflash import DFlashDraft
from unmask.models.target import TargetModel
from unmask.objectives.confidence import ConfidenceHead, error_of
from unmask.types import SamplingOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOutcome:
    """One prompt: the target's own greedy response and what drafts made of it."""

    prompt_ids: list[int]
    response_ids: list[int]
    """The target's own greedy response (no draft)."""
    identical: bool
    """Whether the speculative loop emitted the same tokens."""
    accepted: list[int]
    """Accepted drafts of each verification, before the response is cut at EOS or length."""
    accepted_ngram: list[int]
    judged: list[tuple[float, bool]]
    """With a confidence head: the chance that it gave each judged row, and whether that was accepted."""
    seconds: float
    seconds_target_only: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SetSummary:
    """A set of prompts, pooled over verifications."""

    prompts: int
    tokens: int
    identical: int
    acceptance_length: float
    interval95: list[float]
    acceptance_by_position: list[float]
    acceptance_length_ngram: float
    confidence_error: float | None
    """Expected calibration error of the draft's confidence head over all judged rows; None without one."""
    tokens_per_second: float
    tokens_per_second_target_only: float


class PairingEvaluator:
    """Runs prompts through the plain speculative loop in float32, where greedy text is comparable token by token.

    Args:
        num_speculative_tokens: K.
        eos_ids: tokens that end a response.
        ngrams: the baseline that fills the same K.
        confidence: the draft's head, if it has one.
    """

    def __init__(
        self,
        target: TargetModel,
        draft: DFlashDraft,
        *,
        num_speculative_tokens: int,
        max_new_tokens: int,
        eos_ids: frozenset[int],
        ngrams: NgramProposer,
        confidence: ConfidenceHead | None = None,
    ) -> None:
        self.target, self.draft, self.ngrams, self.confidence = target, draft, ngrams, confidence
        self.num_tokens, self.eos_ids = num_speculative_tokens, eos_ids
        self.options = SamplingOptions(max_tokens=max_new_tokens)

    def run(self, prompt_ids: Sequence[int]) -> PromptOutcome:
        """Decode one prompt with the target alone and with the pairing."""
        prompt = list(prompt_ids)
        start = time.perf_counter()
        plain = self._decode(prompt, None, self.options)
        middle = time.perf_counter()
        paired = self._decode(prompt, self.draft, self.options)
        end = time.perf_counter()
        # n-grams are replayed along the target's text, continued so that the last verification is not cut short.
        beyond = SamplingOptions(max_tokens=self.num_tokens, ignore_eos=True)
        continued = plain.token_ids + self._decode(prompt + plain.token_ids, None, beyond).token_ids
        return PromptOutcome(
            prompt_ids=prompt,
            response_ids=plain.token_ids,
            identical=paired.token_ids == plain.token_ids,
            accepted=paired.accepted,
            accepted_ngram=replay(self.ngrams, prompt, continued, self.num_tokens, until=len(plain.token_ids)),
            judged=paired.judged,
            seconds=end - middle,
            seconds_target_only=middle - start,
        )

    def _decode(self, prompt: list[int], draft: DFlashDraft | None, options: SamplingOptions) -> SpeculativeResult:
        return speculative_decode(
            self.target,
            draft,
            prompt,
            options,
            num_speculative_tokens=self.num_tokens,
            eos_ids=self.eos_ids,
            confidence=self.confidence,
        )


def summarise(outcomes: Sequence[PromptOutcome], num_speculative_tokens: int) -> SetSummary:
    """Pool the outcomes of a set."""
    accepted = [a for outcome in outcomes for a in outcome.accepted]
    tokens = sum(len(outcome.response_ids) for outcome in outcomes)
    return SetSummary(
        prompts=len(outcomes),
        tokens=tokens,
        identical=sum(outcome.identical for outcome in outcomes),
        acceptance_length=acceptance_length(accepted),
        interval95=bootstrap_interval([outcome.accepted for outcome in outcomes]),
        acceptance_by_position=acceptance_by_position(accepted, num_speculative_tokens),
        acceptance_length_ngram=acceptance_length([a for outcome in outcomes for a in outcome.accepted_ngram]),
        confidence_error=error_of([row for outcome in outcomes for row in outcome.judged]),
        tokens_per_second=tokens / max(sum(outcome.seconds for outcome in outcomes), 1e-9),
        tokens_per_second_target_only=tokens / max(sum(outcome.seconds_target_only for outcome in outcomes), 1e-9),
    )
