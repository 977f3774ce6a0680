"""What a target worker knows of a step before its GPU has run it, as an ANNOUNCE frame: enough to queue it. Its rows
follow in a ROWS frame as they lie in the mailbox (int32 rows [R, 4], features [T, H]), and are answered by a TOKENS
frame, so that next to nothing has to be done to them on their way."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import torch

from unmask.errors import WireError
from unmask.pairing.coming_rows import ComingRows
from unmask.pairing.mailbox_words import STEP_MASK, signed
from unmask.pairing.wire import MAX_ROWS, MAX_SPECULATIVE_TOKENS, ROW_DTYPES, Buffer, dtype_of

ROW_BYTES = 16
"""A row of a mailbox: int32 start, number of features, last token (negative: no proposal wanted), and a tag."""
_ANNOUNCE = struct.Struct("<Q5IHBx")


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """A step to come.

    Attributes:
        number: uint32 that its rows bear, and its tokens are to bear.
        draft_version: of the projection that will make its features.
        num_speculative_tokens: K.
        requests: uint64 numbers [R], in the order of the rows to come.
        finished: uint64 numbers of requests that the draft may forget.
        coming: feature rows of these requests.
        max_requests, max_rows: of any step of this worker.
        dtype: element type of its feature rows.
    """

    number: int
    draft_version: int
    num_speculative_tokens: int
    requests: np.ndarray
    finished: np.ndarray
    coming: ComingRows
    max_requests: int
    max_rows: int
    dtype: torch.dtype


def encode_announcement(announcement: Announcement) -> list[Buffer]:
    """Payload parts of an ANNOUNCE frame."""
    header = _ANNOUNCE.pack(
        announcement.draft_version,
        len(announcement.requests),
        len(announcement.finished),
        announcement.max_requests,
        announcement.max_rows,
        announcement.number,
        announcement.num_speculative_tokens,
        ROW_DTYPES.index(announcement.dtype),
    )
    numbers = (announcement.requests, announcement.coming.pack(), announcement.finished)
    return [header, *(each.astype("<u8").tobytes() for each in numbers)]


def decode_announcement(payload: Buffer) -> Announcement:
    """Read an ANNOUNCE payload. Raises WireError."""
    if len(payload) < _ANNOUNCE.size:
        raise WireError("an ANNOUNCE message is cut short")
    version, num_rows, num_finished, max_requests, max_rows, number, k, code = _ANNOUNCE.unpack_from(payload)
    if len(payload) != _ANNOUNCE.size + 8 * (2 * num_rows + num_finished):
        raise WireError("the size of an ANNOUNCE message does not match its fields")
    numbers = np.frombuffer(payload, dtype="<u8", offset=_ANNOUNCE.size).copy()
    requests, words, finished = np.split(numbers, [num_rows, 2 * num_rows])
    coming = ComingRows.unpack(words)
    is_possible = 1 <= max_requests <= MAX_ROWS and num_rows <= max_requests and max(coming.total, 1) <= max_rows
    if not 1 <= k <= MAX_SPECULATIVE_TOKENS or not is_possible:
        raise WireError(f"an ANNOUNCE message of {num_rows} rows of {max_requests}, K = {k}")
    if len(np.unique(requests)) != num_rows:
        raise WireError("an ANNOUNCE message names a request twice")
    return Announcement(
        number=number,
        draft_version=version,
        num_speculative_tokens=k,
        requests=requests,
        finished=finished,
        coming=coming,
        max_requests=max_requests,
        max_rows=max_rows,
        dtype=dtype_of(code),
    )


def num_feature_rows(num_bytes: int, num_requests: int, row_bytes: int) -> int:
    """T of a ROWS frame of so many bytes, whose feature rows have `row_bytes` each. Raises WireError."""
    num_rows, rest = divmod(num_bytes - num_requests * ROW_BYTES, row_bytes)
    if num_rows < 0 or rest:
        raise WireError(f"a ROWS message of {num_bytes} bytes for {num_requests} requests")
    return num_rows


def check_rows(rows: memoryview, num_features: int, announced: Announcement, vocab_size: int) -> None:
    """Refuse rows int32 [R, 4] that are not what was announced. Raises WireError."""
    # Lists, for the first array operation after a rest takes ten times as long.
    words = rows.cast("i").tolist()
    starts, counts, tokens, tags = words[::4], words[1::4], words[2::4], words[3::4]
    too_many = any(count > most for count, most in zip(counts, announced.coming.most.tolist(), strict=True))
    if sum(counts) != num_features or min(counts, default=0) < 0 or too_many:
        raise WireError("the rows of a ROWS message do not add up to its features, or are more than were announced")
    if tags.count(signed(announced.number)) != len(tags):
        raise WireError("a row of a ROWS message is of another step")
    if min(starts, default=0) < 0 or max(tokens, default=0) >= vocab_size:
        raise WireError("a row of a ROWS message lies outside the sequence or the vocabulary")


def encode_tokens(tokens: np.ndarray, valid: np.ndarray, number: int) -> bytes:
    """A TOKENS payload: int64 [R, K], a tag in the upper half, an id in the lower; valid ids bear the step's number."""
    own, other = signed(number) << 32, signed(~number & STEP_MASK) << 32
    return np.where(valid, own | tokens.astype(np.int64), other).tobytes()


def check_tokens(payload: Buffer, num_requests: int, k: int, vocab_size: int) -> None:
    """Refuse a TOKENS payload that does not hold R x K words with ids of the vocabulary. Raises WireError."""
    if len(payload) != 8 * num_requests * k:
        raise WireError(f"a TOKENS message of {len(payload)} bytes for {num_requests} x {k} tokens")
    # A list, as in `check_rows`.
    if max(memoryview(payload).cast("I")[::2].tolist(), default=0) >= vocab_size:
        raise WireError("a proposal outside the vocabulary")


def decode_tokens(payload: Buffer, num_requests: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 [R, K] of a TOKENS payload that was checked, and how many of each row are valid: uint8 [R]."""
    words = np.frombuffer(payload, dtype="<i8").reshape(num_requests, -1)
    valid = np.logical_and.accumulate(words >> 32 == signed(number), axis=1)
    return (words & STEP_MASK).astype(np.int32), valid.sum(axis=1, dtype=np.uint8)
