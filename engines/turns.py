"""Two half batches that take turns: while one is verified by the target, the other is drafted.

A request that drafted in a step sits the next one out, and its proposals are fetched when that one has been queued. The
draft's time and the way to it then pass beside the target's work, at the price of twice as many steps of half the size:
worth it where a step's time goes with its size. The tables of K see batches of the halves' size; `LoadWatch` learns
nothing meanwhile, for what lies between two marks is then another half's time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Owed:
    """Proposals that come later: whose, and int32 [R] the slots of the step's requests."""

    names: frozenset[str]
    slots: Tensor


class Turns:
    """Whether the requests of a scheduler take turns; one of a process, for scheduler and speculator.

    Attributes:
        least: requests beyond their prompts from which they do, and go on with until a quarter of them has left; None
            is never.
        has_draft: whether anybody drafts; if nobody does, there is no time to hide.
    """

    def __init__(self, least: int | None = None) -> None:
        self.least = least
        self.has_draft = True
        self._going = False

    def give(self, scheduler: Any, scheduled: list[Any]) -> bool:
        """Decide on the requests that draft in the step that was just scheduled.

        Args:
            scheduler: vLLM's; what it sets of a request's `next_decode_eligible_step` is made later here.
            scheduled: its requests that have a token sampled in this step.

        Returns:
            Whether none of them is in the next step, so that their proposals may come later.
        """
        decoding = [request for request in scheduler.running if not request.is_prefill_chunk]
        if not self._is_worth(decoding):
            return False
        for request in scheduled:
            request.next_decode_eligible_step = scheduler.current_step + 2
        surplus = max((2 * len(scheduled) - len(decoding)) // 2, 0)
        # Many, as at the first time, are a half to go on with at once; a few go over to the other half.
        at_once = surplus > len(decoding) // 8
        for request in scheduled[len(scheduled) - surplus :]:
            request.next_decode_eligible_step += -1 if at_once else 1
        return not at_once

    def _is_worth(self, decoding: list[Any]) -> bool:
        if self.least is None:
            return False
        self._going = len(decoding) >= (max(2, 3 * self.least // 4) if self._going else self.least)
        # A grammar wants to see the proposals before they are verified.
        return self._going and self.has_draft and not any(request.use_structured_output for request in decoding)


turns = Turns()
"""Of this process."""
