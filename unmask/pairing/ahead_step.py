"""A step that is queued before its rows are known: what can be settled then, and what is noted afterwards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unmask.models.dflash import DFlashConfig
from unmask.pairing.context_cache import ContextCache
from unmask.pairing.graphed_blocks import GraphedBlocks
from unmask.pairing.mailbox import Control
from unmask.pairing.mailbox_words import signed
from unmask.pairing.page_hashes import hashes_by_row
from unmask.pairing.page_tables import Key
from unmask.pairing.stream_end import SeenStep, StreamEnd
from unmask.pairing.wire import EIGHT_BIT


@dataclass(frozen=True, slots=True)
class Booking:
    """What became of a step.

    Attributes:
        counts: valid ids of each row [R].
        num_with_gap: blocks that were drafted without all of their context.
        all_served: False where rows could not be taken; they are a gap from now on.
    """

    counts: np.ndarray
    num_with_gap: int
    all_served: bool


@dataclass(frozen=True, slots=True)
class AheadStep:
    """A step that is queued behind its doorbell.

    Attributes:
        keys: its requests.
        lengths: int64 [R], where each request's rows must begin.
        has_gap: bool [R].
        hashes: of each request's last full pages, if any are told.
    """

    control: Control
    keys: list[Key]
    lengths: np.ndarray
    has_gap: np.ndarray
    hashes: list[list[int]] | None

    @classmethod
    def queue(
        cls,
        blocks: GraphedBlocks,
        cache: ContextCache,
        config: DFlashConfig,
        session: int,
        control: Control,
        end: StreamEnd,
    ) -> AheadStep | None:
        """Give its requests the pages that may be needed, and queue it.

        Returns:
            None for a step that has to wait for its rows: one with requests that are new, went back or share a page
            that would change and do not say where they begin, or come near the last position, or one that no graphs
            were recorded for.
        """
        tables, layout, coming = cache.tables, end.mailbox.layout, control.coming
        num_requests, k = len(control.requests), control.num_speculative_tokens
        keys = [(session, request) for request in control.requests.tolist()]
        is_plain = (
            layout.dtype in (cache.keys.dtype, EIGHT_BIT)
            and layout.width == config.hidden_size
            and 0 < k < config.block_size
            and int(coming.most.min(initial=1)) > 0
            and 0 < num_requests == len(set(keys)) <= layout.max_requests
        )
        if not is_plain or not blocks.can_run_ahead(num_requests, coming.total, k):
            return None
        hashes = None
        if control.num_hashes is not None:
            if (control.num_hashes > np.maximum(coming.starts + coming.most, 0) // cache.page_size).any():
                return None
            hashes = hashes_by_row(control.page_hashes, control.num_hashes)
        if not cache.cover(keys, coming, blocks.max_pages, hashes):
            return None
        table, lengths = tables.table(keys), tables.lengths(keys)
        if int((lengths + coming.most).max()) + k >= config.max_position_embeddings:
            tables.trim(keys)
            return None
        blocks.run_ahead(end, control.number, coming.most, table, k)
        return cls(control, keys, lengths, table.gaps[:, 1] > table.gaps[:, 0], hashes)

    def book(self, seen: SeenStep, cache: ContextCache, config: DFlashConfig) -> Booking:
        """Take note of what its rows were, once its stream has come to the end."""
        control, (starts, counts, last, tags) = self.control, seen.rows.T.astype(np.int64)
        if seen.was_let_go:
            # Its rows may have been half there.
            cache.tables.trim(self.keys)
            return Booking(np.zeros(len(starts), dtype=np.int64), 0, all_served=False)
        served = (tags == signed(control.number)) & (starts == self.lengths)
        served &= (counts > 0) & (counts <= control.coming.most)
        picked = np.flatnonzero(served)
        # Hashes are of the pages that all of the foretold rows fill.
        hashes = (
            [self.hashes[i] if counts[i] == control.coming.most[i] else [] for i in picked] if self.hashes else None
        )
        cache.reserve([self.keys[i] for i in picked], starts[picked], counts[picked], hashes)
        cache.tables.trim(self.keys)
        k, ends = control.num_speculative_tokens, starts + counts
        wanted = served & (last >= 0) & (ends + k < config.max_position_embeddings)
        return Booking(np.where(wanted, k, 0), int((wanted & self.has_gap).sum()), all_served=bool(served.all()))
