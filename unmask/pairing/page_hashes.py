"""Names of context pages: a hash of all tokens up to a page's end, so that equal prefixes have equal names."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable

import numpy as np

PAGE_SIZE = 16
"""Positions per page, on both sides of the wire."""


class PageHashes:
    """Tells the draft the names of each request's pages, each of them once.

    Args:
        page_size: positions per page.
    """

    def __init__(self, page_size: int = PAGE_SIZE) -> None:
        self._page_size = page_size
        self._chains: dict[Hashable, list[int]] = {}
        self._told: dict[Hashable, int] = {}

    def of(self, request: Hashable, start: int, end: int, tokens: np.ndarray) -> tuple[int, ...]:
        """Hashes of the last full pages of a request whose features `start .. end - 1` go to the draft.

        All of its pages where the request is new or does not go on where it stood, else those that have come since.

        Args:
            tokens: ids of its positions, at least up to `end`.
        """
        chain = self._chains.setdefault(request, [])
        chain += hash_pages(tokens[len(chain) * self._page_size : end], self._page_size, chain[-1] if chain else 0)
        first = start // self._page_size if self._told.get(request) == start else 0
        self._told[request] = end
        return tuple(chain[first : end // self._page_size])

    def forget(self, request: Hashable) -> None:
        """The request has ended."""
        self._chains.pop(request, None)
        self._told.pop(request, None)


def hash_pages(tokens: np.ndarray, page_size: int, before: int = 0) -> list[int]:
    """64-bit hashes of the full pages of `tokens`, each over the hash before it and its own ids."""
    ids = np.asarray(tokens, dtype="<i4")
    hashes = []
    for first in range(0, len(ids) - page_size + 1, page_size):
        digest = hashlib.blake2b(before.to_bytes(8, "little"), digest_size=8)
        digest.update(ids[first : first + page_size].tobytes())
        before = int.from_bytes(digest.digest(), "little")
        hashes.append(before)
    return hashes


def hashes_by_row(hashes: np.ndarray, counts: np.ndarray) -> list[list[int]] | None:
    """Page hashes of each row; None where there are none at all."""
    if not len(hashes):
        return None
    ends = np.cumsum(counts)[:-1]
    return [row.tolist() for row in np.split(hashes, ends)]
