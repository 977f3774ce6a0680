"""What a target worker knows of a step before its GPU has run it, as an ANNOUNCE frame: enough to queue it."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from unmask.errors import WireError
from unmask.pairing.wire import MAX_ROWS, MAX_SPECULATIVE_TOKENS, Buffer, Step

_ANNOUNCE = struct.Struct("<Q5IH2x")


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """A step to come.

    Attributes:
        draft_version: of the projection that will make its features.
        num_speculative_tokens: K.
        requests: uint64 numbers [R], in the order of the rows to come.
        finished: uint64 numbers of requests that the draft may forget.
        longest: most feature rows that a request can have.
        max_requests, max_rows: of any step of this worker.
    """

    draft_version: int
    num_speculative_tokens: int
    requests: np.ndarray
    finished: np.ndarray
    longest: int
    max_requests: int
    max_rows: int

    def matches(self, step: Step) -> bool:
        """Whether a step is the one that was announced."""
        return (
            (self.draft_version, self.num_speculative_tokens) == (step.draft_version, step.num_speculative_tokens)
            and np.array_equal(self.requests, step.rows["request"])
            and int(step.rows["num_features"].max(initial=0)) <= self.longest
        )


def encode_announcement(announcement: Announcement) -> list[Buffer]:
    """Payload parts of an ANNOUNCE frame."""
    header = _ANNOUNCE.pack(
        announcement.draft_version,
        len(announcement.requests),
        len(announcement.finished),
        announcement.longest,
        announcement.max_requests,
        announcement.max_rows,
        announcement.num_speculative_tokens,
    )
    return [header, *(numbers.astype("<u8").tobytes() for numbers in (announcement.requests, announcement.finished))]


def decode_announcement(payload: Buffer) -> Announcement:
    """Read an ANNOUNCE payload. Raises WireError."""
    if len(payload) < _ANNOUNCE.size:
        raise WireError("an ANNOUNCE message is cut short")
    version, num_rows, num_finished, longest, max_requests, max_rows, k = _ANNOUNCE.unpack_from(payload)
    if len(payload) != _ANNOUNCE.size + 8 * (num_rows + num_finished):
        raise WireError("the size of an ANNOUNCE message does not match its fields")
    if not 1 <= k <= MAX_SPECULATIVE_TOKENS or not num_rows <= max_requests <= MAX_ROWS or not longest <= max_rows:
        raise WireError(f"an ANNOUNCE message of {num_rows} rows of {max_requests}, K = {k}")
    numbers = np.frombuffer(payload, dtype="<u8", offset=_ANNOUNCE.size).copy()
    if len(np.unique(numbers[:num_rows])) != num_rows:
        raise WireError("an ANNOUNCE message names a request twice")
    return Announcement(
        draft_version=version,
        num_speculative_tokens=k,
        requests=numbers[:num_rows],
        finished=numbers[num_rows:],
        longest=longest,
        max_requests=max_requests,
        max_rows=max_rows,
    )
