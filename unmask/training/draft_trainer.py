"""One optimisation step of a DFlash draft, and the state from which a run resumes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unmask.config import DistillConfig
from unmask.errors import UserError
from unmask.hardware import is_half
from unmask.models.dflash import DFlashDraft
from unmask.objectives.confidence import ConfidenceHead, confidence_loss
from unmask.objectives.drafting import (
    certainty_gates,
    choose_anchors,
    decay_weights,
    drafting_loss,
    position_weights,
    report,
)
from unmask.objectives.row_losses import RowObjective
from unmask.training.chunked_head import chunked_rows
from unmask.training.drafting_forward import DraftingForward, TrainingBlocks, training_blocks
from unmask.training.feature_cache import FeatureCache
from unmask.training.head import TrainingHead
from unmask.training.muon import Deal, Muon
from unmask.training.rates import certainty_weight, rate_share
from unmask.training.recorded_step import RecordedStep
from unmask.training.sequences import Batch
from unmask.training.step_report import StepReport

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over ranks (in place or not) and returns it; the identity on one."""


class DraftTrainer:
    """Trains a draft on cached features.

    Batches, anchors and negatives are functions of seed, step and row of the step, so `step` is the whole data state,
    and any number of ranks takes the same steps. Nothing in a step whose features are kept makes the host wait for the
    device.

    Args:
        draft: float32 master weights, on the training device; a data-parallel wrapper goes into `module`.
        module: what is called in the forward pass (a `DraftingForward`, or DDP around it).
        confidence: the confidence head of `module`, if there is one.
        reduce: sums over ranks.
        averages_gradients: of several ranks whose `module` does not: after the backward pass and not behind it, but a
            CUDA graph can hold it.

    Raises:
        ValueError: the objective needs the target's distribution, and the features are without its final states.
    """

    def __init__(
        self,
        draft: DFlashDraft,
        features: FeatureCache,
        head: TrainingHead,
        config: DistillConfig,
        *,
        module: nn.Module | None = None,
        confidence: ConfidenceHead | None = None,
        reduce: Reduce = lambda x: x,
        world_size: int = 1,
        averages_gradients: bool = False,
    ) -> None:
        self.draft, self.features, self.head, self.config = draft, features, head, config
        self.module = module or DraftingForward(draft, confidence, compiled=config.compile)
        self.confidence = confidence
        self.reduce, self.world_size, self._averages_gradients = reduce, world_size, averages_gradients
        self.sequences = features.sequences
        self.device = features.target.device
        self.objective = row_objective(config)
        if self.objective.needs_target and not features.final:
            raise ValueError("this objective needs the target's final states beside its features: final=True")
        self.decay = decay_weights(draft.config.block_size, config.decay_gamma, self.device)
        self._trained = [*draft.parameters(), *(confidence.parameters() if confidence is not None else ())]
        self._rate: float | Tensor = config.highest_rate
        self._recorded: RecordedStep | None = None
        if config.cuda_graph:
            self._recorded = self._new_recording()
        self.optimizer = self._new_optimizer()
        self.average = copy.deepcopy(draft).requires_grad_(False)
        self.average_confidence = None if confidence is None else copy.deepcopy(confidence).requires_grad_(False)
        self.steps_done = 0

    def _new_optimizer(self) -> torch.optim.Optimizer:
        options: dict[str, Any] = {
            "lr": self._rate,
            "weight_decay": self.config.decay_of("adamw"),
            "fused": True,
            "capturable": self.config.cuda_graph,
        }
        if self.config.chosen_optimizer == "adamw":
            return torch.optim.AdamW(self._trained, **options)
        matrices = [p for p in self.draft.parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in self._trained if id(p) not in chosen]
        deal = Deal(self.sequences.rank, self.world_size, self.reduce)
        return Muon(matrices, others, deal, matrix_decay=self.config.decay_of("muon"), **options)

    def _new_recording(self) -> RecordedStep:
        """Steps as a graph, whose learning rate and beta are inputs like the blocks and their features."""
        if self.device.type != "cuda":
            raise UserError("needs a GPU", field="distill.cuda_graph")
        rope = self.draft.config.rope_parameters.get("rope_type")
        if rope in ("dynamic", "longrope"):
            # Their frequencies depend on the longest position, which the host would have to ask for.
            raise UserError(f"RoPE of type '{rope}' cannot be recorded; set it to false", field="distill.cuda_graph")
        rate = self._rate = torch.tensor(self.config.highest_rate, device=self.device)

        def run(inputs: Sequence[Tensor]) -> dict[str, Tensor]:
            *blocks, features, rates = inputs
            rate.copy_(rates[0])
            return self._update(TrainingBlocks(*blocks), features, rates[1] if self.config.beta else 0.0)

        return RecordedStep(run, self.device)

    def step(self, progress: float) -> StepReport:
        """One optimiser step.

        Args:
            progress: share of the budget used so far, in [0, 1]; it sets the learning rate and beta.

        Returns:
            `loss`, `cross_entropy` (the rows' loss), `entropy`, `accuracy` and `acceptance` (of drafted rows),
            `confidence`, `grad_norm`, `learning_rate`. Reading it waits for the device.
        """
        rate = self.config.highest_rate * rate_share(self.config, progress)
        beta = certainty_weight(self.config, progress)
        batch = self.sequences.batch(self.sequences.rows(self.steps_done))
        shape = self.draft.config
        blocks = training_blocks(batch, self._anchors(batch), shape.block_size, shape.mask_token_id)
        if self._recorded is not None:
            rates = torch.tensor([rate, beta]).pin_memory()
            scalars = self._recorded([*blocks.pinned(), self.features.get(batch), rates])
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            scalars = self._update(blocks.to(self.device), self.features.get(batch), beta)
        self.steps_done += 1
        self._update_average()
        return StepReport(scalars, {"learning_rate": rate, "beta": beta})

    def _update(self, blocks: TrainingBlocks, features: Tensor, beta: float | Tensor) -> dict[str, Tensor]:
        """Forward, loss, backward and the optimiser's step, on the device alone."""
        target = self.features.target
        split = target.embedding.shape[1] * len(target.layer_ids)
        half = torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=is_half(self.config.precision, self.device.type),
            # Weights that were cast outside of a recording would be missing in it.
            cache_enabled=self._recorded is None,
        )
        with half:
            packed = self.sequences.tokens_per_step is not None
            hidden, confidence = self.module(blocks, features[..., :split], target.embedding, packed=packed)
        final = features[..., split:] if self.objective.needs_target else None
        return self._optimise(hidden, confidence, self.head.rows(self._seed()), final, blocks, beta)

    def _optimise(
        self,
        hidden_BMKH: Tensor,
        confidence_BMK: Tensor | None,
        head_VH: Tensor,
        final_BTH: Tensor | None,
        blocks: TrainingBlocks,
        beta: float | Tensor,
    ) -> dict[str, Tensor]:
        config, labels, valid = self.config, blocks.labels_BMK.flatten(0, 1), blocks.valid_BMK.flatten(0, 1)
        rows = chunked_rows(
            hidden_BMKH.flatten(0, 2),
            head_VH,
            self.head.labels(labels.flatten()),
            None if final_BTH is None else _gather(final_BTH, blocks.before_BMK),
            self.objective,
            compiled=config.compile,
        ).view(*labels.shape)
        weights = position_weights(config.weighting, rows, valid, self.decay, config.pace_smoothing)
        sums = drafting_loss(rows, valid, weights, certainty_gates(config.gate, rows, valid))
        totals = self.reduce(sums.totals())
        # Gradients are averaged over ranks; the denominators are already global.
        loss = sums.loss(totals, beta) * self.world_size
        scalars = report(totals, beta)
        if confidence_BMK is not None:
            errors, reached = confidence_loss(confidence_BMK.flatten(0, 1), rows, valid)
            all_errors, all_reached = self.reduce(torch.stack([errors.detach(), reached])).unbind()
            scalars["confidence"] = all_errors / all_reached.clamp(min=1)
            loss = loss + config.confidence_weight * errors / all_reached.clamp(min=1) * self.world_size
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self._averages_gradients:
            self._average_gradients()
        scalars["grad_norm"] = nn.utils.clip_grad_norm_(self.draft.parameters(), config.grad_clip)
        self.optimizer.step()
        return scalars

    def _average_gradients(self) -> None:
        gradients = [p.grad for p in self._trained if p.grad is not None]
        mean = self.reduce(torch.cat([gradient.flatten() for gradient in gradients])) / self.world_size
        parts = mean.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    def _update_average(self) -> None:
        # Early on the average follows closely, so that it does not remember the initial weights.
        decay = min(self.config.ema, self.steps_done / (self.steps_done + 10))
        averaged: list[Tensor] = [*self.average.parameters()]
        if self.average_confidence is not None:
            averaged += self.average_confidence.parameters()
        trained: list[Tensor] = [p.detach() for p in self._trained]
        torch._foreach_lerp_(averaged, trained, 1 - decay)

    def _anchors(self, batch: Batch) -> Tensor:
        """Anchors [B, M], each row's drawn by itself: what else this rank trains on has no part in them."""
        count = self.config.anchors_per_step if batch.packed else self.config.anchors_per_sequence
        drawn = []
        for row, number in enumerate(self.sequences.row_numbers):
            columns = slice(None if batch.packed else batch.lengths[row])
            first = None if batch.first_BT is None else batch.first_BT[row : row + 1, columns]
            generator = torch.Generator().manual_seed(self._seed(number))
            drawn.append(choose_anchors(batch.response_BT[row : row + 1, columns], count, generator, first))
        return torch.cat(drawn)

    def _seed(self, *parts: int) -> int:
        return hash((self.config.seed, self.steps_done, *parts)) & 0x7FFFFFFF

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: weights, average, optimiser, step."""
        state = {
            "draft": self.draft.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps_done": self.steps_done,
        }
        if self.confidence is not None and self.average_confidence is not None:
            state["confidence"] = self.confidence.state_dict()
            state["average_confidence"] = self.average_confidence.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.draft.load_state_dict(state["draft"])
        self.average.load_state_dict(state["average"])
        if self._recorded is not None:
            # A recording updates the moments that it was made with.
            self._recorded = self._new_recording()
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            # The optimiser has taken a copy.
            group["lr"] = self._rate
        if self.confidence is not None and self.average_confidence is not None:
            self.confidence.load_state_dict(state["confidence"])
            # States of before the head was averaged have its weights alone.
            self.average_confidence.load_state_dict(state.get("average_confidence", state["confidence"]))
        self.steps_done = state["steps_done"]


def row_objective(config: DistillConfig) -> RowObjective:
    """What a training section asks of a row."""
    return RowObjective(
        loss=config.loss,
        entropy=config.beta > 0,
        temperature=config.entropy_temperature,
        relative=config.gate == "target_relative",
        verified_at=config.gate_temperature,
        target_temperature=config.target_temperature,
    )


def _gather(states_BTH: Tensor, columns_BMK: Tensor) -> Tensor:
    """States [B * M * K, H] of chosen columns."""
    batch = torch.arange(len(states_BTH), device=states_BTH.device)[:, None, None]
    return states_BTH[batch, columns_BMK].flatten(0, 2)
