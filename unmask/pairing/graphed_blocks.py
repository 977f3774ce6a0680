"""Drafting on a GPU: one CUDA graph for each batch size of a ladder and each K, over the paged context cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.models.dflash import DFlashDraft, DFlashLayer, rotate
from unmask.pairing.block_drafter import BlockDrafter, most_likely
from unmask.pairing.block_network import BlockInputs, BlockNetwork
from unmask.pairing.context_cache import ContextCache
from unmask.pairing.page_tables import PageTable
from unmask.pairing.stream_end import StreamEnd
from unmask.pairing.unpacked_rows import ANCHOR, GAP_FROM, LAST_TOKEN, LENGTH, PAGES, Destination

LADDER = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Batch sizes with graphs of their own; a batch runs in the next larger one, larger ones in parts."""

ROW_LADDER = (32, 64, 128, 256, 512, 1024, 2048)
"""Numbers of context rows with graphs of their own; more are appended in parts."""


class GraphedBlocks(BlockDrafter):
    """A `BlockDrafter` whose passes are recorded once and replayed.

    A pass reads its inputs (tokens, positions, page tables) from one device table, so that a step is one copy in, one
    graph, one copy out. Graphs are recorded when they are first needed, or by `record` ahead of serving. Without CUDA
    the same passes run eagerly.

    Args:
        draft, embedding, lm_head, cache: see `BlockDrafter`; the draft's weights are read in place.
        ladder: batch sizes to record, ascending.
    """

    uses_confidence = False

    def __init__(
        self,
        draft: DFlashDraft,
        embedding: Tensor,
        lm_head: Tensor,
        cache: ContextCache,
        ladder: Sequence[int] = LADDER,
    ) -> None:
        super().__init__(draft, embedding, lm_head, cache)
        device, config = embedding.device, draft.config
        self._ladder = tuple(ladder)
        self._on_gpu = device.type == "cuda"
        self._network = BlockNetwork(draft, embedding, cache)
        fields = PAGES + min(-(-config.max_position_embeddings // cache.page_size), cache.num_pages)
        # One request a column, so that the part that is in use is contiguous.
        self._staged = torch.zeros(fields, self._ladder[-1], dtype=torch.int32, pin_memory=self._on_gpu)
        self._inputs = torch.zeros(fields, self._ladder[-1], dtype=torch.int32, device=device)
        most, hidden = ROW_LADDER[-1], embedding.shape[1]
        self._staged_rows = torch.zeros(most, hidden, dtype=embedding.dtype, pin_memory=self._on_gpu)
        self._staged_places = torch.zeros(2, most, dtype=torch.int64, pin_memory=self._on_gpu)
        self._rows = torch.zeros(most, hidden, dtype=embedding.dtype, device=device)
        self._places = torch.zeros(2, most, dtype=torch.int64, device=device)
        self._uploaded = torch.cuda.Event() if self._on_gpu else None
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._append_graphs: dict[int, torch.cuda.CUDAGraph] = {}
        # One pool of intermediate results: graphs are replayed one after another.
        self._pool = torch.cuda.graph_pool_handle() if self._on_gpu else None
        self._kv_weight, self._key_norms = self._derived()

    def adopt(self, draft: DFlashDraft) -> None:
        """Copy the weights of a draft of the same sizes over those in use. Graphs, which take seconds to record, read
        them where they lie."""
        with torch.no_grad():
            self._draft.load_state_dict(draft.state_dict())
            for kept, new in zip((self._kv_weight, self._key_norms), self._derived(), strict=True):
                kept.copy_(new)

    @torch.inference_mode()
    def record(self, ks: Sequence[int]) -> None:
        """Record all graphs for these K, the largest first: the others fit into its memory."""
        self._places[1] = self._cache.spare_slot
        with torch.cuda.device_of(self._inputs):
            for rows in reversed(ROW_LADDER):
                self._append_graphs[rows], _ = self._recorded(partial(self._append_pass, rows))
            for batch in reversed(self._ladder):
                for k in ks:
                    self._graph(batch, k)

    @torch.inference_mode()
    def append(self, context: Tensor, positions: np.ndarray, slots: np.ndarray) -> None:
        """See `BlockDrafter.append`; one GEMM makes the keys and values of all layers."""
        lies_pinned = self._on_gpu and context.is_pinned()
        with torch.cuda.device_of(self._inputs):
            for first in range(0, len(context), ROW_LADDER[-1]):
                part = slice(first, first + ROW_LADDER[-1])
                self._append_part(context[part], positions[part], slots[part], lies_pinned)
        if self._uploaded is not None and lies_pinned:
            # A mailbox's own rows: its target may write the next ones as soon as this returns.
            self._uploaded.synchronize()

    def _append_part(self, context: Tensor, positions: np.ndarray, slots: np.ndarray, lies_pinned: bool) -> None:
        """Append as many rows as one graph holds; the device reads them where they lie if it can."""
        size = len(context)
        rows = _rung(ROW_LADDER, size)
        if self._uploaded is not None:
            self._uploaded.synchronize()
        if not lies_pinned:
            context = self._staged_rows[:size].copy_(context)
        places = self._staged_places.numpy()
        # Nothing is drafted beyond the last position, but a long request's rows may arrive.
        places[0, :size], places[1, :size] = np.minimum(positions, len(self._network.rotary[0]) - 1), slots
        places[0, size:rows], places[1, size:rows] = 0, self._cache.spare_slot
        self._rows[:size].copy_(context, non_blocking=True)
        self._places.copy_(self._staged_places, non_blocking=True)
        if self._uploaded is None:
            self._append_pass(rows)
            return
        self._uploaded.record()
        if rows not in self._append_graphs:
            self._append_graphs[rows], _ = self._recorded(lambda: self._append_pass(rows))
        self._append_graphs[rows].replay()

    def _append_pass(self, rows: int) -> None:
        """Context KV of the first rows of the upload buffer; a fixed sequence of kernels."""
        config, positions = self._draft.config, self._places[0, :rows]
        projected = F.linear(self._rows[:rows], self._kv_weight).view(
            rows, config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim
        )
        keys, values = projected.permute(2, 1, 0, 3, 4)
        keys = F.rms_norm(keys, keys.shape[-1:], None, config.rms_norm_eps) * self._key_norms
        cos, sin = (table.index_select(0, positions) for table in self._network.rotary)
        self._cache.write(self._places[1, :rows], rotate(keys, cos, sin), values)

    @torch.inference_mode()
    def draft(self, last_tokens: np.ndarray, anchors: np.ndarray, table: PageTable, k: int) -> np.ndarray:
        """See `BlockDrafter.draft`."""
        bounds = [*range(0, len(anchors), self._ladder[-1]), len(anchors)]
        with torch.cuda.device_of(self._inputs):
            parts = [self._part(last_tokens, anchors, table, k, slice(a, b)) for a, b in pairwise(bounds)]
        return np.concatenate(parts)

    def _part(self, last_tokens: np.ndarray, anchors: np.ndarray, table: PageTable, k: int, rows: slice) -> np.ndarray:
        """Draft as many blocks as one graph holds."""
        size = rows.stop - rows.start
        batch = _rung(self._ladder, size)
        fields = self._upload(last_tokens[rows], anchors[rows], table, rows, batch)
        ids = self._replayed(batch, k, fields)
        return ids[:size].to("cpu", torch.int32).numpy()

    def _upload(
        self, last_tokens: np.ndarray | int, anchors: np.ndarray | int, table: PageTable, rows: slice, batch: int
    ) -> int:
        """Fill the input table; the number of its rows in use."""
        size, fields = rows.stop - rows.start, PAGES + table.pages.shape[1]
        staged = self._staged.numpy()
        # Requests beyond the batch have no context; what they draft is dropped.
        staged[:fields, size:batch] = 0
        staged[LAST_TOKEN, :size], staged[ANCHOR, :size], staged[LENGTH, :size] = (
            last_tokens,
            anchors,
            table.lengths[rows],
        )
        staged[GAP_FROM:PAGES, :size] = table.gaps[rows].T
        staged[PAGES:fields, :size] = table.pages[rows].T
        self._inputs[:fields].copy_(self._staged[:fields], non_blocking=True)
        return fields

    def _replayed(self, batch: int, k: int, fields: int) -> Tensor:
        """Ids [batch, K] from the input table."""
        if not self._on_gpu:
            return self._pass(batch, k, fields)
        graph, ids = self._graph(batch, k)
        graph.replay()
        return ids

    def can_run_ahead(self, num_requests: int, num_rows: int, k: int) -> bool:
        """Whether nothing has to be recorded or cut into parts for a step of R requests with up to `num_rows` rows."""
        if num_requests > self._ladder[-1] or num_rows > ROW_LADDER[-1]:
            return False
        batch, rows = _rung(self._ladder, num_requests), _rung(ROW_LADDER, num_rows)
        return not self._on_gpu or ((batch, k) in self._graphs and rows in self._append_graphs)

    @property
    def max_pages(self) -> int:
        """Pages that a request can have in the input table."""
        return len(self._inputs) - PAGES

    @torch.inference_mode()
    def run_ahead(self, end: StreamEnd, number: int, most: np.ndarray, table: PageTable, k: int) -> None:
        """Queue a step behind its doorbell: append the rows that it will bring, draft, answer.

        Args:
            end: the mailbox's.
            number: the step.
            most: int64 [R] rows of each request at most.
            table: of its requests, with room for them.
            k: tokens to draft; see `can_run_ahead`.
        """
        size = len(table.lengths)
        batch, rows = _rung(self._ladder, size), _rung(ROW_LADDER, int(most.sum()))
        into = self._destination(rows)
        with torch.cuda.device_of(self._inputs):
            fields = self._upload(0, most, table, slice(0, size), batch)
            end.begin(number, size, int(most.max()), into)
            if self._on_gpu:
                self._append_graphs[rows].replay()
            else:
                self._append_pass(rows)
            end.end(number, size, self._replayed(batch, k, fields), into)

    @torch.inference_mode()
    def warm_up_ahead(self, end: StreamEnd, number: int) -> None:
        """Compile what `run_ahead` launches, on a step that has been answered. Steps may run meanwhile: nothing of
        theirs is touched."""
        into = self._destination(ROW_LADDER[0])
        scratch = replace(
            into,
            inputs=torch.zeros_like(self._inputs),
            rows=torch.zeros_like(into.rows),
            places=torch.zeros_like(self._places)[:, : into.places.shape[1]],
        )
        with torch.cuda.device_of(self._inputs):
            end.begin(number, 1, 1, scratch)
            end.end(number, 1, torch.zeros(1, 1, dtype=torch.int64, device=self._inputs.device), scratch)
        while not end.is_done:
            time.sleep(0)

    def _destination(self, rows: int) -> Destination:
        return Destination(
            inputs=self._inputs,
            rows=self._rows[:rows],
            places=self._places[:, :rows],
            page_size=self._cache.page_size,
            spare_slot=self._cache.spare_slot,
            num_positions=len(self._network.rotary[0]),
        )

    def _graph(self, batch: int, k: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        if (batch, k) not in self._graphs:
            self._graphs[batch, k] = self._recorded(lambda: self._pass(batch, k, len(self._inputs)))
        return self._graphs[batch, k]

    def _recorded(self, run: Callable[[], Tensor | None]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A graph of what `run` launches, and its result."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # Kernels are compiled and libraries opened outside the recording.
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()
        return graph, result

    def _pass(self, batch: int, k: int, fields: int) -> Tensor:
        """Ids [batch, K] from the input table; a fixed sequence of kernels."""
        inputs = self._inputs[:fields, :batch]
        hidden_BQH = self._network(
            BlockInputs(
                last_tokens=inputs[LAST_TOKEN],
                anchors=inputs[ANCHOR],
                lengths=inputs[LENGTH],
                gaps=inputs[GAP_FROM:PAGES].T,
                pages=inputs[PAGES:].T,
            ),
            k,
        )
        return most_likely(hidden_BQH[:, 1:].flatten(0, 1), self._lm_head).view(batch, k)

    def _derived(self) -> tuple[Tensor, Tensor]:
        """Key and value weights of all layers [L * 2 * M * d, H], and their key norms [L, 1, 1, d]."""
        attentions = [cast(DFlashLayer, layer).self_attn for layer in self._draft.layers]
        weights = torch.cat([w for a in attentions for w in (a.k_proj.weight, a.v_proj.weight)])
        return weights.detach(), torch.stack([a.k_norm.weight for a in attentions]).detach()[:, None, None]


def _rung(ladder: Sequence[int], size: int) -> int:
    """The lowest that holds so many."""
    return next(rung for rung in ladder if rung >= size)


def halvings(k: int) -> list[int]:
    """K, half of it, and so on down to 1: the Ks that graphs are recorded for ahead of serving."""
    return [k >> shift for shift in range(k.bit_length())]
