"""Weights that come to a device while it serves: on a stream of their own, in pieces that keep no launch waiting."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_PIECE_BYTES = 2**23
"""The driver lets nobody else in for as long as it takes one piece of pageable memory."""


def copied_beside(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device, complete when this returns, so that any stream may use it.

    Not ordered after work of other streams: the tensor must be complete too.
    """
    if device.type != "cuda":
        return tensor.to(device, copy=True)
    copy = torch.empty_like(tensor, device=device, memory_format=torch.contiguous_format)
    stream = torch.cuda.Stream(device)
    # Memory that was given back a moment ago may still be read by kernels that are queued.
    stream.wait_stream(torch.cuda.current_stream(device))
    length = max(1, _PIECE_BYTES // tensor.element_size())
    with torch.cuda.stream(stream):
        for piece, source in zip(copy.view(-1).split(length), tensor.contiguous().view(-1).split(length), strict=True):
            piece.copy_(source)
    stream.synchronize()
    return copy


@torch.no_grad()
def move_beside(module: nn.Module, device: torch.device) -> None:
    """Move a module that nobody uses yet, in place; one that is there already stays as it is."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.device.type != device.type:
            tensor.data = copied_beside(tensor.data, device)
