"""What the service needs of whatever generates the tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from unmask.types import SamplingOptions, TokenDelta


class BackendUnavailableError(Exception):
    """The backend cannot answer at the moment; another try may succeed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReport:
    """What one replica last said of itself."""

    role: Literal["target", "draft", "diffusion"]
    replica: str
    pids: tuple[int, ...]
    """Its own process first, then the engine's."""
    node: str = ""
    """Ray's id of the node that they run on."""
    stats: dict[str, Any] = field(default_factory=dict)
    """Counters and gauges by name: numbers, or lists of numbers by draft position."""
    checkpoint: str = ""
    """Directory of what it serves, where that can change while it runs."""


class Backend(Protocol):
    """A source of tokens: an engine in this process, or replicas of one elsewhere."""

    def generate(
        self, request_id: str, prompt_ids: list[int], options: SamplingOptions
    ) -> AsyncGenerator[TokenDelta, None]:
        """Generate one response. The last delta has a finish reason; `stop` means that its last token ended it.

        Closing the generator ends the work.

        Raises:
            UserError: the request cannot be served.
            BackendUnavailableError: nothing could serve it to its end.
        """
        ...

    async def reports(self) -> Sequence[ReplicaReport]:
        """Every replica that is alive. Raises BackendUnavailableError."""
        ...
