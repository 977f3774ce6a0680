"""Losses of hidden states under a frozen LM head, chunk by chunk: the logits of all rows never exist at once.

The head is not trained, so a chunk's logits are needed for two things alone: the per-row terms and their gradients
with respect to the hidden states. Both are taken while the chunk is there (one product forward, one back for each
term); the backward pass then only scales the kept gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.objectives.row_losses import RowObjective, Rows, row_gradients, row_losses

CHUNK_ELEMENTS = 2**28
"""Logits of one chunk: half a gigabyte in bfloat16."""


def chunked_rows(
    hidden_NH: Tensor,
    head_VH: Tensor,
    labels_N: Tensor,
    target_hidden_NH: Tensor | None,
    objective: RowObjective,
    *,
    compiled: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Rows:
    """Per-row terms, differentiable with respect to `hidden_NH`.

    Args:
        hidden_NH: the draft's final states; the head is applied in their dtype.
        head_VH: frozen rows of the LM head.
        labels_N: int64, indices into the head's rows.
        target_hidden_NH: the target's final (normed) states that predict the same rows; None unless
            `objective.needs_target`.
        compiled: fuse the element-wise work of a chunk with torch.compile.
    """
    kernel = _compiled_gradients() if compiled else row_gradients
    parts = _ChunkedRows.apply(
        hidden_NH, head_VH.to(hidden_NH.dtype), labels_N, target_hidden_NH, objective, kernel, chunk_elements
    )
    return Rows(*parts)


def eager_rows(
    hidden_NH: Tensor, head_VH: Tensor, labels_N: Tensor, target_hidden_NH: Tensor | None, objective: RowObjective
) -> Rows:
    """The same from all logits at once, by autograd: the reference of `chunked_rows`."""
    head = head_VH.to(hidden_NH.dtype)
    target = None if target_hidden_NH is None else F.linear(target_hidden_NH.to(head.dtype), head)
    return row_losses(F.linear(hidden_NH, head), labels_N, target, objective)


@functools.cache
def _compiled_gradients() -> Callable[..., tuple[Rows, list[Tensor]]]:
    return torch.compile(row_gradients, dynamic=False)


def _chunk_rows(num_rows: int, vocab_size: int, chunk_elements: int) -> int:
    """Rows of a chunk: chunks of one size where that can be had, since each size is compiled on its own."""
    least = max(1, -(-num_rows * vocab_size // chunk_elements))
    even = next((count for count in range(least, 2 * least) if num_rows % count == 0), least)
    return max(1, -(-num_rows // even))


class _ChunkedRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        head_VH: Tensor,
        labels_N: Tensor,
        target_hidden_NH: Tensor | None,
        objective: RowObjective,
        kernel: Callable[..., tuple[Rows, list[Tensor]]],
        chunk_elements: int,
    ) -> tuple[Tensor, ...]:
        size = _chunk_rows(hidden_NH.shape[0], head_VH.shape[0], chunk_elements)
        rows: list[Rows] = []
        kept: list[list[Tensor]] = []
        for start in range(0, len(hidden_NH), size):
            part = slice(start, start + size)
            target = None if target_hidden_NH is None else F.linear(target_hidden_NH[part].to(head_VH.dtype), head_VH)
            done, gradients = kernel(F.linear(hidden_NH[part], head_VH), labels_N[part], target, objective)
            rows.append(done)
            kept.append([gradient @ head_VH for gradient in gradients])
        ctx.save_for_backward(*(torch.cat(parts) for parts in zip(*kept, strict=True)))
        outputs = [torch.cat(parts) for parts in zip(*(r.parts() for r in rows), strict=True)]
        ctx.mark_non_differentiable(*outputs[2:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        scaled = [weight_N[:, None] * gradient for weight_N, gradient in zip(upstream, kept, strict=False)]
        return (torch.stack(scaled).sum(0).to(kept[0].dtype), *[None] * 6)
