"""The draft side of a pairing: feature rows of many target workers in, one block of token ids a request out.

One step, for all sessions together: append the new rows to each request's context KV, run the draft once over
[anchor, mask x K] blocks whose contexts are right-padded and masked (DFlash, arXiv 2602.06036, section 4), and take
the most likely id at every mask. Ids alone keep the target's distribution exact at any temperature.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from unmask.errors import PairingError, WireError
from unmask.models.dflash import DFlashDraft
from unmask.objectives.confidence import ConfidenceHead
from unmask.pairing.ahead_step import AheadStep, Booking
from unmask.pairing.block_drafter import BlockDrafter, head_for, warn_once
from unmask.pairing.context_cache import ContextCache
from unmask.pairing.graphed_blocks import GraphedBlocks, halvings
from unmask.pairing.hello import Hello, draft_version, hello_of
from unmask.pairing.mailbox import Control
from unmask.pairing.page_hashes import PAGE_SIZE, hashes_by_row
from unmask.pairing.page_tables import Key, Reservation
from unmask.pairing.side_copies import move_beside
from unmask.pairing.stream_end import SeenStep, StreamEnd
from unmask.pairing.wire import Proposals, Step
from unmask.types import TargetRecord

_MAX_POSITION = 2**31 - 1
"""What a mailbox can say."""


class DraftEngine:
    """A draft with the context of every request of every session.

    `step`, `swap` and `close_session` may be called from several threads and exclude one another.

    Args:
        draft: the network, on the device and in the dtype that it shall run in.
        embedding: the target's token embeddings [V, H].
        lm_head: the target's LM head [V, H].
        record: the target that the draft was trained for, where it is recorded.
        confidence: the draft's confidence head, if it has one. It cuts blocks for targets that say what a row must be
            worth, unless it was trained on sampled text; a draft on a GPU does without it. Either is logged.
        memory_mb: bound of the context cache in MiB.
        page_size: positions per cache page.
        graph_ks: on a GPU, the Ks to record graphs for ahead of serving; None is block size - 1 and its halvings.
    """

    def __init__(
        self,
        draft: DFlashDraft,
        embedding: Tensor,
        lm_head: Tensor,
        *,
        record: TargetRecord | None = None,
        confidence: ConfidenceHead | None = None,
        memory_mb: float = 256,
        page_size: int = PAGE_SIZE,
        graph_ks: Sequence[int] | None = None,
    ) -> None:
        weight = draft.fc.weight
        self._embedding = embedding.detach().to(weight)
        tied = lm_head.data_ptr() == embedding.data_ptr()
        self._lm_head = self._embedding if tied else lm_head.detach().to(weight)
        self._memory_mb = memory_mb
        self._page_size = page_size
        self._graph_ks = graph_ks
        self._lock = threading.Lock()
        self.swaps = 0
        """Drafts that have replaced another."""
        self.proposals_with_gap = 0
        """Blocks that were drafted without all of their context."""
        self._cache = self._new_cache(draft)
        confidence = head_for(draft.config, confidence)
        self._draft, self._blocks = draft, self._new_blocks(draft, self._cache, confidence)
        self._tell_of(confidence)
        self.hello: Hello = hello_of(draft, draft_version(draft), record)

    def swap(
        self, draft: DFlashDraft, record: TargetRecord | None = None, confidence: ConfidenceHead | None = None
    ) -> int:
        """Replace the weights between two steps; the time between them grows by an exchange of references.

        The draft is best given on the host, from where it comes to the device piece by piece beside the steps; it is
        the engine's from then on.

        Context of the old version was made by its weights and means nothing to the new ones, and the feature rows that
        it was made from are gone: it is dropped. Steps of the old version are refused (`step` returns None), target
        workers greet the draft anew, and requests under way are drafted on with their older context as a gap.

        Returns:
            The new version.

        Raises:
            PairingError: the new draft does not fit the target that is being served; nothing has changed.
        """
        served, config = self._draft.config, draft.config
        if config.target_layer_ids != served.target_layer_ids:
            raise PairingError(
                f"the new draft reads layers {list(config.target_layer_ids)}, its targets report "
                f"{list(served.target_layer_ids)}; restart them for such a draft",
                field="dflash_config.target_layer_ids",
            )
        self._check_vocabulary(draft)
        confidence = head_for(config, confidence)
        # The fingerprint reads all weights, and graphs take seconds to record: not while steps wait.
        hello = hello_of(draft, draft_version(draft), record)
        move_beside(draft, self.weights.device)
        blocks, cache = self._blocks, self._cache
        recorded = blocks if isinstance(blocks, GraphedBlocks) and config == served else None
        if recorded is None:
            sizes = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim, draft.fc.weight.dtype)
            cache = cache if cache.fits(*sizes) else self._new_cache(draft)
            blocks = self._new_blocks(draft, cache, confidence)
        with self._lock:
            if recorded is not None:
                recorded.adopt(draft)
            else:
                self._draft, self._blocks, self._cache = draft, blocks, cache
            cache.tables.clear()
            self.hello = hello
            self.swaps += 1
        self._tell_of(confidence)
        return self.version

    @property
    def version(self) -> int:
        """Fingerprint of the weights that are served."""
        return self.hello.draft_version

    def check(self, step: Step) -> None:
        """Refuse a step that this draft cannot run. Raises WireError."""
        config = self._draft.config
        if step.draft_version != self.version:
            return
        if step.features.shape[1] != config.hidden_size or step.features.dtype != self._draft.fc.weight.dtype:
            raise WireError(f"feature rows of width {step.features.shape[1]} and {step.features.dtype}")
        if step.num_speculative_tokens >= config.block_size:
            raise WireError(f"K = {step.num_speculative_tokens} exceeds block size - 1 = {config.block_size - 1}")
        if len(step.rows) and int(step.rows["last_token"].max()) >= config.vocab_size:
            raise WireError("an anchor outside the vocabulary")
        ends = step.rows["start"].astype(np.int64) + step.rows["num_features"]
        if len(ends) and int(ends.max()) > _MAX_POSITION:
            raise WireError("a row beyond every sequence")
        if len(np.unique(step.rows["request"])) < len(step.rows):
            raise WireError("a request is named twice")
        if (step.rows["num_hashes"] > ends // self._page_size).any():
            raise WireError("more page hashes than full pages")

    @torch.inference_mode()
    def step(self, batch: Sequence[tuple[int, Step]]) -> list[Proposals | None]:
        """Run one step of several sessions.

        Args:
            batch: (session, step) pairs that passed `check`, at most one a session.

        Returns:
            Proposals in the order of `batch`; None for a step of another draft version, which is not run.
        """
        with self._lock:
            current = [(session, step) for session, step in batch if step.draft_version == self.version]
            for session, step in current:
                for request in step.finished.tolist():
                    self._cache.tables.free((session, request))
            rows = np.concatenate([step.rows for _, step in current]) if current else np.empty(0)
            tokens, counts = self._run(current, rows) if len(rows) else (np.empty((0, 1)), np.empty(0))
            return self._replies(batch, tokens, counts)

    @contextmanager
    def ahead(
        self, session: int, control: Control, finished: Sequence[int], end: StreamEnd, *, waits: bool = True
    ) -> Iterator[AheadStep | None]:
        """Queue a step before its rows are known. The engine is this step's until the block ends.

        The block must not end before `end.is_done`; `book` then has to be called in it.

        Args:
            session: of the mailbox.
            control: the step.
            finished: requests that will not be named again.
            end: the mailbox's.
            waits: whether to wait for a step that is under way.

        Yields:
            None for a step that is left to `step`.
        """
        if not self._lock.acquire(blocking=waits):
            yield None
            return
        try:
            for request in finished:
                self._cache.tables.free((session, request))
            blocks = self._blocks
            if not isinstance(blocks, GraphedBlocks) or control.draft_version != self.version:
                yield None
                return
            yield AheadStep.queue(blocks, self._cache, self._draft.config, session, control, end)
        finally:
            self._lock.release()

    @property
    def runs_ahead(self) -> bool:
        """Whether steps can be queued before their rows are known."""
        return isinstance(self._blocks, GraphedBlocks)

    def prepare_ahead(self, end: StreamEnd, number: int) -> None:
        """Compile what `ahead` needs, on a mailbox whose step `number` has been answered."""
        blocks = self._blocks
        if isinstance(blocks, GraphedBlocks):
            blocks.warm_up_ahead(end, number)

    def book(self, step: AheadStep, seen: SeenStep) -> Booking:
        """Take note of what the rows of a queued step were (see `AheadStep.book`)."""
        booking = step.book(seen, self._cache, self._draft.config)
        self.proposals_with_gap += booking.num_with_gap
        return booking

    def close_session(self, session: int) -> None:
        """Forget every request of a session."""
        with self._lock:
            self._cache.tables.free_session(session)

    @property
    def weights(self) -> Tensor:
        """A weight of the draft: its device and dtype are the draft's."""
        return self._draft.fc.weight

    @property
    def resident_requests(self) -> int:
        """Requests with context in the cache."""
        return len(self._cache.tables)

    @property
    def resident_pages(self) -> int:
        """Cache pages in use, of `num_pages`."""
        return self._cache.tables.resident_pages

    @property
    def idle_pages(self) -> int:
        """Cache pages that are kept for requests that may share their prefix."""
        return self._cache.tables.idle_pages

    @property
    def num_pages(self) -> int:
        """Cache pages in all."""
        return self._cache.num_pages

    def _check_vocabulary(self, draft: DFlashDraft) -> None:
        config = draft.config
        if self._embedding.shape != (config.vocab_size, config.hidden_size):
            raise PairingError(
                f"the draft was made for {config.vocab_size} x {config.hidden_size}, the target's table is "
                f"{self._embedding.shape[0]} x {self._embedding.shape[1]}",
                field="vocab_size",
            )
        if self._lm_head.shape != self._embedding.shape:
            raise PairingError(
                f"the target's LM head is {self._lm_head.shape[0]} x {self._lm_head.shape[1]}, its embedding "
                f"{self._embedding.shape[0]} x {self._embedding.shape[1]}",
                field="vocab_size",
            )

    def _tell_of(self, confidence: ConfidenceHead | None) -> None:
        if confidence is not None and not self._blocks.uses_confidence:
            warn_once("the draft's confidence head is not used on a GPU: blocks are proposed whole")

    def _new_cache(self, draft: DFlashDraft) -> ContextCache:
        self._check_vocabulary(draft)
        weight, config = draft.fc.weight, draft.config
        return ContextCache(
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            dtype=weight.dtype,
            device=weight.device,
            memory_mb=self._memory_mb,
            page_size=self._page_size,
        )

    def _new_blocks(self, draft: DFlashDraft, cache: ContextCache, confidence: ConfidenceHead | None) -> BlockDrafter:
        if not draft.fc.weight.is_cuda:
            return BlockDrafter(draft.eval(), self._embedding, self._lm_head, cache, confidence)
        blocks = GraphedBlocks(draft.eval(), self._embedding, self._lm_head, cache)
        largest = draft.config.block_size - 1
        blocks.record([k for k in self._graph_ks or halvings(largest) if k <= largest])
        return blocks

    def _run(self, current: list[tuple[int, Step]], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [R, largest K] and valid counts int64 [R] of concatenated rows."""
        num_rows = [len(step.rows) for _, step in current]
        sessions = np.repeat([session for session, _ in current], num_rows)
        k_of_row = np.repeat([step.num_speculative_tokens for _, step in current], num_rows)
        min_chance = np.repeat([step.min_chance for _, step in current], num_rows)
        keys: list[Key] = list(zip(sessions.tolist(), rows["request"].tolist(), strict=True))
        starts, num_features = rows["start"].astype(np.int64), rows["num_features"].astype(np.int64)
        hashes = hashes_by_row(np.concatenate([step.page_hashes for _, step in current]), rows["num_hashes"])
        reserved = self._cache.reserve(keys, starts, num_features, hashes)
        self._append([step.features for _, step in current], reserved, num_features)

        anchors = starts + num_features
        last = anchors + k_of_row
        held = np.array([self._cache.tables.num_rows(key) > 0 for key in keys], dtype=bool)
        wanted = reserved.kept & held & (rows["last_token"] >= 0)
        wanted &= last < self._draft.config.max_position_embeddings
        asked = np.where(wanted, k_of_row, 0)
        tokens = np.zeros((len(rows), int(k_of_row.max())), dtype=np.int32)
        counts = asked.copy()
        # Block rows see one another, so that K is part of the question: requests of unequal K never share a forward.
        for k in np.unique(asked[wanted]).tolist():
            picked = np.flatnonzero(asked == k)
            table = self._cache.tables.table([keys[i] for i in picked])
            self.proposals_with_gap += int((table.gaps[:, 1] > table.gaps[:, 0]).sum())
            tokens[picked, :k], counts[picked] = self._blocks.draft_worthwhile(
                rows["last_token"][picked], anchors[picked], table, k, min_chance[picked]
            )
        # Behind its count a row holds zeros.
        tokens[np.arange(tokens.shape[1]) >= counts[:, None]] = 0
        return tokens, counts

    def _append(self, features: list[Tensor], reserved: Reservation, num_features: np.ndarray) -> None:
        """Turn the kept rows' features into context KV."""
        if not len(reserved.slots):
            return
        context = features[0] if len(features) == 1 else torch.cat(features)
        if not reserved.kept.all():
            rows = torch.from_numpy(np.flatnonzero(np.repeat(reserved.kept, num_features)))
            context = context.index_select(0, rows.to(context.device))
        self._blocks.append(context, reserved.positions, reserved.slots)

    def _replies(
        self, batch: Sequence[tuple[int, Step]], tokens: np.ndarray, counts: np.ndarray
    ) -> list[Proposals | None]:
        replies: list[Proposals | None] = []
        first = 0
        for _, step in batch:
            if step.draft_version != self.version:
                replies.append(None)
                continue
            rows = slice(first, first + len(step.rows))
            first = rows.stop
            replies.append(
                Proposals(
                    draft_version=step.draft_version,
                    epoch=step.epoch,
                    number=step.number,
                    counts=counts[rows].astype(np.uint8),
                    tokens=_first_columns(tokens[rows], step.num_speculative_tokens),
                )
            )
        return replies


def _first_columns(tokens: np.ndarray, k: int) -> np.ndarray:
    """int32 [R, k], also where no row was run at all."""
    return tokens[:, :k].astype(np.int32) if len(tokens) else np.zeros((0, k), dtype=np.int32)
