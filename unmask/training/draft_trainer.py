"""One optimisation step of a DFlash draft, and the state from which a run resumes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.config import DistillConfig
from unmask.masking.anchored import dense_mask
from unmask.models.dflash import DFlashDraft
from unmask.objectives.drafting import AnchoredBlocks, choose_anchors, cut_blocks, decay_weights, drafting_loss
from unmask.training.feature_cache import FeatureCache
from unmask.training.head import TrainingHead
from unmask.training.rates import learning_rate

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over ranks (in place or not) and returns it; the identity on one."""


class DraftTrainer:
    """Trains a draft on cached features.

    Batches, anchors and negatives are functions of (seed, step, rank), so `step` is the whole data state.

    Args:
        draft: float32 master weights, on the training device; a data-parallel wrapper goes into `module`.
        module: what is called in the forward pass (the draft itself, or DDP around it).
        reduce: sums over ranks.
    """

    def __init__(
        self,
        draft: DFlashDraft,
        features: FeatureCache,
        head: TrainingHead,
        config: DistillConfig,
        *,
        module: nn.Module | None = None,
        reduce: Reduce = lambda x: x,
        world_size: int = 1,
    ) -> None:
        self.draft, self.features, self.head, self.config = draft, features, head, config
        self.module = module or DraftingForward(draft)
        self.reduce, self.world_size = reduce, world_size
        self.sequences = features.sequences
        self.device = features.target.device
        self.weights = decay_weights(draft.config.block_size, config.decay_gamma, self.device)
        self.optimizer = torch.optim.AdamW(
            draft.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.average = copy.deepcopy(draft).requires_grad_(False)
        self.steps_done = 0

    def step(self, progress: float) -> dict[str, float]:
        """One optimiser step.

        Args:
            progress: share of the budget used so far, in [0, 1]; it sets the learning rate.

        Returns:
            `loss`, `cross_entropy`, `entropy`, `accuracy` (of drafted rows), `learning_rate`, `grad_norm`.
        """
        generator = self._generator()
        rate = learning_rate(self.config, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        indices = self.sequences.indices(self.steps_done)
        batch = self.sequences.batch(indices)
        anchors = choose_anchors(batch.response_BT, self.config.anchors_per_sequence, generator)
        blocks = cut_blocks(
            batch.ids_BT, batch.response_BT, anchors, self.draft.config.block_size, self.draft.config.mask_token_id
        )
        rows = self.head.rows(torch.Generator(self.device).manual_seed(int(generator.initial_seed())))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            hidden = self.module(
                blocks.ids_BMQ.to(self.device),
                blocks.positions_BMQ.to(self.device),
                anchors.to(self.device),
                self.features.get(indices),
                self.features.target.embedding,
            )
            # Flattened first: a batched product with a shared right factor would copy that factor per batch.
            logits = F.linear(hidden[:, :, 1:].flatten(0, 2), rows.to(hidden.dtype))
        return self._optimise(logits.view(*blocks.labels_BMK.shape, -1), blocks) | {"learning_rate": rate}

    def _optimise(self, logits_BMKV: Tensor, blocks: AnchoredBlocks) -> dict[str, float]:
        loss_sums = drafting_loss(
            logits_BMKV,
            self.head.labels(blocks.labels_BMK.to(self.device)),
            blocks.valid_BMK.to(self.device),
            self.weights,
            self.config.entropy_temperature,
        )
        totals = self.reduce(loss_sums.totals())
        # Data-parallel wrappers average gradients; the denominators are already global.
        loss = loss_sums.loss(totals, self.config.beta) * self.world_size
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.draft.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.steps_done += 1
        self._update_average()
        return loss_sums.report(totals, self.config.beta) | {"grad_norm": float(norm)}

    def _update_average(self) -> None:
        # Early on the average follows closely, so that it does not remember the initial weights.
        decay = min(self.config.ema, self.steps_done / (self.steps_done + 10))
        averaged: list[Tensor] = [*self.average.parameters()]
        trained: list[Tensor] = [*self.draft.parameters()]
        torch._foreach_lerp_(averaged, trained, 1 - decay)

    def _generator(self) -> torch.Generator:
        seed = hash((self.config.seed, self.sequences.rank, self.steps_done)) & 0x7FFFFFFF
        return torch.Generator().manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: weights, average, optimiser, step."""
        return {
            "draft": self.draft.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps_done": self.steps_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.draft.load_state_dict(state["draft"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps_done = state["steps_done"]


class DraftingForward(nn.Module):
    """The training forward of a draft as one module, so that a data-parallel wrapper sees every parameter used."""

    def __init__(self, draft: DFlashDraft) -> None:
        super().__init__()
        self.draft = draft

    def forward(
        self, ids_BMQ: Tensor, positions_BMQ: Tensor, anchors_BM: Tensor, features_BTF: Tensor, embedding_VH: Tensor
    ) -> Tensor:
        """Hidden states [B, M, Q, H] of all blocks, each seeing the features strictly before its anchor."""
        batch, num_context = features_BTF.shape[:2]
        context = self.draft.project_features(features_BTF.to(self.draft.fc.weight.dtype))
        positions = torch.arange(num_context, device=context.device).expand(batch, -1)
        context_k, context_v = self.draft.context_kv(context, positions)
        block = embedding_VH[ids_BMQ].to(context.dtype).flatten(1, 2)
        mask = dense_mask(anchors_BM, self.draft.config.block_size, num_context)
        hidden = self.draft(block, positions_BMQ.flatten(1, 2), context_k, context_v, mask)
        return hidden.unflatten(1, ids_BMQ.shape[1:])
