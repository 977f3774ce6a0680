"""Two half batches that take turns: while one is verified by the target, the other is drafted.

A request that drafted in a step sits the next one out, and its proposals are fetched when that one has been queued. The
draft's time and the way to it then pass beside the target's work, at the price of twice as many steps of half the size:
worth it where a step's time goes with its size. `LoadWatch` and the tables of K see batches of the halves' size.
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
        least: running requests from which they do; None is never.
    """

    def __init__(self, least: int | None = None) -> None:
        self.least = least

    def give(self, scheduler: Any, scheduled: list[Any]) -> bool:
        """Decide on the requests that draft in the step that was just scheduled.

        Args:
            scheduler: vLLM's; what it sets of a request's `next_decode_eligible_step` is made later here.
            scheduled: its requests that have a token sampled in this step.

        Returns:
            Whether none of them is in the next step, so that their proposals may come later.
        """
        running = scheduler.running
        if self.least is None or len(running) < self.least or any(r.use_structured_output for r in running):
            # A grammar wants to see the proposals before they are verified.
            return False
        for request in scheduled:
            request.next_decode_eligible_step = scheduler.current_step + 2
        surplus = (2 * len(scheduled) - len(running)) // 2
        # They go over to the other half.
        for request in scheduled[len(scheduled) - max(surplus, 0) :]:
            request.next_decode_eligible_step += 1
        return True


turns = Turns()
"""Of this process."""
