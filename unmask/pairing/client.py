"""The target worker's link to its draft: proposals by a deadline, or none, and never an exception.

A draft that is slow, dead, of another version or nonsense costs speed, never a token. After any failure the
link hangs up and the breaker opens for `retry_s`. The next connection is a new epoch, to a draft that knows none of
the running requests: those run on without proposals. Connecting, greeting and the half-open probe happen in a
thread beside the per-step path.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unmask.errors import UserError, WireError
from unmask.pairing.announcement import Announcement
from unmask.pairing.connection import DraftConnection, DraftReplacedError
from unmask.pairing.hello import Hello, TargetShape
from unmask.pairing.link_file import LinkConfig, read_link_file
from unmask.pairing.mailbox import Control
from unmask.pairing.status import LinkStatus
from unmask.pairing.wire import Proposals, pack_hashes, pack_rows
from unmask.types import ProposalRow

logger = logging.getLogger(__name__)

_POLL_S = 0.25
_DEFAULT_RETRY_S = 1.0
_MAX_RETRY_S = 30.0
_EXACT_FLOAT = 2**53


class DraftLink:
    """Asks a draft for proposals on behalf of one target worker.

    `propose` belongs to one thread; a thread of the link's own keeps it connected between `start` and `close`.

    Args:
        path: the link file; read again after every failure and whenever it changes.
        shape: what this target is, for refusing a draft of another one.
        num_speculative_tokens: K that the engine was built for; the draft and the link file may lower it.
        device: where feature rows are projected.
        status: counters to keep.
        index: which of the link file's drafts this is the link to.
    """

    def __init__(
        self,
        path: str | Path,
        shape: TargetShape,
        num_speculative_tokens: int,
        device: torch.device | str = "cpu",
        status: LinkStatus | None = None,
        index: int = 0,
    ) -> None:
        self.status = status or LinkStatus()
        self._index = index
        self._path = Path(path)
        self._shape = shape
        self._max_k = num_speculative_tokens
        self._device = torch.device(device)
        self._connection: DraftConnection | None = None
        self._announced_to: DraftConnection | None = None
        self._config: LinkConfig | None = None
        self._stamp: tuple[int, int] | None = None
        self._failed_steps = 0
        self._retry_at = 0.0
        self._reason = ""
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._keep_connected, name="draft_link", daemon=True)

    def start(self) -> None:
        """Begin to connect."""
        self._thread.start()

    def close(self) -> None:
        """Hang up for good."""
        self._closing = True
        self._wake.set()
        self._thread.join()
        with self._lock:
            self._disconnect()

    @property
    def adaptive_k(self) -> bool:
        """Whether the link file leaves K to a controller."""
        return self._config is not None and self._config.adaptive_k

    @property
    def mailbox_folder(self) -> str | None:
        """Where the draft that is connected serves mailboxes of this host."""
        config = self._config
        return config.mailbox_folder if config is not None and self.num_speculative_tokens else None

    @property
    def hello(self) -> Hello | None:
        """The draft that is connected."""
        connection = self._connection
        return connection.hello if connection else None

    def hang_up(self) -> None:
        """End this epoch: the draft forgets what it has seen. The link connects anew."""
        with self._lock:
            self._greet_anew()

    @property
    def num_speculative_tokens(self) -> int:
        """K that the next step will ask for; 0 while there is no draft to ask."""
        connection, config = self._connection, self._config
        if connection is None or config is None:
            return 0
        k = min(self._max_k, connection.hello.block_size - 1)
        return k if config.num_speculative_tokens is None else min(k, config.num_speculative_tokens)

    def wait_until_ready(self, timeout_s: float) -> bool:
        """Wait until proposals can be had; False if the time is up first."""
        end = time.monotonic() + timeout_s
        while not self.num_speculative_tokens and time.monotonic() < end:
            time.sleep(0.01)
        return self.num_speculative_tokens > 0

    def propose(
        self,
        rows: Sequence[ProposalRow],
        features: Tensor,
        finished: Sequence[int] = (),
        k: int | None = None,
        version: int | None = None,
        min_chance: float = 0.0,
    ) -> list[list[int]]:
        """Proposals for one step.

        Args:
            rows: one a request of the step, no request twice.
            features: raw hidden states [T, D * H] of the rows in order, T the sum of `num_features`.
            finished: requests that will not be named again.
            k: K of this step if lower than `num_speculative_tokens`; at 0 the draft takes in the rows and drafts none.
            version: of the draft whose projection has made `features` [T, H] already; another draft is not asked.
            min_chance: of acceptance; less likely ids are not proposed by a draft that can tell.

        Returns:
            At most K ids a row; empty lists where there is no proposal, for whatever reason.
        """
        if k == 0:
            rows = [replace(row, last_token=-1) for row in rows]
        if version is None:
            proposals = self._exchange(
                version,
                k,
                lambda c, k, end: c.propose(rows, features, finished, k=k, deadline=end, min_chance=min_chance),
            )
        else:
            packed, hashes = pack_rows(rows), pack_hashes(rows)
            proposals = self._exchange(
                version, k, lambda c, k, end: c.exchange(packed, features, finished, hashes=hashes, k=k, deadline=end)
            )
        if proposals is None:
            return [[] for _ in rows]
        counts = proposals.counts.tolist()
        return [ids[:count] for ids, count in zip(proposals.tokens.tolist(), counts, strict=True)]

    def ask(
        self, rows: np.ndarray, hashes: np.ndarray, context: Tensor, finished: Sequence[int], k: int, version: int
    ) -> Proposals | None:
        """The same for `ROW` records and the hashes of their pages, whose features have been projected; None without
        proposals."""
        return self._exchange(
            version, k, lambda c, k, end: c.exchange(rows, context, finished, hashes=hashes, k=k, deadline=end)
        )

    def end(self, requests: Sequence[int]) -> None:
        """Requests that this draft will not be asked for any more, though they may run on."""
        self._exchange(None, None, lambda connection, _, deadline: connection.end(requests, deadline))

    def announce(self, announcement: Announcement) -> int:
        """Tell a draft that queues announced steps of one to come, whose rows are sent by `ask_announced`.

        Returns:
            K that it will draft; 0 if there is no such draft.
        """
        with self._lock:
            connection, config = self._connection, self._config
            if connection is None or config is None or not connection.hello.takes_announcements:
                return 0
            k = min(announcement.num_speculative_tokens, self.num_speculative_tokens)
            if connection.hello.draft_version != announcement.draft_version or not k:
                return 0
            try:
                connection.announce(
                    replace(announcement, num_speculative_tokens=k), time.monotonic() + config.timeout_ms / 1000
                )
            except OSError as error:
                self._fail_step(error)
                return 0
            self._announced_to = connection
        return k

    def ask_announced(
        self, control: Control, k: int, parts: Sequence[memoryview], deliver: Callable[[memoryview], None]
    ) -> bool:
        """Proposals for the step that was announced last.

        Args:
            control: the step.
            k: what `announce` has returned.
            parts: bytes of the rows int32 [R, 4] and of the features [T, H].
            deliver: called before all bookkeeping with the bytes of token words int64 [R, K] (see
                `Mailbox.answer_words`).

        Returns:
            False without proposals.
        """
        announced_to, self._announced_to = self._announced_to, None

        def ask(connection: DraftConnection, _: int, deadline: float) -> Proposals | None:
            if connection is not announced_to:
                # The link has been made anew, to a draft that knows nothing of the step.
                return None
            return connection.exchange_announced(control, k, parts, deliver, deadline=deadline)

        return self._exchange(control.draft_version, k, ask) is not None

    def _exchange(
        self, version: int | None, k: int | None, ask: Callable[[DraftConnection, int, float], Proposals | None]
    ) -> Proposals | None:
        """One step within the deadline; None if there is no draft (of this version), or it fails."""
        with self._lock:
            most, hello = self.num_speculative_tokens, self.hello
            if self._connection is None or self._config is None or hello is None or not most:
                return None
            if version not in (None, hello.draft_version):
                return None
            started = time.monotonic()
            deadline = started + self._config.timeout_ms / 1000
            try:
                proposals = ask(self._connection, most if k is None else max(min(k, most), 1), deadline)
            except DraftReplacedError:
                self._greet_anew()
                return None
            except (OSError, WireError) as error:
                self._fail_step(error)
                return None
            if proposals is not None:
                self._failed_steps = 0
                self._count(self._connection, proposals, time.monotonic() - started)
        return proposals

    def _keep_connected(self) -> None:
        while not self._closing:
            self._follow_link_file()
            if self._connection is not None:
                self._notice_hang_up()
            elif time.monotonic() >= self._retry_at:
                self._connect()
            pause_s = _POLL_S if self._connection else min(_POLL_S, self._retry_at - time.monotonic())
            self._wake.wait(max(pause_s, 0.0))
            self._wake.clear()

    def _follow_link_file(self) -> None:
        """Take a changed link file in: move to another draft, or ask for another K."""
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            config = read_link_file(self._path)
        except UserError as error:
            logger.warning("kept the draft link as it was: %s", error)
            return
        with self._lock:
            old, self._config = self._config, config
            self._retry_at, self._failed_steps = 0.0, 0
            if old is None or (self._address(old), old.secret_file) != (self._address(config), config.secret_file):
                self._disconnect()
            self._show()

    def _connect(self) -> None:
        """One attempt, the breaker half open."""
        # An unchanged file may still be news: a restarted draft can take up its old address with another secret.
        try:
            config = read_link_file(self._path)
            connection = DraftConnection.open(self._address(config), config, self._shape, self._device)
        except (OSError, UserError, DraftReplacedError) as error:
            retry_s = self._config.retry_s if self._config else _DEFAULT_RETRY_S
            self.status.add("connect_failures", 1)
            self._open_breaker(error, retry_s)
            return
        with self._lock:
            self._connection, self._config, self._reason = connection, config, ""
            self.status.add("epoch", 1)
            self._show()
        address, k = self._address(config), self.num_speculative_tokens
        logger.info("draft %016x at %s proposes %d tokens", connection.hello.draft_version, address, k)

    def _address(self, config: LinkConfig) -> str | None:
        return config.addresses[self._index] if self._index < len(config.addresses) else None

    def _greet_anew(self) -> None:
        """The draft has new weights, and with them a new projection: fetch it beside the per-step path."""
        self._disconnect()
        self._retry_at = 0.0
        self._show()
        self._wake.set()

    def _notice_hang_up(self) -> None:
        """See a draft go even while no step is asked of it."""
        connection = self._connection
        if connection is not None and connection.channel.peer_has_closed():
            with self._lock:
                if self._connection is connection:
                    self._fail_step(ConnectionResetError("the draft hung up"))

    def _fail_step(self, error: Exception) -> None:
        """Give up an epoch. The lock is held."""
        self._disconnect()
        self.status.add("failures", 1)
        # Unlike a failed attempt to connect, a failed step cost the target time: repeated ones are spaced out.
        retry_s = self._config.retry_s if self._config else _DEFAULT_RETRY_S
        spaced_s = retry_s * 2 ** min(self._failed_steps, 16)
        self._failed_steps += 1
        self._open_breaker(error, max(retry_s, min(spaced_s, _MAX_RETRY_S)))
        self._wake.set()

    def _open_breaker(self, error: Exception, retry_s: float) -> None:
        self._retry_at = time.monotonic() + retry_s
        self._show()
        reason = str(error)
        if reason != self._reason:
            logger.warning("no proposals for now: %s", reason)
        self._reason = reason

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _show(self) -> None:
        """Bring the gauges up to date."""
        connection, k = self._connection, self.num_speculative_tokens
        self.status["connected"] = self.status["drafts_connected"] = float(connection is not None)
        self.status["speculation_enabled"] = float(k > 0)
        self.status["breaker_open"] = float(connection is None and self._retry_at > 0)
        self.status["num_speculative_tokens"] = k
        if connection is not None:
            self.status["draft_version"] = connection.hello.draft_version % _EXACT_FLOAT

    def _count(self, connection: DraftConnection, proposals: Proposals, seconds: float) -> None:
        self.status.add("steps", 1)
        self.status.add("proposals", int((proposals.counts > 0).sum()))
        self.status.add("proposed_tokens", int(proposals.counts.sum()))
        self.status.add("round_trip_ms_sum", 1000 * seconds)
        self.status.add("round_trip_ms_count", 1)
        self.status.add("bytes_sent", connection.channel.take_bytes_sent())
        self.status.add("bytes_received", connection.channel.take_bytes_received())


def _stamp(path: Path) -> tuple[int, int] | None:
    """What tells one content of a file that is only ever replaced from another."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
