"""One optimisation step of a diffusion LM: what adaptation, certainty forcing and discrete forcing share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from unmask.config import TrainingConfig
from unmask.errors import ConfigError
from unmask.models.transformer import DiffusionLM
from unmask.training.diffusion_batch import DiffusionBatch, diffusion_batch
from unmask.training.lora import merged
from unmask.training.rates import rate_share
from unmask.training.sequences import SequenceSet

C = TypeVar("C", bound=TrainingConfig)
Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over ranks and returns it; the identity on one."""


class DiffusionTrainer(ABC, Generic[C]):
    """Trains a diffusion LM on prompts with responses; a subclass is one objective.

    Batches are functions of (seed, step), noise of (seed, rank, step), so `steps_done` is the whole data state. Another
    number of ranks sees the same batches under other noise.

    Args:
        network: float32 master weights on the training device; only parameters that require gradients are trained.
        sequences: this rank's, made by `diffusion_batch.fitting`.
        module: what is called in the forward pass (the network itself, or a data-parallel wrapper around it).
        reduce: sums over ranks.
    """

    def __init__(
        self,
        network: DiffusionLM,
        sequences: SequenceSet,
        config: C,
        *,
        response_length: int,
        module: nn.Module | None = None,
        reduce: Reduce = lambda x: x,
        world_size: int = 1,
    ) -> None:
        self.network, self.sequences, self.config = network, sequences, config
        self.eos_id = network.eos_ids[0]
        self.module = module or network
        self.reduce, self.world_size = reduce, world_size
        self.device = network.device
        self.response_length = response_length
        longest = max(s.prompt_length for s in sequences.sequences) + response_length
        self.num_columns = -(-longest // 16) * 16  # one shape for all steps, and one that attention kernels like
        self.trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(),
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.average = {name: p.detach().clone() for name, p in self.trained.items()} if config.ema else {}
        self.steps_done = 0
        if config.compile:
            compile_layers(network)

    @property
    def mask_id(self) -> int:
        """The id that hides a token."""
        if self.network.mask_id is None:
            raise ConfigError("the network has no mask token: adapt it first", field="target.model")
        return self.network.mask_id

    @abstractmethod
    def loss(self, batch: DiffusionBatch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's share of the loss (the mean over ranks is the global one), and scalars to report."""

    def step(self, progress: float) -> dict[str, float]:
        """One optimiser step.

        Args:
            progress: share of the budget used so far, in [0, 1]; it sets the learning rate.

        Returns:
            `loss`, `learning_rate`, `grad_norm` and what the objective reports.
        """
        self.network.train()
        rate = self.config.learning_rate * rate_share(self.config, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        seed = hash((self.config.seed, self.sequences.rank, self.steps_done)) & 0x7FFFFFFF
        torch.manual_seed(seed)  # dropout draws from the global generator
        chosen = [self.sequences.sequences[i] for (i,) in self.sequences.rows(self.steps_done)]
        batch = diffusion_batch(chosen, self.response_length, self.eos_id, self.num_columns, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            loss, report = self.loss(batch, torch.Generator(self.device).manual_seed(seed))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.config.grad_clip)
        self.optimizer.step()
        self.steps_done += 1
        self._update_average()
        scalars = {"loss": self.reduce(loss.detach().clone()) / self.world_size, "grad_norm": norm} | report
        values = torch.stack([value.detach().float() for value in scalars.values()]).tolist()
        return dict(zip(scalars, values, strict=True)) | {"learning_rate": rate}

    @torch.no_grad()
    def published(self) -> DiffusionLM:
        """The network to save: averaged weights where there are any, adapters merged, on the training device."""
        network = copy.deepcopy(self.network)
        parameters = dict(network.named_parameters())
        for name, value in self.average.items():
            parameters[name].copy_(value)
        return merged(network).eval()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: trained weights, average, optimiser, step."""
        return {
            "network": {name: p.detach() for name, p in self.trained.items()},
            "average": dict(self.average),
            "optimizer": self.optimizer.state_dict(),
            "steps_done": self.steps_done,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        for name, parameter in self.trained.items():
            parameter.copy_(state["network"][name])
        for name, value in self.average.items():
            value.copy_(state["average"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps_done = state["steps_done"]

    def share(self, mean: Tensor, count: Tensor, total: Tensor) -> Tensor:
        """A rank's part of a mean over all ranks' positions, scaled for wrappers that average gradients."""
        return mean * (count / total.clamp(min=1.0)) * self.world_size

    def _update_average(self) -> None:
        if self.average:
            # Early on the average follows closely, so that it does not remember the initial weights.
            decay = min(self.config.ema, self.steps_done / (self.steps_done + 10))
            trained: list[Tensor] = [p.detach() for p in self.trained.values()]
            torch._foreach_lerp_(list(self.average.values()), trained, 1 - decay)


def compile_layers(network: DiffusionLM) -> None:
    """Compile every transformer layer in place; all of them share one graph."""
    # Without this, the number of each layer would be a constant of its graph, and each layer a compilation.
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    for layer in network.model.layers:
        layer.compile(dynamic=False)
