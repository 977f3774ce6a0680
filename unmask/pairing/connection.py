"""One authenticated connection of a target worker to a draft, from the draft's HELLO to the first failure: an epoch."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from unmask.errors import WireError
from unmask.pairing.announcement import Announcement, check_tokens, decode_tokens, encode_announcement
from unmask.pairing.channel import Channel
from unmask.pairing.handshake import authenticate_as_target, read_secret
from unmask.pairing.hello import Hello, TargetShape, decode_hello
from unmask.pairing.link_file import LinkConfig
from unmask.pairing.mailbox import Control
from unmask.pairing.polling import Attention
from unmask.pairing.wire import (
    EIGHT_BIT,
    MAX_MESSAGE_BYTES,
    NO_HASHES,
    Kind,
    Proposals,
    Step,
    decode_proposals,
    decode_refusal,
    encode_step,
    pack_hashes,
    pack_rows,
)
from unmask.types import ProposalRow


class DraftReplacedError(Exception):
    """The draft has other weights than it greeted with: it is to be greeted anew."""


class DraftConnection:
    """A draft that has proved the secret, fits the target and has answered an empty step."""

    def __init__(self, channel: Channel, hello: Hello, device: torch.device) -> None:
        self.channel = channel
        self.hello = hello
        self._projection = hello.projection.to(device)
        self._epoch = secrets.randbits(64)
        self._steps = 0
        self._attention = Attention(spins=None)

    @classmethod
    def open(cls, address: str | None, config: LinkConfig, shape: TargetShape, device: torch.device) -> DraftConnection:
        """Connect, authenticate, receive the projection and probe the draft's engine.

        Raises:
            DraftReplacedError: the draft was replaced while it greeted.
            ConfigError: no secret to be read.
            PairingError: the draft is another target's.
            WireError: the peer does not know the secret, or breaks the protocol.
            OSError: nobody there, or not within the connect timeout.
        """
        if address is None:
            raise WireError("no draft is placed")
        secret = read_secret(config.secret_file)
        deadline = time.monotonic() + config.connect_timeout_ms / 1000
        with ExitStack() as on_failure:
            channel = Channel.connect(address, deadline)
            on_failure.callback(channel.close)
            authenticate_as_target(channel, secret, deadline)
            hello = decode_hello(_receive(channel, Kind.HELLO, shape.hello_bytes, deadline))
            shape.check(hello)
            connection = cls(channel, hello, device)
            nothing = torch.empty(0, hello.projection.fc.shape[1], device=device)
            connection.propose([], nothing, (), k=1, deadline=deadline)
            on_failure.pop_all()
        return connection

    def propose(
        self,
        rows: Sequence[ProposalRow],
        features: Tensor,
        finished: Sequence[int],
        *,
        k: int,
        deadline: float,
        min_chance: float = 0.0,
    ) -> Proposals:
        """Project raw features [T, D * H], send them, and wait for the proposals.

        Raises WireError, OSError, DraftReplacedError.
        """
        context = self._projection(features)
        return self.exchange(
            pack_rows(rows),
            context,
            finished,
            hashes=pack_hashes(rows),
            k=k,
            deadline=deadline,
            min_chance=min_chance,
        )

    def exchange(
        self,
        rows: np.ndarray,
        context: Tensor,
        finished: Sequence[int],
        *,
        k: int,
        deadline: float,
        hashes: np.ndarray = NO_HASHES,
        min_chance: float = 0.0,
    ) -> Proposals:
        """Send `ROW` records, whose features this draft's projection has made [T, H], and wait (see `propose`)."""
        self._steps += 1
        step = Step(
            draft_version=self.hello.draft_version,
            epoch=self._epoch,
            number=self._steps,
            num_speculative_tokens=k,
            rows=rows,
            features=context.to("cpu", EIGHT_BIT if context.dtype is EIGHT_BIT else self.hello.projection.fc.dtype),
            finished=np.array(finished, dtype="<u8"),
            page_hashes=hashes,
            min_chance=min_chance,
        )
        self.channel.send(Kind.STEP, encode_step(step), deadline)
        payload = _receive(self.channel, Kind.PROPOSALS, MAX_MESSAGE_BYTES, deadline)
        return decode_proposals(payload, step, self.hello.vocab_size)

    def end(self, requests: Sequence[int], deadline: float) -> None:
        """Requests that will not be named again. Raises WireError, OSError, DraftReplacedError."""
        fc = self.hello.projection.fc
        self.exchange(pack_rows([]), fc.new_empty(0, fc.shape[0]), requests, k=1, deadline=deadline)

    def announce(self, announcement: Announcement, deadline: float) -> None:
        """Let the draft queue a step whose rows will be sent. Raises OSError."""
        self.channel.send(Kind.ANNOUNCE, encode_announcement(announcement), deadline)

    def exchange_announced(
        self,
        control: Control,
        k: int,
        parts: Sequence[memoryview],
        deliver: Callable[[memoryview], None],
        *,
        deadline: float,
    ) -> Proposals:
        """Send the rows and features of the step that was announced last, and wait (see `DraftLink.ask_announced`).

        Raises WireError, OSError, DraftReplacedError.
        """
        self._steps += 1
        self.channel.send(Kind.ROWS, parts, deadline)
        payload = _receive(self.channel, Kind.TOKENS, MAX_MESSAGE_BYTES, deadline, self._attention)
        num_requests = len(control.requests)
        check_tokens(payload, num_requests, k, self.hello.vocab_size)
        deliver(payload)
        tokens, counts = decode_tokens(payload, num_requests, control.number)
        return Proposals(
            draft_version=self.hello.draft_version, epoch=self._epoch, number=self._steps, counts=counts, tokens=tokens
        )

    def close(self) -> None:
        """Hang up."""
        self.channel.close()


def _receive(
    channel: Channel, kind: Kind, limit: int, deadline: float, attention: Attention | None = None
) -> memoryview:
    """Receive a frame of one kind; a refusal in its place is raised as WireError, a replacement as such."""
    received, payload = channel.receive([kind, Kind.REFUSAL, Kind.REPLACED], limit, deadline, attention)
    if received is Kind.REPLACED:
        raise DraftReplacedError
    if received is Kind.REFUSAL:
        raise WireError(f"the draft refused: {decode_refusal(payload)}")
    return payload
