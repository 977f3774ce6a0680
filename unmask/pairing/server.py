"""The draft server: sockets in front of a `DraftEngine`.

A reader thread per connection authenticates its peer and parses its steps; the engine's thread batches them over all
connections and answers. A connection has one step under way at a time.

`python -m unmask.pairing.server --draft DIR --target DIR --secret-file F --address-file F` serves until SIGTERM or
until its standard input closes.
"""

from __future__ import annotations

import itertools
import logging
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from unmask.errors import WireError
from unmask.models.dflash import DFlashDraft
from unmask.objectives.confidence import ConfidenceHead
from unmask.pairing.batcher import Batcher
from unmask.pairing.channel import UNIX_PREFIX, Channel, listen
from unmask.pairing.draft_engine import DraftEngine
from unmask.pairing.draft_session import DraftSession, last_word
from unmask.pairing.handshake import authenticate_as_draft
from unmask.pairing.hello import encode_hello
from unmask.pairing.local_drafting import LocalDrafting
from unmask.pairing.mailbox_folder import MailboxFolder
from unmask.pairing.relay import rehearse
from unmask.pairing.request_log import DraftedRequest
from unmask.pairing.wire import Kind, encode_refusal
from unmask.types import TargetRecord

logger = logging.getLogger(__name__)

_HANDSHAKE_S = 5.0
_HELLO_S = 60.0
_MAX_CONNECTIONS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftStats:
    """What a draft server has done since it started, and what it holds now."""

    draft_version: int
    connections: int
    """Authenticated connections now."""
    refused: int
    """Connections that failed to authenticate or broke the protocol."""
    steps: int
    """Engine steps; one serves every message that had arrived."""
    messages: int
    proposals: int
    """Rows that were answered with a block."""
    proposed_tokens: int
    proposals_with_gap: int
    """Of the proposals, those that were made without all of their context."""
    busy_s: float
    swaps: int
    """Drafts that have replaced another."""
    resident_requests: int
    resident_pages: int
    idle_pages: int
    """Pages kept for requests that may share their prefix."""
    num_pages: int


class DraftServer:
    """Serves a draft to target workers.

    Args:
        draft: the network, on its device.
        embedding: the target's token embeddings [V, H].
        lm_head: the target's LM head [V, H].
        secret: shared secret that every target worker must prove, and has proved to it.
        host: interface to bind, or `unix:/path`.
        port: TCP port; 0 picks a free one.
        memory_mb: bound of the context cache in MiB.
        record: the target that the draft was trained for, where it is recorded.
        confidence: see `DraftEngine`.
        graph_ks: see `DraftEngine`.
        mailbox_folder: where targets of this host leave their mailboxes; its permissions say who may.
    """

    def __init__(
        self,
        draft: DFlashDraft,
        embedding: Tensor,
        lm_head: Tensor,
        secret: bytes,
        host: str = "127.0.0.1",
        port: int = 0,
        memory_mb: float = 256,
        record: TargetRecord | None = None,
        confidence: ConfidenceHead | None = None,
        graph_ks: Sequence[int] | None = None,
        mailbox_folder: Path | None = None,
    ) -> None:
        self._engine = DraftEngine(
            draft, embedding, lm_head, record=record, confidence=confidence, memory_mb=memory_mb, graph_ks=graph_ks
        )
        self._batcher = Batcher(self._engine, on_end=self._hang_up)
        self._secret = secret
        self._host, self._port = host, port
        self.address = host
        """Where target workers connect, once started: `host:port` or `unix:/path`."""
        self.mailbox_folder = str(mailbox_folder) if mailbox_folder else None
        self._listener: socket.socket | None = None
        self._lock = threading.Lock()
        self._stopping = False
        self._channels: set[Channel] = set()
        self._idle: dict[int, threading.Event] = {}
        self._numbers = itertools.count()
        self._refused = 0
        self._relays = self._engine.weights.is_cuda
        self._mailboxes = MailboxFolder(mailbox_folder, self._local_drafting) if mailbox_folder else None

    def start(self) -> None:
        """Bind and serve in threads of this process. Raises OSError if the address is taken."""
        self._listener = listen(self._host, self._port)
        if not self._host.startswith(UNIX_PREFIX):
            host = f"[{self._host}]" if ":" in self._host else self._host
            self.address = f"{host}:{self._listener.getsockname()[1]}"
        self._batcher.start()
        if self._relays:
            self._rehearse()
        if self._mailboxes is not None:
            self._mailboxes.start()
        threading.Thread(target=self._accept, args=(self._listener,), name="draft_accept", daemon=True).start()

    def stop(self) -> None:
        """Hang up on everybody and wait for the step under way."""
        self._hang_up()
        if self._mailboxes is not None:
            self._mailboxes.close()
        self._batcher.stop()

    @property
    def alive(self) -> bool:
        """Whether the engine runs. One that has died has hung up on everybody."""
        return self._batcher.alive

    def swap(
        self, draft: DFlashDraft, record: TargetRecord | None = None, confidence: ConfidenceHead | None = None
    ) -> int:
        """Replace the weights between two steps; returns the new version (see `DraftEngine.swap`).

        Raises PairingError.
        """
        return self._engine.swap(draft, record, confidence)

    @property
    def weights(self) -> Tensor:
        """A weight of the draft that is served: its device and dtype are the draft's."""
        return self._engine.weights

    def stats(self) -> DraftStats:
        """Counters since the start."""
        return DraftStats(
            draft_version=self._engine.version,
            connections=len(self._idle),
            refused=self._refused,
            steps=self._batcher.steps,
            messages=self._batcher.messages,
            proposals=self._batcher.proposals,
            proposed_tokens=self._batcher.proposed_tokens,
            proposals_with_gap=self._engine.proposals_with_gap,
            busy_s=self._batcher.busy_s,
            resident_requests=self._engine.resident_requests,
            resident_pages=self._engine.resident_pages,
            idle_pages=self._engine.idle_pages,
            swaps=self._engine.swaps,
            num_pages=self._engine.num_pages,
        )

    def take_traced(self, before_s: float) -> list[DraftedRequest]:
        """See `RequestLog.take`."""
        return self._batcher.log.take(before_s)

    def _local_drafting(self) -> LocalDrafting:
        return LocalDrafting(self._engine, self._batcher, lambda: next(self._numbers))

    def _rehearse(self) -> None:
        """See `rehearse`. Who connects meanwhile is greeted afterwards."""
        weights, hello = self._engine.weights, self._engine.hello
        try:
            rehearse(self._local_drafting, weights.shape[0], weights.dtype, hello.vocab_size)
        except OSError as error:
            logger.warning("first steps over the wire will be slow: %s", error)

    def _accept(self, listener: socket.socket) -> None:
        while not self._stopping:
            try:
                sock, _ = listener.accept()
            except OSError:
                # The peer is gone already, descriptors are short, or `stop` has closed the listener.
                time.sleep(0.01)
                continue
            channel = Channel(sock)
            with self._lock:
                welcome = not self._stopping and len(self._channels) < _MAX_CONNECTIONS
                if welcome:
                    self._channels.add(channel)
            if welcome:
                threading.Thread(target=self._serve, args=(channel,), name="draft_session", daemon=True).start()
            else:
                channel.close()

    def _serve(self, channel: Channel) -> None:
        """One connection, from its first byte to its last."""
        with closing(channel):
            try:
                authenticate_as_draft(channel, self._secret, time.monotonic() + _HANDSHAKE_S)
                hello = replace(self._engine.hello, takes_announcements=self._relays)
                channel.send(Kind.HELLO, encode_hello(hello), time.monotonic() + _HELLO_S)
                with self._session(channel) as session:
                    session.run()
            except WireError as error:
                self._refused += 1
                logger.warning("refused a target worker: %s", error)
                last_word(channel, Kind.REFUSAL, encode_refusal(str(error)))
            except OSError as error:
                logger.debug("a target worker is gone: %s", error)
            finally:
                with self._lock:
                    self._channels.discard(channel)

    @contextmanager
    def _session(self, channel: Channel) -> Iterator[DraftSession]:
        """A session, whose context is dropped in the end."""
        with self._lock:
            number = next(self._numbers)
            session = DraftSession(
                number,
                channel,
                self._engine,
                self._batcher,
                lambda: next(self._numbers),
                relays=self._relays,
                is_stopping=lambda: self._stopping,
            )
            self._idle[number] = session.idle
        try:
            yield session
        finally:
            # A step of this session may be under way; the context that it adds must not outlive the session.
            session.idle.wait()
            self._engine.close_session(number)
            with self._lock:
                del self._idle[number]

    def _hang_up(self) -> None:
        """End every connection and take no more. Also run when the engine has died: targets shall notice at once."""
        with self._lock:
            self._stopping = True
            listener, self._listener = self._listener, None
            for channel in self._channels:
                channel.shutdown()
            for idle in self._idle.values():
                idle.set()
        if listener is not None:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            if self.address.startswith(UNIX_PREFIX):
                Path(self.address.removeprefix(UNIX_PREFIX)).unlink(missing_ok=True)


if __name__ == "__main__":
    from unmask.pairing.server_process import main

    main()
