"""One connection of a target worker, as its draft serves it: steps, and steps that were announced before their rows."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from unmask.errors import UserError, WireError
from unmask.pairing.announcement import (
    ROW_BYTES,
    Announcement,
    check_rows,
    decode_announcement,
    encode_tokens,
    num_feature_rows,
)
from unmask.pairing.batcher import Batcher
from unmask.pairing.channel import Channel
from unmask.pairing.draft_engine import DraftEngine
from unmask.pairing.local_drafting import LocalDrafting
from unmask.pairing.polling import Attention
from unmask.pairing.relay import Relay
from unmask.pairing.wire import (
    EIGHT_BIT,
    MAX_MESSAGE_BYTES,
    ROW,
    Buffer,
    Kind,
    Proposals,
    Step,
    decode_step,
    encode_proposals,
    read_tensor,
)

logger = logging.getLogger(__name__)

_SEND_S = 2.0


class DraftSession:
    """Reads the frames of one peer that has proved itself, and answers them; one step at a time.

    Args:
        number: of the session, whose context the engine keeps apart.
        channel: the connection.
        engine: the draft.
        batcher: the engine's thread.
        new_number: numbers of sessions that nobody else uses.
        relays: whether announced steps are queued ahead.
        is_stopping: whether the server takes no more steps.
    """

    def __init__(
        self,
        number: int,
        channel: Channel,
        engine: DraftEngine,
        batcher: Batcher,
        new_number: Callable[[], int],
        *,
        relays: bool,
        is_stopping: Callable[[], bool],
    ) -> None:
        self._number, self._channel, self._engine, self._batcher = number, channel, engine, batcher
        self._new_number, self._may_relay, self._is_stopping = new_number, relays, is_stopping
        self._relay: Relay | None = None
        self._announced: Announcement | None = None
        self._steps = 0
        self._attention = Attention(spins=None)
        self.idle = threading.Event()
        """Set while no step of this session is under way."""
        self.idle.set()

    def run(self) -> None:
        """Serve until the peer hangs up.

        Raises:
            WireError: it breaks the protocol.
            OSError: it is gone, or the server stops.
        """
        serve = {Kind.STEP: self._step, Kind.ANNOUNCE: self._announce, Kind.ROWS: self._rows}
        try:
            while True:
                # Rows are due that a GPU waits for.
                attention = self._attention if self._announced is not None and self._relay is not None else None
                kind, num_bytes = self._channel.begin(list(serve), MAX_MESSAGE_BYTES, attention=attention)
                serve[kind](num_bytes)
        finally:
            if self._relay is not None:
                self._relay.close()

    def _announce(self, num_bytes: int) -> None:
        self._announced = announced = decode_announcement(self._channel.read(num_bytes))
        if announced.dtype not in (self._engine.weights.dtype, EIGHT_BIT):
            raise WireError(f"feature rows in {announced.dtype} for a draft in {self._engine.weights.dtype}")
        if self._may_relay and self._relay is None:
            self._relay = self._new_relay(announced)
            self._may_relay = self._relay is not None
        if self._relay is not None:
            self._relay.announce(announced)

    def _rows(self, num_bytes: int) -> None:
        """The rows of the step that was announced last."""
        announced, relay, self._announced = self._announced, self._relay, None
        if announced is None:
            raise WireError("rows of a step that was not announced")
        if relay is None:
            step = self._step_of(announced, self._channel.read(num_bytes))
            self._engine.check(step)
            self._submit(step, lambda reply: _as_tokens(reply, announced.number))
            return
        with self._serving():
            if announced.draft_version != self._engine.version:
                # Read to the end: who hangs up before may take the word back that it is saying.
                self._channel.read(num_bytes)
                last_word(self._channel, Kind.REPLACED, [])
                return
            self._send(Kind.TOKENS, [relay.answer_announced(self._channel, num_bytes)])
            relay.reply_sent()

    def _step(self, num_bytes: int) -> None:
        self._announced, step = None, self._widened(decode_step(self._channel.read(num_bytes)))
        self._engine.check(step)
        if self._relay is None:
            self._submit(step, _as_proposals)
            return
        with self._serving():
            if step.draft_version != self._engine.version:
                last_word(self._channel, Kind.REPLACED, [])
                return
            self._send(*_as_proposals(self._relay.answer(step)))
            self._relay.reply_sent()

    def _submit(self, step: Step, encode: Callable[[Proposals], tuple[Kind, Sequence[Buffer]]]) -> None:
        """Have a step answered by the engine's thread, and wait: its features are views of the channel's buffer."""
        self._begin()

        def answer(reply: Proposals | None) -> None:
            if reply is None:
                last_word(self._channel, Kind.REPLACED, [])
            else:
                self._send(*encode(reply))
            self.idle.set()

        self._batcher.submit(self._number, step, answer)
        self.idle.wait()

    @contextmanager
    def _serving(self) -> Iterator[None]:
        self._begin()
        try:
            yield
        finally:
            self.idle.set()

    def _begin(self) -> None:
        self.idle.clear()
        if self._is_stopping():
            # The server may have hung up before `clear`: nobody would answer.
            self.idle.set()
            raise ConnectionAbortedError("the draft stops")

    def _send(self, kind: Kind, parts: Sequence[Buffer]) -> None:
        try:
            self._channel.send(kind, parts, time.monotonic() + _SEND_S)
        except OSError:
            self._channel.shutdown()

    def _new_relay(self, announcement: Announcement) -> Relay | None:
        """None where there is no room for one: the connection is served without."""
        weights, hello = self._engine.weights, self._engine.hello
        drafting = LocalDrafting(self._engine, self._batcher, self._new_number, self._number)
        try:
            return Relay(drafting, announcement, weights.shape[0], hello.vocab_size)
        except (OSError, UserError) as error:
            logger.warning("announced steps are not queued ahead: %s", error)
            return None

    def _step_of(self, announced: Announcement, payload: memoryview) -> Step:
        """An announced step and its rows as one. Raises WireError."""
        width, num_requests = self._engine.weights.shape[0], len(announced.requests)
        num_features = num_feature_rows(len(payload), num_requests, width * announced.dtype.itemsize)
        laid = np.frombuffer(payload, dtype="<i4", count=4 * num_requests).reshape(-1, 4)
        laid_bytes = payload[: ROW_BYTES * num_requests]
        check_rows(laid_bytes, num_features, announced, self._engine.hello.vocab_size)
        rows = np.zeros(num_requests, dtype=ROW)
        rows["request"] = announced.requests
        rows["start"], rows["num_features"], rows["last_token"] = laid[:, 0], laid[:, 1], laid[:, 2]
        self._steps += 1
        step = Step(
            draft_version=announced.draft_version,
            epoch=0,
            number=self._steps,
            num_speculative_tokens=announced.num_speculative_tokens,
            rows=rows,
            features=read_tensor(payload, announced.dtype, (num_features, width), ROW_BYTES * num_requests),
            finished=announced.finished,
        )
        return self._widened(step)

    def _widened(self, step: Step) -> Step:
        """A step whose rows came in eight bits, in the draft's own element type."""
        if step.features.dtype is not EIGHT_BIT:
            return step
        return replace(step, features=step.features.to(self._engine.weights.dtype))


def last_word(channel: Channel, kind: Kind, parts: Sequence[Buffer]) -> None:
    """Say a last word, and hang up."""
    try:
        channel.send(kind, parts, time.monotonic() + _SEND_S)
    except OSError as error:
        logger.debug("a target worker is gone before it was told so: %s", error)
    channel.shutdown()


def _as_proposals(reply: Proposals) -> tuple[Kind, Sequence[Buffer]]:
    return Kind.PROPOSALS, encode_proposals(reply)


def _as_tokens(reply: Proposals, number: int) -> tuple[Kind, Sequence[Buffer]]:
    valid = np.arange(reply.tokens.shape[1]) < reply.counts[:, None]
    return Kind.TOKENS, [encode_tokens(reply.tokens, valid, number)]
