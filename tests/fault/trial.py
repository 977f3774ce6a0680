"""Faults as events and checks on anything that can be struck: `Trial(events, checks)`, a `Scenario` without clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from tests.fault.record import Finding

Subject = TypeVar("Subject")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial(Generic[Subject]):
    """What happens to a subject, one event after another, and what must hold of it afterwards."""

    events: Sequence[Callable[[Subject], None]]
    checks: Sequence[Callable[[Subject], list[Finding]]]

    def play(self, subject: Subject) -> list[Finding]:
        """Play it to its end."""
        for event in self.events:
            event(subject)
        return [finding for check in self.checks for finding in check(subject)]
