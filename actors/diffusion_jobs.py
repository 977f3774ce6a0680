"""Training of diffusion LMs: a causal LM adapted to masked diffusion, and a student distilled from such a teacher."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from actors.learner import Place, TrainingJob
from unmask.config import AdaptConfig, StudentConfig
from unmask.diffusion_checkpoints import save_checkpoint
from unmask.models import adapted, families
from unmask.models.transformer import DiffusionLM
from unmask.recipe import parse_recipe
from unmask.training.adaptation import AdaptationTrainer
from unmask.training.certainty import CertaintyForcingTrainer
from unmask.training.diffusion_batch import fitting
from unmask.training.diffusion_trainer import DiffusionTrainer
from unmask.training.forcing import DiscreteForcingTrainer
from unmask.training.lora import add_adapters
from unmask.training.sequences import SequenceSet, TokenSequence
from unmask.training.texts import read_texts, read_trajectory_texts
from unmask.types import TargetRecord

TEXTS = "texts.parquet"
"""The tokenised texts of an adaptation, in its directory."""

_OBJECTIVES: dict[str, type[DiffusionTrainer]] = {"dparallel": CertaintyForcingTrainer, "d2f": DiscreteForcingTrainer}


@dataclass(frozen=True, kw_only=True)
class DiffusionJob(TrainingJob):
    """What both have in common: a source directory, whose tokenizer the result keeps."""

    recipe_tree: dict[str, Any]
    run_dir: str
    source: str
    record: TargetRecord
    """Of the source."""

    @property
    @abstractmethod
    def config(self) -> AdaptConfig | StudentConfig:
        """See TrainingJob."""

    def _trainer(
        self, cls: type[DiffusionTrainer], network: DiffusionLM, texts: list[TokenSequence], place: Place
    ) -> DiffusionTrainer:
        config = self.config
        sequences = SequenceSet(
            fitting(texts, config.response_length, network.eos_ids[0]),
            batch_size=config.sequences_per_step,
            seed=config.seed,
            rank=place.rank,
            world_size=place.world_size,
            section=config.section,
        )
        return cls(
            network,
            sequences,
            config,
            response_length=config.response_length,
            module=place.parallel(network),
            reduce=place.sum,
            world_size=place.world_size,
        )

    def _save(self, trainer: DiffusionTrainer, path: Path, records: dict[str, str], made_by: str) -> None:
        network = trainer.published()
        if self.config.precision == "bfloat16":
            network = network.to(torch.bfloat16)
        lineage = {
            "made_by": made_by,
            "source": self.source,
            "source_record": asdict(self.record),
            "steps": trainer.steps_done,
        }
        save_checkpoint(network, path, tokenizer_of=Path(self.source), lineage=lineage, texts=records)


@dataclass(frozen=True, kw_only=True)
class AdaptJob(DiffusionJob):
    """A causal LM on staged texts."""

    mask_id: int

    @property
    def config(self) -> AdaptConfig:
        """See TrainingJob."""
        return parse_recipe(self.recipe_tree).adapt or AdaptConfig()

    @property
    def directory(self) -> Path:
        """See TrainingJob."""
        return Path(self.run_dir) / "teacher"

    def build(self, place: Place) -> DiffusionTrainer:
        """See TrainingJob."""
        config = self.config
        network = adapted.load(self.source, dtype=torch.float32, device=place.device)
        if config.attention != "causal":
            adapted.adapt(
                network,
                mask_id=self.mask_id,
                attention=config.attention,
                block_size=config.block_size,
                seed=config.seed,
            )
        return self._trainer(AdaptationTrainer, network, list(read_texts(self.directory / TEXTS)), place)

    def save(self, trainer: DiffusionTrainer, path: Path, records: dict[str, str]) -> None:
        """See TrainingJob."""
        self._save(trainer, path, records, f"adapt:{self.config.attention}")


@dataclass(frozen=True, kw_only=True)
class StudentJob(DiffusionJob):
    """A diffusion LM on its own verified trajectories."""

    @property
    def config(self) -> StudentConfig:
        """See TrainingJob."""
        return parse_recipe(self.recipe_tree).student or StudentConfig()

    @property
    def directory(self) -> Path:
        """See TrainingJob."""
        return Path(self.run_dir) / "student"

    def build(self, place: Place) -> DiffusionTrainer:
        """See TrainingJob."""
        config = self.config
        network = families.load(self.source, dtype=torch.float32, device=place.device)
        if config.lora is not None:
            add_adapters(network, config.lora, config.seed)
        verified = parse_recipe(self.recipe_tree).generate.verifier is not None
        texts = read_trajectory_texts(Path(self.run_dir), verified=verified, response_length=config.response_length)
        return self._trainer(_OBJECTIVES[config.objective], network, texts, place)

    def save(self, trainer: DiffusionTrainer, path: Path, records: dict[str, str]) -> None:
        """See TrainingJob."""
        self._save(trainer, path, records, self.config.objective)
