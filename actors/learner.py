"""The training worker: one per rank under Ray Train. It runs any trainer and keeps its log and checkpoints."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, cast

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import nn

from actors.stop_request import StopRequest
from unmask.config import DistillConfig, TrainingConfig
from unmask.errors import UserError
from unmask.files import write_json
from unmask.provenance import PROVENANCE, RUN_YAML
from unmask.training.budget import Budget
from unmask.training.sequences import SequenceSet
from unmask.training.training_log import TrainingLog
from unmask.training.training_state import Trainer, resume_same_state, save_state

_STOPPED = 2.0
"""In place of a share of the budget: a stop was asked for."""

CHECKPOINTS, FINAL, SUMMARY = "checkpoints", "final", "summary.json"


class SteppedTrainer(Trainer, Protocol):
    """What the learner drives."""

    device: torch.device
    sequences: SequenceSet

    def step(self, progress: float) -> dict[str, float]:
        """One optimiser step at a share of the budget; scalars, `loss` among them."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank trains, and how it reaches the others."""

    rank: int
    world_size: int
    device: torch.device

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module, wrapped for data parallelism where there are several ranks."""
        return ray.train.torch.prepare_model(module, move_to_device=False) if self.world_size > 1 else module

    def alike(self, module: nn.Module) -> nn.Module:
        """The module with the first rank's weights, for a trainer that averages gradients itself."""
        if self.world_size > 1:
            for parameter in module.parameters():
                dist.broadcast(parameter.detach(), src=0)
        return module

    def sum(self, totals: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(totals)
        return totals


class TrainingJob(ABC):
    """What one stage trains. Plain data with what to do with it: it crosses process boundaries."""

    @property
    @abstractmethod
    def config(self) -> DistillConfig | TrainingConfig:
        """Budget, cadence and placement."""

    @property
    @abstractmethod
    def directory(self) -> Path:
        """Where log, checkpoints and the result go."""

    @abstractmethod
    def build(self, place: Place) -> Any:
        """The trainer of a rank, at step 0."""

    @abstractmethod
    def save(self, trainer: Any, path: Path, records: dict[str, str]) -> None:
        """Write what was trained, with the run's records, as the checkpoint `path`."""


def learn(loop_config: dict[str, Any]) -> None:
    """Entry point of every rank: train to the end of the budget, going on from the newest sound checkpoint."""
    Learner(loop_config["job"]).run()


class Learner:
    """One rank's trainer, budget and (on rank 0) log and checkpoints."""

    def __init__(self, job: TrainingJob) -> None:
        self.job, self.config, self.directory = job, job.config, job.directory
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        if self.config.threads_per_worker:
            torch.set_num_threads(self.config.threads_per_worker)
        device = ray.train.torch.get_device()
        self.trainer: SteppedTrainer = job.build(Place(rank=self.rank, world_size=self.world_size, device=device))
        self.budget = Budget(self.config.max_steps, self.config.max_seconds)
        # Between the hosts: a value of the device would have to be waited for in every step.
        group = dist.new_group(backend="gloo") if self.world_size > 1 else None
        self._hosts = cast("dist.ProcessGroup | None", group)
        self.stop, self.stopped = StopRequest(self.directory), False
        self.first_loss: float | None = None
        self.last: dict[str, float] = {}
        """The last record; a training that is resumed with no step left has that of the run before."""

    def run(self) -> None:
        """Train, and on rank 0 save what was trained; a stopped training leaves its state alone."""
        meta = resume_same_state(self.directory / CHECKPOINTS, self.trainer, self.rank, self._hosts)
        if meta is not None:
            self.budget.seconds_used, self.first_loss = meta["seconds_used"], meta["loss_first"]
            self.last = meta["last"]
        log = TrainingLog(self.directory) if self.rank == 0 else None
        self._train(log)
        if log is not None:
            log.close()
            if not self.stopped:
                self._save_final()
        ray.train.report({"steps": self.trainer.steps_done} | self.last)

    def _train(self, log: TrainingLog | None) -> None:
        """Steps until the budget is spent or a stop is asked for."""
        window: list[dict[str, float]] = []
        saved_at = time.monotonic()
        while (progress := self._progress()) < 1.0:
            start = time.monotonic()
            window.append(self.trainer.step(progress))
            saves = log is not None and start - saved_at >= self.config.checkpoint_every_s
            if self.trainer.steps_done % self.config.log_every_steps == 0:
                self.last, window = self._record(log, window), []
            elif saves:
                # A device works behind the host until somebody reads from it: what a checkpoint would wait for is
                # time of the steps.
                self._check_finite(window[-1])
            self.budget.seconds_used += time.monotonic() - start
            if saves:
                self._save_checkpoint()
                saved_at = time.monotonic()
        self.stopped = progress == _STOPPED
        if window:
            start = time.monotonic()
            self.last = self._record(log, window)
            self.budget.seconds_used += time.monotonic() - start
        if log is not None:
            self._save_checkpoint()

    def _record(self, log: TrainingLog | None, window: list[dict[str, float]]) -> dict[str, float]:
        """Means over the steps since the last record: single steps of a few blocks are too noisy to read."""
        means = {name: fmean(metrics[name] for metrics in window) for name in window[0]}
        self._check_finite(means)
        if self.first_loss is None:
            self.first_loss = means["loss"]
        if log is not None:
            told = {"seconds": self.budget.seconds_used, "workers": self.world_size}
            log.record(self.trainer.steps_done, means | told)
        return means

    def _check_finite(self, metrics: Mapping[str, float]) -> None:
        """End a training that diverged, before its state takes the place of a sound one. Raises UserError."""
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                raise UserError(
                    f"{name} is {metrics[name]} by step {self.trainer.steps_done}: the training diverged; lower it, "
                    "and start over with --fresh",
                    field=f"{self.config.section}.learning_rate",
                )

    def _progress(self) -> float:
        """Rank 0's view decides for all, so that every rank takes the same number of steps at the same rates."""
        progress = _STOPPED if self.stop.is_made() else self.budget.progress(self.trainer.steps_done)
        if self._hosts is None:
            return progress
        shared = torch.tensor([progress], dtype=torch.float64)
        dist.broadcast(shared, src=0, group=self._hosts)
        return float(shared)

    def _save_checkpoint(self) -> None:
        meta = {"seconds_used": self.budget.seconds_used, "loss_first": self.first_loss, "last": self.last}
        save_state(self.directory / CHECKPOINTS, self.trainer, meta)

    def _save_final(self) -> None:
        records = {name: (self.directory / name).read_text() for name in (RUN_YAML, PROVENANCE)}
        self.job.save(self.trainer, self.directory / FINAL, records)
        summary = {
            "steps": self.trainer.steps_done,
            "seconds": self.budget.seconds_used,
            "loss_first": self.first_loss,
            "loss_last": self.last.get("loss"),
            "sequences": self.trainer.sequences.total,
        }
        write_json(self.directory / SUMMARY, summary)
