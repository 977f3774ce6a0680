"""A training step of fixed shapes as one CUDA graph: between two steps the host does no more than choose the texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_EAGER_STEPS = 3
"""Before the recording: kernels are compiled, and the optimiser makes its moments."""


class RecordedStep:
    """Runs a step as it is written at first, then records it and replays the recording.

    Args:
        run: takes the inputs on the device, updates weights and moments in place, and returns scalars. It must not wait
            for the device, nor depend on anything that changes from step to step but the inputs.
        device: a GPU.
    """

    def __init__(self, run: Callable[[Sequence[Tensor]], dict[str, Tensor]], device: torch.device) -> None:
        self._run, self._device = run, device
        self._inputs: list[Tensor] = []
        self._outputs: dict[str, Tensor] = {}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._eager = 0

    def __call__(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """One step.

        Args:
            inputs: of the shapes and types of the first call; on the device, or in pinned host memory.

        Returns:
            Scalars, overwritten by the next step.
        """
        if not self._inputs:
            self._inputs = [torch.empty_like(tensor, device=self._device) for tensor in inputs]
        for kept, new in zip(self._inputs, inputs, strict=True):
            kept.copy_(new, non_blocking=True)
        if self._graph is not None:
            self._graph.replay()
            return self._outputs
        if self._eager < _EAGER_STEPS:
            self._eager += 1
            return self._run_aside()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._outputs = self._run(self._inputs)
        # Recording runs nothing.
        graph.replay()
        self._graph = graph
        return self._outputs

    def _run_aside(self) -> dict[str, Tensor]:
        """On a stream of its own, as a recording will: what is set up there stays valid for it."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            outputs = self._run(self._inputs)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        return outputs
