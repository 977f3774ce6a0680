"""CUDA graphs of decoder steps: one launch in place of hundreds, for every shape that comes back."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch

from unmask.decoding.batch import PackedBatch, Shape
from unmask.decoding.decoder import Caches, Decoder


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    batch: PackedBatch
    tokens_BK: torch.Tensor


class StepGraphs:
    """Runs steps through graphs, capturing a shape when it comes for the first time.

    A step may be captured because it is a pure function of its batch but for keys and values, and those it writes
    are the same on every run of the same batch.
    """

    def __init__(self, caches: Caches, max_graphs: int) -> None:
        self.caches = caches
        self.max_graphs = max_graphs
        # By the decoder itself, not its id: a decoder that is gone may leave its id to another.
        self._captured: OrderedDict[tuple[Decoder, Shape], _Captured] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, decoder: Decoder, batch: PackedBatch) -> torch.Tensor:
        """What `decoder.step` gives for the batch, int64 [B, K]."""
        key = (decoder, batch.shape)
        if key not in self._captured:
            self._captured[key] = self._capture(decoder, batch)
            if len(self._captured) > self.max_graphs:
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        captured = self._captured[key]
        captured.batch.integers.copy_(batch.integers)
        captured.batch.floats.copy_(batch.floats)
        captured.graph.replay()
        return captured.tokens_BK.clone()  # the next replay of any graph of the pool may overwrite it

    def _capture(self, decoder: Decoder, batch: PackedBatch) -> _Captured:
        own = PackedBatch(
            shape=batch.shape,
            mask_id=batch.mask_id,
            scratch_column=batch.scratch_column,
            integers=batch.integers.clone(),
            floats=batch.floats.clone(),
        )
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            decoder.step(own.unpack(), self.caches)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            tokens_BK = decoder.step(own.unpack(), self.caches)
        return _Captured(graph, own, tokens_BK)
