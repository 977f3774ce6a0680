"""A connected socket that carries frames, and the addresses it is reached by."""

from __future__ import annotations

import functools
import select
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from unmask.errors import ConfigError
from unmask.pairing.polling import Attention
from unmask.pairing.wire import FRAME_BYTES, Buffer, Kind, decode_frame, encode_frame

UNIX_PREFIX = "unix:"
_FIRST_BUFFER_BYTES = 2**16
_KEPT_BUFFER_BYTES = 2**26
_AHEAD_BYTES = 2**12
_SOCKET_BYTES = 2**23
"""Buffered by the kernel, so that a step's rows are sent without waiting for them to be read."""
_TIMEOUT_S = 1e-3
_SILENT_S, _PROBE_S, _PROBES = 10, 5, 3
"""A peer whose host is gone says nothing: after so long it is probed, and given up when no probe is answered."""


def parse_address(address: str) -> str | tuple[str, int]:
    """`unix:/path` as a path, `host:port` as a pair. Raises ConfigError."""
    if address.startswith(UNIX_PREFIX):
        return address.removeprefix(UNIX_PREFIX)
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"'{address}' must look like host:port or unix:/path", field="address")
    return host.removeprefix("[").removesuffix("]"), int(port)


class Channel:
    """One connection. Not for concurrent use in one direction.

    Received payloads lie in a buffer that the next `receive` overwrites. A deadline is a `time.monotonic`
    time that covers the whole frame; `TimeoutError` when it passes, other `OSError`s when the peer is gone.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = bytearray(_FIRST_BUFFER_BYTES)
        self._ahead = memoryview(bytearray(_AHEAD_BYTES))
        self._unread = self._ahead[:0]
        """What has been read beyond what was asked for."""
        self._poller = select.poll()
        self._poller.register(sock, select.POLLIN)
        self._bytes_sent = 0
        self._bytes_received = 0
        self._timeout = sock.gettimeout()
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _keep_alive(sock)
            _widen(sock)

    @classmethod
    def connect(cls, address: str, deadline: float) -> Channel:
        """Connect to an address. Raises OSError; ConfigError for an address that is none."""
        target = parse_address(address)
        if isinstance(target, tuple):
            return cls(socket.create_connection(target, timeout=_remaining(deadline)))
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(_remaining(deadline))
            sock.connect(target)
        except OSError:
            sock.close()
            raise
        return cls(sock)

    def send(self, kind: Kind, parts: Sequence[Buffer], deadline: float | None = None) -> None:
        """Send one frame, its parts gathered by the kernel."""
        views = [memoryview(part).cast("B") for part in parts if len(part)]
        num_bytes = sum(len(view) for view in views)
        views.insert(0, memoryview(encode_frame(kind, num_bytes)))
        self._bytes_sent += FRAME_BYTES + num_bytes
        while views:
            self._set_timeout(deadline)
            sent = self._socket.sendmsg(views)
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]

    def receive(
        self,
        allowed: Sequence[Kind],
        limit: int,
        deadline: float | None = None,
        attention: Attention | None = None,
    ) -> tuple[Kind, memoryview]:
        """Receive one frame of an allowed kind, at most `limit` bytes (see `begin`). Raises WireError, OSError."""
        kind, num_bytes = self.begin(allowed, limit, deadline, attention)
        return kind, self.read(num_bytes, deadline)

    def begin(
        self,
        allowed: Sequence[Kind],
        limit: int,
        deadline: float | None = None,
        attention: Attention | None = None,
    ) -> tuple[Kind, int]:
        """The kind and size of the next frame, whose payload is then read by `read` or `read_into`.

        Args:
            attention: looks for a frame that is due, for being woken takes its time.
        """
        if attention is not None:
            attention.begin()
            while attention.is_close and not self._unread and not self._poller.poll(0):
                if deadline is not None and time.monotonic() > deadline:
                    break
                attention.rest()
        header = self.read(FRAME_BYTES, deadline)
        if attention is not None:
            attention.came()
        return decode_frame(header, allowed, limit)

    def peer_has_closed(self) -> bool:
        """Whether the peer has hung up. Does not wait, consumes nothing, may be asked from another thread."""
        poller = select.poll()
        try:
            poller.register(self._socket, select.POLLRDHUP)
        except ValueError:
            return True
        return bool(poller.poll(0))

    def take_bytes_sent(self) -> int:
        """Bytes sent since the last call."""
        taken, self._bytes_sent = self._bytes_sent, 0
        return taken

    def take_bytes_received(self) -> int:
        """Bytes received since the last call."""
        taken, self._bytes_received = self._bytes_received, 0
        return taken

    def shutdown(self) -> None:
        """Hang up, waking a thread that is blocked in `receive`. The file descriptor stays open until `close`."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def close(self) -> None:
        """Release the connection."""
        self._socket.close()

    def read(self, num_bytes: int, deadline: float | None = None) -> memoryview:
        """So many bytes of a payload, in the buffer."""
        buffer = self._buffer
        if num_bytes > len(buffer):
            # A new buffer, because views of the old one may still be alive.
            buffer = bytearray(num_bytes if num_bytes > _KEPT_BUFFER_BYTES else 1 << (num_bytes - 1).bit_length())
            self._buffer = buffer if num_bytes <= _KEPT_BUFFER_BYTES else self._buffer
        view = memoryview(buffer)[:num_bytes]
        self.read_into(view, deadline)
        return view

    def read_into(self, view: memoryview, deadline: float | None = None) -> None:
        """As many bytes of a payload as a view of bytes holds, where it lies."""
        filled, num_bytes = 0, len(view)
        while True:
            taken = min(len(self._unread), num_bytes - filled)
            view[filled : filled + taken] = self._unread[:taken]
            self._unread, filled = self._unread[taken:], filled + taken
            if filled == num_bytes:
                break
            self._set_timeout(deadline)
            # Little is read with what follows it, much where it belongs.
            is_little = num_bytes - filled < _AHEAD_BYTES
            received = self._socket.recv_into(self._ahead if is_little else view[filled:])
            if not received:
                raise ConnectionResetError("the peer hung up")
            if is_little:
                self._unread = self._ahead[:received]
            else:
                filled += received
        self._bytes_received += num_bytes

    def _set_timeout(self, deadline: float | None) -> None:
        """Let the next call end by the deadline, give or take a millisecond: setting it is a system call."""
        remaining = None if deadline is None else _remaining(deadline)
        if remaining is None or self._timeout is None:
            if remaining is self._timeout:
                return
        elif abs(remaining - self._timeout) < _TIMEOUT_S:
            return
        self._socket.settimeout(remaining)
        self._timeout = remaining


def listen(host: str, port: int) -> socket.socket:
    """A listening socket on an interface, or on `unix:/path`. Raises OSError if the address is taken."""
    if not host.startswith(UNIX_PREFIX):
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    path = host.removeprefix(UNIX_PREFIX)
    Path(path).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen()
    return listener


def _keep_alive(sock: socket.socket) -> None:
    """Let a read fail, with ETIMEDOUT, whose peer's host has vanished."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENT_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
    # What was sent and never acknowledged holds the probes back.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * (_SILENT_S + _PROBES * _PROBE_S))


def _widen(sock: socket.socket) -> None:
    """Give a connection large buffers where the host allows them: what it refuses would only end its own tuning."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        if _is_allowed(option):
            sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BYTES)


@functools.cache
def _is_allowed(option: int) -> bool:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BYTES)
        return trial.getsockopt(socket.SOL_SOCKET, option) >= _SOCKET_BYTES


def _remaining(deadline: float) -> float:
    """Seconds until a deadline. A socket timeout of 0 would mean not to wait at all, so a passed one raises."""
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError("the deadline has passed")
    return remaining
