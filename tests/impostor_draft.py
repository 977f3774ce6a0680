"""A draft that knows the secret and misbehaves."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import numpy as np

from tests.pairing_tools import SECRET, tiny_draft
from unmask.pairing.channel import Channel
from unmask.pairing.handshake import authenticate_as_draft
from unmask.pairing.hello import Hello, encode_hello, hello_of
from unmask.pairing.wire import MAX_MESSAGE_BYTES, Kind, Proposals, decode_step, encode_proposals


class Impostor:
    """A draft that authenticates and greets, answers the probe, and then misbehaves as told."""

    def __init__(
        self,
        misbehave: Callable[[Channel, Proposals], None],
        hello: Hello | None = None,
        secret: bytes = SECRET,
    ) -> None:
        self._misbehave = misbehave
        self._secret = secret
        self._hello = hello or hello_of(tiny_draft(), 1, None)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(Channel(sock),), daemon=True).start()

    def _serve(self, channel: Channel) -> None:
        try:
            authenticate_as_draft(channel, self._secret, time.monotonic() + 5)
            channel.send(Kind.HELLO, encode_hello(self._hello))
            while True:
                step = decode_step(channel.receive([Kind.STEP], MAX_MESSAGE_BYTES)[1])
                num_rows, k = len(step.rows), step.num_speculative_tokens
                reply = Proposals(
                    draft_version=step.draft_version,
                    epoch=step.epoch,
                    number=step.number,
                    counts=np.full(num_rows, k, np.uint8),
                    tokens=np.ones((num_rows, k), np.int32),
                )
                if num_rows:
                    self._misbehave(channel, reply)
                else:
                    channel.send(Kind.PROPOSALS, encode_proposals(reply))
        except OSError:
            return
        finally:
            channel.close()

    def stop(self) -> None:
        """Take no more connections."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def altered(**changes: object) -> Callable[[Channel, Proposals], None]:
    """Misbehaviour: answer with some fields changed."""

    def send(channel: Channel, reply: Proposals) -> None:
        fields = {name: getattr(reply, name) for name in Proposals.__slots__}
        channel.send(Kind.PROPOSALS, encode_proposals(Proposals(**(fields | changes))))

    return send
