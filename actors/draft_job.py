"""Training of a DFlash draft on the trajectories of its target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from actors.learner import Place, TrainingJob
from unmask.capture import is_captured
from unmask.checkpoints import check_pairing, load_confidence, load_draft, save_draft
from unmask.config import DistillConfig, Recipe
from unmask.errors import CheckpointError
from unmask.hardware import is_half
from unmask.models.dflash import DFlashConfig, DFlashDraft
from unmask.models.draft_start import new_draft
from unmask.models.target import TargetModel
from unmask.objectives.confidence import ConfidenceHead
from unmask.provenance import RUN_YAML
from unmask.recipe import completed, parse_recipe
from unmask.training.draft_trainer import DraftTrainer, row_objective
from unmask.training.drafting_forward import DraftingForward
from unmask.training.feature_cache import FeatureCache
from unmask.training.head import TrainingHead
from unmask.training.sequences import SequenceSet
from unmask.training.texts import read_trajectory_texts
from unmask.trajectories import trajectories_directory
from unmask.types import TargetRecord


@dataclass(frozen=True, kw_only=True)
class DraftJob(TrainingJob):
    """A draft of the given sizes for a target."""

    recipe_tree: dict[str, Any]
    target_path: str
    target_record: TargetRecord
    draft: DFlashConfig
    run_dir: str

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return parse_recipe(self.recipe_tree)

    @property
    def config(self) -> DistillConfig:
        """See TrainingJob."""
        return self.recipe.distill

    @property
    def directory(self) -> Path:
        """See TrainingJob."""
        return Path(self.run_dir) / "draft"

    def build(self, place: Place) -> DraftTrainer:
        """Target, sequences and draft of a rank; the draft is wrapped for data parallelism, never changed by it."""
        recipe, config = self.recipe, self.config
        precision = torch.bfloat16 if is_half(config.precision, place.device.type) else torch.float32
        target = TargetModel.load(self.target_path, self.draft.target_layer_ids, precision).to(place.device)
        draft = self._first_draft(target).to(place.device)
        everything = read_trajectory_texts(Path(self.run_dir), verified=recipe.generate.verifier is not None)
        sequences = SequenceSet(
            everything,
            batch_size=config.sequences_per_step if config.tokens_per_step is None else config.rows_per_step,
            seed=config.seed,
            rank=place.rank,
            world_size=place.world_size,
            tokens_per_step=config.tokens_per_step,
        )
        occurring = {token for s in everything for token in s.ids[s.prompt_length :]}
        confidence = self._first_confidence() if config.confidence_weight else None
        if confidence is not None:
            confidence.temperature = _drawn_at(Path(self.run_dir))
            confidence.to(place.device)
        # The hooks of a wrapper are no part of a graph.
        spread = place.alike if config.cuda_graph else place.parallel
        trainer = DraftTrainer(
            draft,
            FeatureCache(
                target,
                sequences,
                int(config.feature_cache_gb * 1e9),
                final=row_objective(config).needs_target,
                device=place.device if config.feature_cache_device == "training" else "cpu",
            ),
            TrainingHead(target.lm_head, occurring, config.head_negatives),
            config,
            module=spread(DraftingForward(draft, confidence, compiled=config.compile)),
            confidence=confidence,
            reduce=place.sum,
            world_size=place.world_size,
            averages_gradients=config.cuda_graph and place.world_size > 1,
        )
        trainer.features.warm_up()
        return trainer

    def _first_draft(self, target: TargetModel) -> DFlashDraft:
        start = self.recipe.draft.go_on_from
        if start is None:
            return new_draft(self.draft, target.model, self.recipe.draft.init, self.config.seed)
        if check_pairing(start, self.target_record) != self.draft:
            raise CheckpointError(f"'{start}' has another shape than this section asks for", field="draft.go_on_from")
        return load_draft(start).train().requires_grad_(True)

    def _first_confidence(self) -> ConfidenceHead:
        """That of the draft that is gone on from, which has this one's shape, or one that knows nothing yet."""
        start = self.recipe.draft.go_on_from
        head = None if start is None else load_confidence(start)
        if head is None:
            return ConfidenceHead(self.draft.hidden_size, self.draft.block_size - 1)
        return head.train().requires_grad_(True)

    def save(self, trainer: DraftTrainer, path: Path, records: dict[str, str]) -> None:
        """See TrainingJob."""
        save_draft(trainer.average, path, self.target_record, texts=records, confidence=trainer.average_confidence)


def _drawn_at(run_dir: Path) -> float | None:
    """Temperature at which a run's trajectories were drawn; None where that is not known: captured requests may have
    been of any."""
    record = trajectories_directory(run_dir) / RUN_YAML
    if is_captured(run_dir) or not record.is_file():
        return None
    return completed(yaml.safe_load(record.read_text()))["generate"]["temperature"]
