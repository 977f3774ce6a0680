"""The training forward of a draft as one module, so that a data-parallel wrapper sees every parameter used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from unmask.masking.anchored import block_sparse_mask, dense_mask
from unmask.models.dflash import DFlashDraft
from unmask.objectives.confidence import ConfidenceHead
from unmask.objectives.drafting import cut_blocks
from unmask.training.sequences import Batch


@dataclass(frozen=True, slots=True)
class TrainingBlocks:
    """The blocks of one step. Columns are those of the batch; positions are those of a block's own sequence."""

    ids_BMQ: Tensor
    positions_BMQ: Tensor
    labels_BMK: Tensor
    valid_BMK: Tensor
    before_BMK: Tensor
    """Column whose target state predicts the row: the one before it."""
    anchors_BM: Tensor
    starts_BM: Tensor
    context_positions_BT: Tensor

    def pinned(self) -> list[Tensor]:
        """The fields in their order, in pinned memory."""
        return [getattr(self, field.name).pin_memory() for field in fields(self)]

    def to(self, device: torch.device) -> TrainingBlocks:
        """Copies on a device, without waiting for it."""
        parts = self.pinned() if device.type == "cuda" else [getattr(self, field.name) for field in fields(self)]
        return TrainingBlocks(*(part.to(device, non_blocking=True) for part in parts))


def training_blocks(batch: Batch, anchors: Tensor, block_size: int, mask_token_id: int) -> TrainingBlocks:
    """The blocks that start at anchors [B, M] (columns of the batch; -1 is a dead block)."""
    blocks = cut_blocks(batch.ids_BT, batch.response_BT, anchors, block_size, mask_token_id)
    starts = batch.starts_BT.gather(1, anchors.clamp(min=0))
    columns = torch.arange(batch.ids_BT.shape[1]).expand_as(batch.ids_BT)
    return TrainingBlocks(
        ids_BMQ=blocks.ids_BMQ,
        positions_BMQ=blocks.positions_BMQ - starts[..., None],
        labels_BMK=blocks.labels_BMK,
        valid_BMK=blocks.valid_BMK,
        before_BMK=blocks.positions_BMQ[..., :-1].clamp(max=batch.ids_BT.shape[1] - 1),
        anchors_BM=anchors,
        starts_BM=starts,
        context_positions_BT=columns - batch.starts_BT,
    )


class DraftingForward(nn.Module):
    """Final states of all masked rows, and what the confidence head makes of them.

    Args:
        draft: the draft.
        confidence: its confidence head, if one is trained.
        compiled: compile context and layers with torch.compile.
    """

    def __init__(self, draft: DFlashDraft, confidence: ConfidenceHead | None = None, *, compiled: bool = False) -> None:
        super().__init__()
        self.draft, self.confidence = draft, confidence
        self._context: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = self._project
        if compiled:
            self._context = torch.compile(self._project, dynamic=False)
            for layer in draft.layers:
                layer.compile(dynamic=False)

    def forward(
        self, blocks: TrainingBlocks, features_BTF: Tensor, embedding_VH: Tensor, *, packed: bool
    ) -> tuple[Tensor, Tensor | None]:
        """States [B, M, K, H] of all masked rows, each seeing the features strictly before its anchor.

        Args:
            packed: whether rows of the batch hold several sequences; then attention is block-sparse on a GPU, and
                the dense reference elsewhere.
        """
        context_k, context_v = self._context(features_BTF, blocks.context_positions_BT)
        block = embedding_VH[blocks.ids_BMQ].to(context_k.dtype).flatten(1, 2)
        make = block_sparse_mask if packed and block.is_cuda else dense_mask
        mask = make(blocks.anchors_BM, blocks.ids_BMQ.shape[2], features_BTF.shape[1], blocks.starts_BM)
        hidden = self.draft(block, blocks.positions_BMQ.flatten(1, 2), context_k, context_v, mask)
        hidden = hidden.unflatten(1, blocks.ids_BMQ.shape[1:])[:, :, 1:]
        return hidden, self.confidence(hidden) if self.confidence is not None else None

    def _project(self, features_BTF: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        context = self.draft.project_features(features_BTF.to(self.draft.fc.weight.dtype))
        return self.draft.context_kv(context, positions_BT)
