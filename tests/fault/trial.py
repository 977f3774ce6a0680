"""Faults as events and checks on anything that can be struck: `Trial(events, checks)`, a `Scenario` without clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

from tests.fault.record import Finding

Subject = TypeVar("Subject")


@runtime_checkable
class Ending(Protocol):
    """A subject of which something may run on when an event fails."""

    def end(self) -> None:
        """End what runs on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial(Generic[Subject]):
    """What happens to a subject, one event after another, and what must hold of it afterwards."""

    events: Sequence[Callable[[Subject], None]]
    checks: Sequence[Callable[[Subject], list[Finding]]]

    def play(self, subject: Subject) -> list[Finding]:
        """Play it to its end. What an event that fails leaves running is ended too: it would be in the next trial."""
        try:
            for event in self.events:
                event(subject)
        finally:
            if isinstance(subject, Ending):
                subject.end()
        return [finding for check in self.checks for finding in check(subject)]
