"""Which page of a draft's context pool holds what of which request: book-keeping on the host, no tensors.

Rows arrive with the position at which they start, and the start rule keeps draft and target in step without any
other message:

    start == length    append
    start <  length    the target went back (rejection, preemption): truncate to `start`, then append
    start >  length    rows that the draft never saw: a prefix that the target took from its own cache, a lost
                       message, an eviction, another version's context. They are a gap that attention skips.

Full pages are registered under the hash of the tokens that they stand for. A request that begins in mid-prompt takes
over the pages of its prefix that are registered; only the rest of its prefix is a gap. Pages are shared by counting
and copied before they are changed. Under pressure idle registered pages go first, then the least recently used request.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unmask.pairing.coming_rows import ComingRows
from unmask.pairing.page_pool import PagePool

Key = tuple[int, int]
"""(session, request)"""

_ABSENT = -1


@dataclass(slots=True)
class _Entry:
    """Context of positions [0, gap_start) and [gap_end, length)."""

    row: int
    """Row of the page table."""
    length: int = 0
    gap_start: int = 0
    gap_end: int = 0
    num_pages: int = 0
    """Columns of the page table, those inside the gap included."""
    went_back: bool = False
    """Its last page may be one that others rely on."""
    last_used: int = 0


@dataclass(frozen=True, slots=True)
class Reservation:
    """Places for the rows of one step.

    Attributes:
        kept: bool [R], False where there is no room for a request and its rows must be dropped.
        positions: int64 [T] absolute positions of the kept rows' features, request after request.
        slots: int64 [T] places of those features in the pool.
    """

    kept: np.ndarray
    positions: np.ndarray
    slots: np.ndarray


@dataclass(frozen=True, slots=True)
class PageTable:
    """Where the context of B requests lies: int32 `pages` [B, W] (0 where there is none), `lengths` [B], and the
    positions `gaps` [B, 2] (from, to) that are to be skipped."""

    pages: np.ndarray
    lengths: np.ndarray
    gaps: np.ndarray


class PageTables:
    """The requests of a pool of `num_pages` pages. Not thread-safe."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.pool = PagePool(num_pages)
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._table = np.full((16, 16), _ABSENT, dtype=np.int32)
        self._free_rows = list(range(len(self._table) - 1, -1, -1))
        self._copies: list[tuple[int, int]] = []
        self._clock = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def resident_pages(self) -> int:
        """Pages that requests use."""
        return self.pool.num_pages - self.pool.num_available

    @property
    def idle_pages(self) -> int:
        """Pages kept for requests that may share their prefix."""
        return self.pool.num_idle

    def length(self, key: Key) -> int | None:
        """Positions of a request up to the last one held; None if it is unknown."""
        entry = self._entries.get(key)
        return entry.length if entry else None

    def num_rows(self, key: Key) -> int:
        """Context rows held of a request: its length without the gap."""
        entry = self._entries.get(key)
        return entry.length - (entry.gap_end - entry.gap_start) if entry else 0

    def reserve(
        self,
        keys: Sequence[Key],
        starts: np.ndarray,
        counts: np.ndarray,
        hashes: Sequence[Sequence[int]] | None = None,
    ) -> Reservation:
        """Apply the start rule to the rows of one step and find places for their features.

        Args:
            keys: R distinct requests.
            starts: int64 [R] position of each request's first feature.
            counts: int64 [R] features of each request.
            hashes: of each request's last full pages, the features of this step included (see `page_hashes`).
        """
        self._clock += 1
        for key in keys:
            if key in self._entries:
                self._touch(key)
        of_row = hashes or [()] * len(keys)
        rows = zip(keys, starts.tolist(), counts.tolist(), of_row, strict=True)
        kept = np.array([self._extend(*row) for row in rows], dtype=bool)
        table_rows = np.array(
            [self._entries[k].row for k, keep in zip(keys, kept, strict=True) if keep], dtype=np.int64
        )
        starts, counts = starts[kept], counts[kept]
        ends = np.cumsum(counts)
        total = int(ends[-1]) if len(ends) else 0
        positions = np.arange(total) + np.repeat(starts - ends + counts, counts)
        pages = self._table[np.repeat(table_rows, counts), positions // self.page_size].astype(np.int64)
        return Reservation(kept=kept, positions=positions, slots=pages * self.page_size + positions % self.page_size)

    def cover(
        self,
        keys: Sequence[Key],
        coming: ComingRows,
        last_page: int,
        hashes: Sequence[Sequence[int]] | None = None,
    ) -> bool:
        """Give requests the pages for rows that may come; the start rule is applied where it is known how they begin.

        Args:
            keys: R distinct requests.
            coming: their rows.
            last_page: columns that a request may have.
            hashes: see `reserve`; nothing is registered yet.

        Returns:
            False if a request whose start is not known is new, went back or would change a page that others rely on,
            or if there is no room for one: then only `reserve` can tell what to do, and does as if nothing had been.
        """
        of_row = hashes or [()] * len(keys)
        rows = list(zip(keys, coming.starts.tolist(), coming.most.tolist(), of_row, strict=True))
        if any(start < 0 and (key not in self._entries or self._entries[key].went_back) for key, start, *_ in rows):
            return False
        self._clock += 1
        for key in keys:
            if key in self._entries:
                self._touch(key)
        most_pages = min(last_page, self.pool.num_pages)
        if all(self._cover(*row, most_pages) for row in rows):
            return True
        self.trim(keys)
        return False

    def _cover(self, key: Key, start: int, most: int, hashes: Sequence[int], most_pages: int) -> bool:
        if start < 0:
            return self._lengthen(self._entries[key], most, most_pages)
        if -(-(start + most) // self.page_size) > most_pages:
            return False
        return self._grow(self._placed(key, start, start + most, hashes), start, start + most)

    def _lengthen(self, entry: _Entry, more: int, most_pages: int) -> bool:
        end, first = entry.length + more, entry.length // self.page_size
        num_pages = -(-end // self.page_size)
        if num_pages > most_pages:
            return False
        if first < entry.num_pages and self.pool.is_fixed(int(self._table[entry.row, first])):
            return False
        return num_pages <= entry.num_pages or self._grow(entry, entry.length, end)

    def trim(self, keys: Sequence[Key]) -> None:
        """Take back what `cover` gave and no row was put into."""
        for key in keys:
            if key in self._entries:
                self._trim(self._entries[key])

    def lengths(self, keys: Sequence[Key]) -> np.ndarray:
        """int64 [R] positions of known requests up to the last one held."""
        return np.array([self._entries[key].length for key in keys], dtype=np.int64)

    def table(self, keys: Sequence[Key]) -> PageTable:
        """Where the context of known requests lies."""
        entries = [self._entries[key] for key in keys]
        width = max((entry.num_pages for entry in entries), default=0)
        return PageTable(
            pages=np.maximum(self._table[[entry.row for entry in entries], :width], 0),
            lengths=np.array([entry.length for entry in entries], dtype=np.int32),
            gaps=np.array([(entry.gap_start, entry.gap_end) for entry in entries], dtype=np.int32).reshape(-1, 2),
        )

    def take_copies(self) -> list[tuple[int, int]]:
        """Pages (from, to) to be copied before anything is written: shared ones that are about to change."""
        copies, self._copies = self._copies, []
        return copies

    def free(self, key: Key) -> None:
        """Forget a request; nothing happens if it is unknown. Its registered pages stay findable."""
        entry = self._entries.pop(key, None)
        if entry:
            self._shrink(entry, 0)
            self._free_rows.append(entry.row)

    def clear(self) -> None:
        """Forget everything."""
        for session in {session for session, _ in self._entries} | self.pool.sessions:
            self.free_session(session)

    def free_session(self, session: int) -> None:
        """Forget every request and every page of a session."""
        for key in [key for key in self._entries if key[0] == session]:
            self.free(key)
        self.pool.drop_session(session)

    def _extend(self, key: Key, start: int, count: int, hashes: Sequence[int]) -> bool:
        """Make a request `start + count` positions long; False, and the request forgotten, without room for it."""
        end = start + count
        entry = self._entries.get(key)
        if entry and start == entry.length and start < end <= entry.num_pages * self.page_size and not entry.went_back:
            # The common case, apart for its speed: more rows for a page that is this request's own.
            entry.length = end
            self._register(key[0], entry, hashes)
            return True
        num_pages = -(-end // self.page_size)
        if num_pages > self.pool.num_pages:
            self.free(key)
            return False
        entry = self._placed(key, start, end, hashes)
        if not self._grow(entry, start, end):
            self.free(key)
            return False
        entry.length = end
        self._register(key[0], entry, hashes)
        return True

    def _placed(self, key: Key, start: int, end: int, hashes: Sequence[int]) -> _Entry:
        """The entry of a request, new or not, whose next row is the one at `start`."""
        if key not in self._entries:
            self._entries[key] = _Entry(row=self._new_row())
            self._touch(key)
            if len(hashes) == end // self.page_size:
                self._share_prefix(key, hashes[: start // self.page_size])
        entry = self._entries[key]
        self._trim(entry)
        self._go_to(entry, start)
        entry.length = start
        return entry

    def _share_prefix(self, key: Key, hashes: Sequence[int]) -> None:
        """Take over the registered pages of a prefix, up to the first that is not."""
        entry = self._entries[key]
        self._widen(len(hashes))
        for column, value in enumerate(hashes):
            page = self.pool.share((key[0], value))
            if page is None:
                break
            self._table[entry.row, column] = page
            entry.num_pages = column + 1
        entry.length = entry.num_pages * self.page_size

    def _go_to(self, entry: _Entry, start: int) -> None:
        """The start rule: leave the entry so that the next row is the one at `start`."""
        if start > entry.length:
            if entry.gap_end > entry.gap_start:
                # One gap a request: what lies between two of them is given up.
                self._shrink(entry, -(-entry.gap_start // self.page_size))
            else:
                entry.gap_start = entry.length
            entry.gap_end = start
            return
        if start < entry.length:
            self._shrink(entry, -(-start // self.page_size))
            entry.went_back = True
        if start <= entry.gap_start:
            entry.gap_start = entry.gap_end = 0
            return
        entry.gap_end = min(entry.gap_end, start)
        self._clear_gap(entry, start)

    def _grow(self, entry: _Entry, start: int, end: int) -> bool:
        """Give positions `start .. end - 1` pages that may be written; False if there are not enough."""
        if start == end:
            return True
        first, num_pages = start // self.page_size, -(-end // self.page_size)
        self._widen(num_pages)
        columns = self._table[entry.row]
        current = columns[first:num_pages].tolist()
        fixed = current[0] != _ABSENT and self.pool.is_fixed(current[0])
        absent = [column for column, page in enumerate(current, first) if page == _ABSENT]
        while len(absent) + fixed > self.pool.num_available:
            if not self._evict():
                return False
        if fixed:
            shared, own = current[0], self.pool.take()
            self._copies.append((shared, own))
            columns[first] = own
            self.pool.release(shared)
        for column in absent:
            columns[column] = self.pool.take()
        entry.num_pages = num_pages
        entry.went_back = False
        return True

    def _register(self, session: int, entry: _Entry, hashes: Sequence[int]) -> None:
        first = entry.length // self.page_size - len(hashes)
        for column, value in enumerate(hashes, first):
            begin, end = column * self.page_size, (column + 1) * self.page_size
            if end <= entry.gap_start or begin >= entry.gap_end:
                self.pool.register(int(self._table[entry.row, column]), (session, value))

    def _touch(self, key: Key) -> None:
        self._entries[key].last_used = self._clock
        self._entries.move_to_end(key)

    def _evict(self) -> bool:
        """Forget the least recently used request that this step does not name; False if there is none."""
        key, entry = next(iter(self._entries.items()))
        if entry.last_used == self._clock:
            return False
        self.free(key)
        return True

    def _trim(self, entry: _Entry) -> None:
        needed = -(-entry.length // self.page_size)
        if entry.num_pages > needed:
            self._shrink(entry, needed)
        self._clear_gap(entry, entry.length)

    def _clear_gap(self, entry: _Entry, end: int) -> None:
        """Release the pages of a gap behind which nothing is held up to `end`."""
        if entry.gap_start < entry.gap_end == end:
            self._shrink(entry, -(-entry.gap_start // self.page_size))
            # The page in which it ends, if any, has to be given anew.
            entry.num_pages = max(entry.num_pages, end // self.page_size)
            self._widen(entry.num_pages)

    def _shrink(self, entry: _Entry, num_pages: int) -> None:
        """Release the pages of all columns from `num_pages` on."""
        columns = self._table[entry.row, num_pages : entry.num_pages]
        for page in columns[columns != _ABSENT].tolist():
            self.pool.release(page)
        columns[:] = _ABSENT
        entry.num_pages = min(entry.num_pages, num_pages)

    def _widen(self, num_pages: int) -> None:
        width = self._table.shape[1]
        if num_pages > width:
            more = max(num_pages, 2 * width) - width
            self._table = np.pad(self._table, ((0, 0), (0, more)), constant_values=_ABSENT)

    def _new_row(self) -> int:
        if not self._free_rows:
            rows = len(self._table)
            self._table = np.pad(self._table, ((0, rows), (0, 0)), constant_values=_ABSENT)
            self._free_rows = list(range(2 * rows - 1, rows - 1, -1))
        return self._free_rows.pop()
