"""What a target's CPU knows of a step's feature rows before its GPU has run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_START_SHIFT = 32
_MOST_MASK = 2**_START_SHIFT - 1


@dataclass(frozen=True, slots=True)
class ComingRows:
    """Rows that are to come, by request.

    Attributes:
        most: int64 [R], how many at most: all query rows of a prompt, of others those that will not be rejected.
        starts: int64 [R], the position of the first; -1 where they follow what the draft holds, for how many tokens
            were kept before is not known yet. Of prompts it is.
    """

    most: np.ndarray
    starts: np.ndarray

    @classmethod
    def following(cls, most: Sequence[int] | np.ndarray) -> ComingRows:
        """Up to `most` [R] rows after those that the draft holds."""
        counts = np.array(most, dtype=np.int64)
        return cls(counts, np.full_like(counts, -1))

    @property
    def longest(self) -> int:
        """Most rows of one request."""
        return int(self.most.max(initial=0))

    @property
    def total(self) -> int:
        """Most rows in all."""
        return int(self.most.sum())

    def pack(self) -> np.ndarray:
        """One uint64 a request."""
        return ((self.starts + 1) << _START_SHIFT | self.most).astype("<u8")

    @classmethod
    def unpack(cls, words: np.ndarray) -> ComingRows:
        """The opposite of `pack`, for any uint64 [R]."""
        return cls(
            (words & np.uint64(_MOST_MASK)).astype(np.int64),
            (words >> np.uint64(_START_SHIFT)).astype(np.int64) - 1,
        )
