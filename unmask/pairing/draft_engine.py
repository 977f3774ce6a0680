"""The draft side of a pairing: feature rows of many target workers in, one block of token ids a request out.

One step, for all sessions together: append the new rows to each request's context KV, run the draft once over
[anchor, mask x K] blocks whose contexts are right-padded and masked (DFlash, arXiv 2602.06036, section 4), and take
the most likely id at every mask. Ids alone keep the target's distribution exact at any temperature.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.errors import PairingError, WireError
from unmask.models.dflash import DFlashDraft
from unmask.pairing.context_cache import ContextCache, Key, Reservation
from unmask.pairing.hello import Hello, draft_version, hello_of
from unmask.pairing.wire import Proposals, Step
from unmask.types import TargetRecord

_LOGITS_PER_CHUNK = 2**26
"""The head is applied to as many rows at a time as keep the logits below this number."""


class DraftEngine:
    """A draft with the context of every request of every session.

    `step`, `swap` and `close_session` may be called from several threads and exclude one another.

    Args:
        draft: the network, on the device and in the dtype that it shall run in.
        embedding: the target's token embeddings [V, H].
        lm_head: the target's LM head [V, H].
        record: the target that the draft was trained for, where it is recorded.
        memory_mb: bound of the context cache in MiB.
        page_size: positions per cache page.
    """

    def __init__(
        self,
        draft: DFlashDraft,
        embedding: Tensor,
        lm_head: Tensor,
        *,
        record: TargetRecord | None = None,
        memory_mb: float = 256,
        page_size: int = 16,
    ) -> None:
        weight = draft.fc.weight
        self._embedding = embedding.detach().to(weight)
        tied = lm_head.data_ptr() == embedding.data_ptr()
        self._lm_head = self._embedding if tied else lm_head.detach().to(weight)
        self._memory_mb = memory_mb
        self._page_size = page_size
        self._lock = threading.Lock()
        self._install(draft, record)

    def swap(self, draft: DFlashDraft, record: TargetRecord | None = None) -> None:
        """Replace the weights between two steps.

        Rows of the old version were projected by its weights, so its context is dropped and its steps are refused
        (`step` returns None). Target workers greet the draft anew, and requests that were begun under the old
        version run on without proposals to their end.

        Raises:
            PairingError: the new draft does not fit the embedding table.
        """
        with self._lock:
            self._install(draft, record)

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
                    self._cache.free((session, request))
            rows = np.concatenate([step.rows for _, step in current]) if current else np.empty(0)
            tokens, counts = self._run(current, rows) if len(rows) else (np.empty((0, 1)), np.empty(0))
            return self._replies(batch, tokens, counts)

    def close_session(self, session: int) -> None:
        """Forget every request of a session."""
        with self._lock:
            self._cache.free_session(session)

    @property
    def resident_requests(self) -> int:
        """Requests with context in the cache."""
        return len(self._cache)

    @property
    def resident_pages(self) -> int:
        """Cache pages in use, of `num_pages`."""
        return self._cache.resident_pages

    @property
    def num_pages(self) -> int:
        """Cache pages in all."""
        return self._cache.num_pages

    def _install(self, draft: DFlashDraft, record: TargetRecord | None) -> None:
        config = draft.config
        if self._embedding.shape != (config.vocab_size, config.hidden_size):
            raise PairingError(
                f"the draft was made for {config.vocab_size} x {config.hidden_size}, the target's table is "
                f"{self._embedding.shape[0]} x {self._embedding.shape[1]}",
                field="vocab_size",
            )
        weight = draft.fc.weight
        cache = ContextCache(
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            dtype=weight.dtype,
            device=weight.device,
            memory_mb=self._memory_mb,
            page_size=self._page_size,
        )
        version = draft_version(draft)
        self._draft, self._cache, self.version = draft.eval(), cache, version
        self.hello: Hello = hello_of(draft, version, record)

    def _run(self, current: list[tuple[int, Step]], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [R, largest K] and valid counts int64 [R] of concatenated rows."""
        num_rows = [len(step.rows) for _, step in current]
        sessions = np.repeat([session for session, _ in current], num_rows)
        k_of_row = np.repeat([step.num_speculative_tokens for _, step in current], num_rows)
        keys: list[Key] = list(zip(sessions.tolist(), rows["request"].tolist(), strict=True))
        starts, num_features = rows["start"].astype(np.int64), rows["num_features"].astype(np.int64)
        reserved = self._cache.reserve(keys, starts, num_features)
        self._append([step.features for _, step in current], reserved, num_features)

        anchors = starts + num_features
        last = anchors + k_of_row
        wanted = reserved.kept & (rows["last_token"] >= 0) & (anchors > 0)
        wanted &= last < self._draft.config.max_position_embeddings
        counts = np.where(wanted, k_of_row, 0)
        tokens = np.zeros((len(rows), int(k_of_row.max())), dtype=np.int32)
        # Block rows see one another, so that K is part of the question: requests of unequal K never share a forward.
        for k in np.unique(counts[wanted]).tolist():
            picked = np.flatnonzero(counts == k)
            tokens[picked, :k] = self._draft_block(
                [keys[i] for i in picked], rows["last_token"][picked], anchors[picked], k
            )
        return tokens, counts

    def _append(self, features: list[Tensor], reserved: Reservation, num_features: np.ndarray) -> None:
        """Turn the kept rows' features into context KV."""
        if not len(reserved.slots):
            return
        device = self._draft.fc.weight.device
        context = (features[0] if len(features) == 1 else torch.cat(features)).to(device)
        if not reserved.kept.all():
            rows = np.flatnonzero(np.repeat(reserved.kept, num_features))
            context = context.index_select(0, torch.from_numpy(rows).to(device))
        keys, values = self._draft.context_kv(context, torch.from_numpy(reserved.positions).to(device))
        self._cache.write(torch.from_numpy(reserved.slots).to(device), keys, values)

    def _draft_block(self, keys: list[Key], last_tokens: np.ndarray, anchors: np.ndarray, k: int) -> np.ndarray:
        """Greedy ids int32 [B, K] of requests with the anchor token `last_tokens` at position `anchors`."""
        device = self._embedding.device
        ids_BQ = torch.full((len(keys), k + 1), self._draft.config.mask_token_id, dtype=torch.int64)
        ids_BQ[:, 0] = torch.from_numpy(last_tokens)
        positions_BQ = torch.from_numpy(anchors)[:, None] + torch.arange(k + 1)
        x_BQH = F.embedding(ids_BQ.to(device), self._embedding)
        hidden_BQH = self._draft.denoise(x_BQH, positions_BQ.to(device), *self._cache.gather(keys))
        return self._greedy(hidden_BQH[:, 1:].flatten(0, 1)).view(-1, k).to("cpu", torch.int32).numpy()

    def _greedy(self, hidden_NH: Tensor) -> Tensor:
        """Most likely ids [N] over the full vocabulary."""
        chunk = max(1, _LOGITS_PER_CHUNK // len(self._lm_head))
        return torch.cat([F.linear(rows, self._lm_head).argmax(-1) for rows in hidden_NH.split(chunk)])

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
