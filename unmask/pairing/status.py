"""Counters of one draft link in a memory-mapped file: written by the target worker, readable by any process.

A worker may be a process of its own, three levels below the replica that reports metrics, so it publishes by memory
rather than by message. A value is one aligned 8-byte store; a reader sees each value whole, not all of one instant.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from unmask.errors import ConfigError
from unmask.files import atomic_path

FIELDS = (
    "connected",
    "speculation_enabled",
    "breaker_open",
    "draft_version",
    "num_speculative_tokens",
    "steps",
    "proposals",
    "proposed_tokens",
    "failures",
    "connect_failures",
    "round_trip_ms_sum",
    "round_trip_ms_count",
    "bytes_sent",
    "bytes_received",
    "epoch",
    "drafts_connected",
)
"""`connected`, `speculation_enabled` and `breaker_open` are 0 or 1; `draft_version` is the wire's, modulo 2**53 so that
a float64 holds it exactly; `proposals` counts rows with a block; `failures` are steps and connections that were lost,
`connect_failures` fruitless attempts to connect; `epoch` counts the drafts that were greeted: context of an earlier
epoch is lost. Counters start with the worker."""

GAUGES = (
    "connected",
    "speculation_enabled",
    "breaker_open",
    "draft_version",
    "num_speculative_tokens",
    "drafts_connected",
)
"""What is no counter."""

_HEADER = struct.Struct("<8sQ")
_MAGIC = b"UNMKSTA2"
_SIZE = _HEADER.size + 8 * len(FIELDS)
_INDEX = {name: i for i, name in enumerate(FIELDS)}


class LinkStatus:
    """The writer's side. Without a path the counters stay in this process.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        content = _HEADER.pack(_MAGIC, len(FIELDS)) + bytes(8 * len(FIELDS))
        self._map: mmap.mmap | None = None
        if path is None:
            values = memoryview(bytearray(content))
        else:
            with atomic_path(Path(path)) as temporary:
                temporary.write_bytes(content)
            with Path(path).open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), _SIZE)
            values = memoryview(self._map)
        self._values = values[_HEADER.size :].cast("d")

    def __getitem__(self, name: str) -> float:
        return self._values[_INDEX[name]]

    def __setitem__(self, name: str, value: float) -> None:
        self._values[_INDEX[name]] = value

    def add(self, name: str, amount: float) -> None:
        """Increase a counter."""
        self._values[_INDEX[name]] += amount

    def as_dict(self) -> dict[str, float]:
        """All fields by name."""
        return dict(zip(FIELDS, self._values.tolist(), strict=True))


def read_status(path: str | Path) -> dict[str, float] | None:
    """Fields of a status file by name; None while there is none. Raises ConfigError for another file."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return None
    if len(content) != _SIZE or _HEADER.unpack_from(content) != (_MAGIC, len(FIELDS)):
        raise ConfigError(f"'{path}' is not a status file of this release", field="status_file")
    return dict(zip(FIELDS, struct.unpack_from(f"<{len(FIELDS)}d", content, _HEADER.size), strict=True))
