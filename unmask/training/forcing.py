"""D2F: a block-causal student follows its bidirectional self on the same noisy input (arXiv 2508.09192)."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor

from unmask.config import StudentConfig
from unmask.masking.attention import Full
from unmask.masking.block_causal import BlockCausal
from unmask.masking.schedules import Noisy, monotone_block_noise
from unmask.models.transformer import DiffusionLM
from unmask.objectives.certainty_forcing import certainty_entropy
from unmask.objectives.discrete_forcing import discrete_forcing_loss
from unmask.training.diffusion_batch import DiffusionBatch
from unmask.training.diffusion_trainer import DiffusionTrainer, compile_layers
from unmask.training.lora import adapters_disabled
from unmask.training.sequences import SequenceSet


class DiscreteForcingTrainer(DiffusionTrainer[StudentConfig]):
    """KL / p between the network under block-causal attention and the network it was, under full attention.

    With adapters, the teacher is the network without them; without, it is a frozen copy.
    """

    def __init__(self, network: DiffusionLM, sequences: SequenceSet, config: StudentConfig, **options: Any) -> None:
        self.teacher = None if config.lora else copy.deepcopy(network).requires_grad_(False).eval()
        if self.teacher is not None and config.precision == "bfloat16":
            self.teacher.to(torch.bfloat16)
        network.config = dataclasses.replace(network.config, attention="block_causal", block_size=config.block_size)
        super().__init__(network, sequences, config, **options)
        if self.teacher is not None and config.compile:
            compile_layers(self.teacher)

    def loss(self, batch: DiffusionBatch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """See DiffusionTrainer."""
        config = self.config
        block_size = config.block_size or 1
        noisy = monotone_block_noise(
            batch.ids_BT,
            batch.prompt_lens_B,
            batch.lengths_B,
            block_size=block_size,
            mask_id=self.mask_id,
            generator=generator,
            low=config.noise_low,
            high=config.noise_high,
            top=config.noise_top,
        )
        at = noisy.masked_BT
        teacher_NV = self._teacher_logits(batch, noisy)
        causal = BlockCausal(batch.prompt_lens_B, block_size, batch.lengths_B)
        student_NV = self.module(noisy.ids_BT, batch.positions_BT, mask=causal, logits_at=at)
        parts = discrete_forcing_loss(
            student_NV,
            teacher_NV,
            noisy.noise_BT[at],
            is_padding_N=batch.is_padding()[at],
            direction=config.divergence,
        )
        count = at.sum().float()
        loss = self.share(parts.loss, count, self.reduce(count.clone()))
        report = {"divergence_text": parts.divergence_text, "agreement": parts.agreement}
        if config.certainty:
            labels_N = batch.ids_BT[at]
            entropy, right = certainty_entropy(
                student_NV, labels_N, torch.ones_like(labels_N, dtype=torch.bool), config.entropy_temperature
            )
            loss = loss + config.certainty * self.share(entropy, right, self.reduce(right.clone()))
            report["entropy"] = entropy
        return loss, {name: self.reduce(value.detach().clone()) / self.world_size for name, value in report.items()}

    @torch.no_grad()
    def _teacher_logits(self, batch: DiffusionBatch, noisy: Noisy) -> Tensor:
        arguments: dict[str, Any] = {"mask": Full(batch.lengths_B), "logits_at": noisy.masked_BT}
        if self.teacher is not None:
            return self.teacher(noisy.ids_BT, batch.positions_BT, **arguments)
        self.network.eval()
        with adapters_disabled(self.network):
            logits_NV = self.network(noisy.ids_BT, batch.positions_BT, **arguments)
        self.network.train()
        return logits_NV
