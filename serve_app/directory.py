"""Which draft replicas there are, which target replica uses which, and what all of them last reported.

Replicas tell the directory of themselves every second. It keeps nothing that they do not repeat, so that a
restarted directory is complete again a second later.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.backend import ReplicaReport

logger = logging.getLogger(__name__)

BEAT_S = 1.0
MAX_CONTEXTS = 10_000
SECRET_AFTER_S = 3.0
EXPIRY_S = 5.0
"""A replica that has been silent this long is taken for gone; a busy CPU delays beats by seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftEndpoint:
    """Where a draft replica listens."""

    address: str
    version: int
    pid: int
    node: str = ""
    """Ray's id of the node that it runs on."""
    mailbox_folder: str | None = None
    """Where it serves mailboxes of targets on its node; None on a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkState:
    """How a target replica is connected to its drafts."""

    address: str | None
    """The draft that it was last given as its own."""
    connected: bool


@dataclass(slots=True, kw_only=True)
class _Entry:
    report: ReplicaReport
    seen_s: float
    endpoint: DraftEndpoint | None = None
    assigned: str | None = None
    shunned: set[str] = field(default_factory=set)
    """Drafts that a target was once not connected to."""


class Registry:
    """The directory's state. `clock` gives seconds that never go back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._begun_s = clock, clock()
        self._entries: dict[str, _Entry] = {}
        self._secret: str | None = None
        self._draft: str | None = None
        self._good_draft: str | None = None
        self._first: str | None = None
        self._contexts: dict[int, str] = {}

    def agree_on_secret(self, current: str | None) -> str | None:
        """The application's shared secret. The first replica with one decides; without any, one is made.

        Not at once: a directory that was restarted must hear of the secret that there is before a replica that starts
        has it make another. Until then the answer is None.
        """
        self._secret = self._secret or current
        if self._secret is None and self._clock() - self._begun_s >= SECRET_AFTER_S:
            self._secret = secrets.token_hex(32)
        return self._secret

    def want_draft(self, path: str) -> None:
        """From now on, replicas shall serve this draft."""
        self._draft = path

    def agree_on_draft(self, first: str, current: str | None) -> str | None:
        """The draft that replicas shall serve; None leaves each with the one that it started with.

        Args:
            first: the draft of the asking replica's configuration. Another one ends what was agreed on before: the
                service has been deployed anew.
            current: the draft that the replica has swapped in, from which a restarted directory learns it.
        """
        if first != self._first:
            if self._first is not None:
                self._draft = self._good_draft = None
            self._first = first
        self._draft = self._draft or current
        if current is not None and current == self._draft:
            self._good_draft = current
        return self._draft

    def refuse_draft(self, path: str) -> None:
        """A replica cannot serve this draft: the one before it is wanted again."""
        if self._draft == path:
            self._draft = self._good_draft

    def note_contexts(self, contexts: Mapping[int, str]) -> None:
        """Trace contexts (`traceparent`) of requests by their span ids; the newest `MAX_CONTEXTS` are kept."""
        self._contexts |= contexts
        for number in list(self._contexts)[:-MAX_CONTEXTS]:
            del self._contexts[number]

    def contexts_of(self, numbers: Sequence[int]) -> dict[int, str]:
        """Trace contexts of those that are known."""
        return {number: self._contexts[number] for number in numbers if number in self._contexts}

    def note_draft(self, report: ReplicaReport, endpoint: DraftEndpoint) -> None:
        """A draft replica is alive."""
        self._entries[report.replica] = _Entry(report=report, seen_s=self._clock(), endpoint=endpoint)

    def note_diffusion(self, report: ReplicaReport) -> None:
        """A replica of a diffusion LM is alive."""
        self._entries[report.replica] = _Entry(report=report, seen_s=self._clock())

    def note_target(self, report: ReplicaReport, link: LinkState) -> tuple[DraftEndpoint, ...]:
        """A target replica is alive; answers which drafts it should use: its own, then those that it shares because
        there are more drafts than targets. Empty while there is none."""
        self._expire()
        before = self._entries.pop(report.replica, None)
        entry = _Entry(report=report, seen_s=self._clock(), shunned=before.shunned if before else set())
        if link.address and not link.connected:
            entry.shunned.add(link.address)
        endpoint = self._choose(link, entry.shunned)
        entry.assigned = endpoint.address if endpoint else None
        self._entries[report.replica] = entry
        return (endpoint, *self._spare(report.replica)) if endpoint else ()

    def reports(self) -> list[ReplicaReport]:
        """What the live replicas last said."""
        self._expire()
        return [entry.report for entry in self._entries.values()]

    def _choose(self, link: LinkState, shunned: set[str]) -> DraftEndpoint | None:
        """The draft that the target has, while that works: context is lost with every change. Else the least used.

        A target leaves a draft that works only where this evens out the targets of the drafts, as when one was added.
        """
        drafts = {entry.endpoint.address: entry.endpoint for entry in self._entries.values() if entry.endpoint}
        uses = Counter(entry.assigned for entry in self._entries.values() if entry.assigned)
        if link.connected and link.address in drafts:
            others = [address for address in drafts if address not in shunned and uses[address] < uses[link.address]]
            return drafts[min(others, key=lambda address: (uses[address], address), default=link.address)]
        # A draft that could not be reached is chosen again only when there is no other.
        order = sorted(drafts, key=lambda address: (address == link.address, uses[address], address))
        return drafts[order[0]] if order else None

    def _spare(self, target: str) -> list[DraftEndpoint]:
        """This target's share of the drafts that are no target's own."""
        if self._clock() - self._begun_s < EXPIRY_S:
            # A directory that was restarted must hear first whose drafts they are.
            return []
        owned = {entry.assigned for entry in self._entries.values() if entry.assigned}
        drafts = {entry.endpoint.address: entry.endpoint for entry in self._entries.values() if entry.endpoint}
        targets = sorted(name for name, entry in self._entries.items() if entry.assigned)
        spare = sorted(address for address in drafts if address not in owned)
        return [drafts[address] for address in spare[targets.index(target) :: len(targets)]]

    def _expire(self) -> None:
        oldest = self._clock() - EXPIRY_S
        self._entries = {name: entry for name, entry in self._entries.items() if entry.seen_s >= oldest}


class Directory:
    """The registry as a deployment: Serve places it, watches it and ends it with the application."""

    def __init__(self) -> None:
        self._registry = Registry()

    async def agree_on_secret(self, current: str | None) -> str | None:
        """See `Registry.agree_on_secret`."""
        return self._registry.agree_on_secret(current)

    async def want_draft(self, path: str) -> None:
        """See `Registry.want_draft`."""
        self._registry.want_draft(path)

    async def agree_on_draft(self, first: str, current: str | None) -> str | None:
        """See `Registry.agree_on_draft`."""
        return self._registry.agree_on_draft(first, current)

    async def refuse_draft(self, path: str) -> None:
        """See `Registry.refuse_draft`."""
        self._registry.refuse_draft(path)

    async def note_contexts(self, contexts: Mapping[int, str]) -> None:
        """See `Registry.note_contexts`."""
        self._registry.note_contexts(contexts)

    async def contexts_of(self, numbers: Sequence[int]) -> dict[int, str]:
        """See `Registry.contexts_of`."""
        return self._registry.contexts_of(numbers)

    async def note_draft(self, report: ReplicaReport, endpoint: DraftEndpoint) -> None:
        """See `Registry.note_draft`."""
        self._registry.note_draft(report, endpoint)

    async def note_diffusion(self, report: ReplicaReport) -> None:
        """See `Registry.note_diffusion`."""
        self._registry.note_diffusion(report)

    async def note_target(self, report: ReplicaReport, link: LinkState) -> tuple[DraftEndpoint, ...]:
        """See `Registry.note_target`."""
        return self._registry.note_target(report, link)

    async def reports(self) -> list[ReplicaReport]:
        """See `Registry.reports`."""
        return self._registry.reports()


async def shared_secret(directory: DeploymentHandle) -> str:
    """The application's shared secret, for a replica that starts."""
    while (secret := await directory.agree_on_secret.remote(None)) is None:  # noqa: ASYNC110 - it is elsewhere
        await asyncio.sleep(BEAT_S / 2)
    return secret


async def keep_telling(tell: Callable[[], Awaitable[None]]) -> None:
    """Call `tell` every `BEAT_S` seconds for ever; a directory that cannot be reached is told later."""
    while True:
        try:
            await asyncio.wait_for(tell(), 2 * EXPIRY_S)
        except (RayError, RayServeException, TimeoutError) as error:
            logger.warning("the directory did not answer: %s", type(error).__name__)
        await asyncio.sleep(BEAT_S)
