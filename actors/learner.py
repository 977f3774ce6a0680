"""The training worker: one per rank under Ray Train. It places a `DraftTrainer` and keeps its checkpoints."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from unmask.checkpoints import save_draft
from unmask.config import Recipe
from unmask.files import write_json
from unmask.models.dflash import DFlashConfig
from unmask.models.draft_start import new_draft
from unmask.models.target import TargetModel
from unmask.provenance import PROVENANCE, RUN_YAML
from unmask.recipe import parse_recipe
from unmask.training.budget import Budget
from unmask.training.draft_trainer import DraftingForward, DraftTrainer
from unmask.training.feature_cache import FeatureCache
from unmask.training.head import TrainingHead
from unmask.training.sequences import SequenceSet, TokenSequence
from unmask.training.training_log import TrainingLog
from unmask.training.training_state import resume_state, save_state
from unmask.trajectories import read_tables
from unmask.types import TargetRecord

CHECKPOINTS, FINAL, SUMMARY = "checkpoints", "final", "summary.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSpec:
    """What a worker is told. Plain data: it crosses process boundaries."""

    recipe: dict[str, Any]
    target_path: str
    target_record: TargetRecord
    draft: DFlashConfig
    run_dir: str


def learn(loop_config: dict[str, Any]) -> None:
    """Entry point of every rank: train to the end of the budget, going on from the newest sound checkpoint."""
    Learner(loop_config["spec"]).run()


class Learner:
    """One rank's trainer, budget and (on rank 0) log and checkpoints."""

    def __init__(self, spec: LearnerSpec) -> None:
        self.spec = spec
        self.recipe = parse_recipe(spec.recipe)
        self.config = self.recipe.distill
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.directory = Path(spec.run_dir) / "draft"
        if self.config.threads_per_worker:
            torch.set_num_threads(self.config.threads_per_worker)
        self.trainer = self._build(ray.train.torch.get_device())
        self.budget = Budget(self.config.max_steps, self.config.max_seconds)
        self.first_loss: float | None = None

    def run(self) -> None:
        """Train, and on rank 0 save the finished draft."""
        meta = resume_state(self.directory / CHECKPOINTS, self.trainer)
        if meta is not None:
            self.budget.seconds_used, self.first_loss = meta["seconds_used"], meta["loss_first"]
        self.trainer.features.warm_up()
        log = TrainingLog(self.directory) if self.rank == 0 else None
        last = self._train(log)
        if log is not None:
            log.close()
            self._save_final(last)
        ray.train.report({"steps": self.trainer.steps_done} | last)

    def _build(self, device: torch.device) -> DraftTrainer:
        """Target, sequences and draft of this rank; the draft is wrapped for data parallelism, never changed by it."""
        precision = torch.bfloat16 if self.config.precision == "bfloat16" else torch.float32
        target = TargetModel.load(self.spec.target_path, self.spec.draft.target_layer_ids, precision).to(device)
        draft = new_draft(self.spec.draft, target.model, self.recipe.draft.init, self.config.seed).to(device)
        everything = _sequences(self.recipe)
        sequences = SequenceSet(
            everything,
            batch_size=self.config.sequences_per_step,
            seed=self.config.seed,
            rank=self.rank,
            world_size=self.world_size,
        )
        occurring = {token for s in everything for token in s.ids[s.prompt_length :]}
        module = DraftingForward(draft)
        return DraftTrainer(
            draft,
            FeatureCache(target, sequences, int(self.config.feature_cache_gb * 1e9)),
            TrainingHead(target.lm_head, occurring, self.config.head_negatives),
            self.config,
            module=ray.train.torch.prepare_model(module, move_to_device=False) if self.world_size > 1 else module,
            reduce=_sum_over_ranks if self.world_size > 1 else lambda x: x,
            world_size=self.world_size,
        )

    def _train(self, log: TrainingLog | None) -> dict[str, float]:
        """Steps until the budget is spent; the last record (empty if there was nothing left to do)."""
        window: list[dict[str, float]] = []
        last: dict[str, float] = {}
        saved_at = time.monotonic()
        while (progress := self._progress()) < 1.0:
            start = time.monotonic()
            window.append(self.trainer.step(progress))
            self.budget.seconds_used += time.monotonic() - start
            if self.trainer.steps_done % self.config.log_every_steps == 0:
                last, window = self._record(log, window), []
            if log is not None and time.monotonic() - saved_at >= self.config.checkpoint_every_s:
                self._save_checkpoint()
                saved_at = time.monotonic()
        if window:
            last = self._record(log, window)
        if log is not None:
            self._save_checkpoint()
        return last

    def _record(self, log: TrainingLog | None, window: list[dict[str, float]]) -> dict[str, float]:
        """Means over the steps since the last record: single steps of a few blocks are too noisy to read."""
        means = {name: fmean(metrics[name] for metrics in window) for name in window[0]}
        if self.first_loss is None:
            self.first_loss = means["loss"]
        if log is not None:
            log.record(self.trainer.steps_done, means | {"seconds": self.budget.seconds_used})
        return means

    def _progress(self) -> float:
        """Rank 0's clock decides for all, so that every rank takes the same number of steps at the same rates."""
        progress = self.budget.progress(self.trainer.steps_done)
        if self.world_size == 1:
            return progress
        shared = torch.tensor([progress], dtype=torch.float64, device=self.trainer.device)
        dist.broadcast(shared, src=0)
        return float(shared)

    def _save_checkpoint(self) -> None:
        meta = {"seconds_used": self.budget.seconds_used, "loss_first": self.first_loss}
        save_state(self.directory / CHECKPOINTS, self.trainer, meta)

    def _save_final(self, last: dict[str, float]) -> None:
        published = self.trainer.average if self.config.ema else self.trainer.draft
        records = {name: (self.directory / name).read_text() for name in (RUN_YAML, PROVENANCE)}
        save_draft(published, self.directory / FINAL, self.spec.target_record, texts=records)
        summary = {
            "steps": self.trainer.steps_done,
            "seconds": self.budget.seconds_used,
            "loss_first": self.first_loss,
            "loss_last": last.get("loss"),
            "sequences": len(self.trainer.sequences) * self.world_size,
        }
        write_json(self.directory / SUMMARY, summary)


def _sum_over_ranks(totals: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(totals)
    return totals


def _sequences(recipe: Recipe) -> list[TokenSequence]:
    tables = read_tables(Path(recipe.run_dir), ["prompt_ids", "response_ids"])
    return [
        TokenSequence(tuple(prompt + response), len(prompt))
        for table in tables
        for prompt, response in zip(table["prompt_ids"].to_pylist(), table["response_ids"].to_pylist(), strict=True)
    ]
