"""Where things lie in a mailbox."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch

from unmask.errors import WireError
from unmask.pairing.mailbox_words import DEPTH, MAGIC, PAGE
from unmask.pairing.wire import MAX_SPECULATIVE_TOKENS, ROW_DTYPES, dtype_of

HEADER = struct.Struct("<8s6I")
ENTRY = struct.Struct("<5I4xQII")
MAX_HASHES = 8192
"""Page hashes of a control entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of a mailbox, and where things lie in it.

    Attributes:
        max_requests: R, most requests of a step.
        max_rows: T, most feature rows of a step.
        width: H of a feature row.
        dtype: element type of feature rows.
        max_k: K, most tokens drafted for a request.
    """

    max_requests: int
    max_rows: int
    width: int
    dtype: torch.dtype
    max_k: int

    @property
    def entry_bytes(self) -> int:
        """One control entry: head, request numbers [R], finished numbers [R], coming rows [R], hashes a request [R],
        hashes, all of 8 bytes."""
        return ENTRY.size + 32 * self.max_requests + 8 * MAX_HASHES

    @property
    def control_at(self) -> int:
        """Control entries [DEPTH]."""
        return PAGE

    @property
    def rows_at(self) -> int:
        """int32 [R, 4]: start, number of features, last token (negative: no proposal wanted), tag."""
        return _pages(self.control_at + DEPTH * self.entry_bytes)

    @property
    def tokens_at(self) -> int:
        """int64 [R, K]: tag in the upper, token id in the lower half."""
        return _pages(self.rows_at + 16 * self.max_requests)

    @property
    def row_bytes(self) -> int:
        """Of a feature row."""
        return self.width * self.dtype.itemsize

    @property
    def features_at(self) -> int:
        """Feature rows [T, H], only those that survived verification, request after request."""
        return _pages(self.tokens_at + 8 * self.max_requests * self.max_k)

    @property
    def num_bytes(self) -> int:
        """Size of the whole."""
        return _pages(self.features_at + self.max_rows * self.row_bytes)

    def pack(self) -> bytes:
        """The header."""
        sizes = (self.max_requests, self.max_rows, self.width, ROW_DTYPES.index(self.dtype), self.max_k, DEPTH)
        return HEADER.pack(MAGIC, *sizes)

    @classmethod
    def unpack(cls, header: bytes) -> Layout:
        """Read a header. Raises WireError."""
        if len(header) < HEADER.size:
            raise WireError("a mailbox is cut short")
        magic, requests, rows, width, code, max_k, depth = HEADER.unpack_from(header)
        if magic != MAGIC or depth != DEPTH or not 1 <= max_k <= MAX_SPECULATIVE_TOKENS or not requests * rows * width:
            raise WireError("not a mailbox of this release")
        return cls(max_requests=requests, max_rows=rows, width=width, dtype=dtype_of(code), max_k=max_k)


def _pages(num_bytes: int) -> int:
    return -(-num_bytes // PAGE) * PAGE
