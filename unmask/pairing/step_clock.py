"""Measures the steps of a synchronous target for its `KController`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from unmask.pairing.policy import KController


class StepClock:
    """Feeds a controller from two moments of each step: sampled tokens are known, proposals are there.

    What lies between a step's proposals and the next step's tokens is the target's forward with all that surrounds it.

    Args:
        controller: what is fed.
        clock: seconds that never go back.
    """

    def __init__(self, controller: KController, clock: Callable[[], float] = time.perf_counter) -> None:
        self.controller = controller
        self._clock = clock
        self._requests: frozenset[int] = frozenset()
        self._proposed_at = 0.0
        self._verified_at = 0.0
        self.min_chance = 0.0
        """Of acceptance, for the drafts of the next step (see `KController.min_chance`)."""

    def verified(
        self, requests: Sequence[int], num_rows: int, num_drafted: Sequence[int], sampled: Sequence[Sequence[int]]
    ) -> int:
        """The target has verified a step; answers K for the next.

        Args:
            requests: of this step.
            num_rows: query rows of the target's forward, prompt chunks included.
            num_drafted: drafts that were verified for each request.
            sampled: tokens that each request gained.
        """
        self._verified_at = self._clock()
        # Without a request in common the target may have stood idle in between.
        if self._requests.intersection(requests):
            self.controller.observe_cost("verify", num_rows, self._verified_at - self._proposed_at)
        self._requests = frozenset(requests)
        pairs = [(k, len(tokens) - 1) for k, tokens in zip(num_drafted, sampled, strict=True) if k and tokens]
        self.controller.observe_acceptance([k for k, _ in pairs], [length for _, length in pairs])
        batch_size = max(sum(bool(tokens) for tokens in sampled), 1)
        k = self.controller.choose(batch_size)
        self.min_chance = self.controller.min_chance(batch_size)
        return k

    def skip(self) -> None:
        """A step went by without the draft: the next one's time is not known."""
        self._requests = frozenset()

    def drafted(self, batch_size: int, k: int, *, answered: bool) -> None:
        """The proposals of this step are there; `answered` if the draft made any."""
        self._proposed_at = self._clock()
        if answered:
            self.controller.observe_cost("draft", batch_size * (k + 1), self._proposed_at - self._verified_at)
