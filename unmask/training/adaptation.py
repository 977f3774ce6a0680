"""Adaptation of a causal LM to masked diffusion (DiffuLLaMA, arXiv 2410.17891; BD3-LM, arXiv 2503.09573).

Dimension letters: B rows, T columns, N loss positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.config import AdaptConfig
from unmask.denoiser import MaskSpec
from unmask.masking.attention import Causal, Dense, Full
from unmask.masking.block_causal import BlockCausal
from unmask.masking.double_stream import DoubleStream
from unmask.masking.schedules import Noisy, uniform_noise
from unmask.objectives.adaptation import (
    adaptation_loss,
    annealed_mask,
    annealing_probability,
    loss_shares,
    padding_weights,
)
from unmask.training.diffusion_batch import DiffusionBatch
from unmask.training.diffusion_trainer import DiffusionTrainer


class AdaptationTrainer(DiffusionTrainer[AdaptConfig]):
    """The 1/t loss on noisy responses, under attention that opens from causal to full, or on [noisy ; clean].

    With causal attention nothing is hidden: next-token cross-entropy, every response counting alike.
    """

    def loss(self, batch: DiffusionBatch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """See DiffusionTrainer."""
        if self.config.attention == "causal":
            return self._fine_tuning_loss(batch)
        noisy = uniform_noise(
            batch.ids_BT, batch.prompt_lens_B, batch.lengths_B, mask_id=self.mask_id, generator=generator
        )
        at = noisy.masked_BT
        forward = self._two_streams if self.config.attention == "block_causal" else self._one_stream
        logits_NV = forward(batch, noisy, generator)
        weights_BT = padding_weights(
            batch.prompt_lens_B,
            batch.text_lens_B,
            self.num_columns,
            full=self.config.full_padding,
            rest=self.config.padding_weight,
        ) * (batch.positions_BT < batch.lengths_B[:, None])
        labels_N = batch.ids_BT[at]
        loss = adaptation_loss(logits_NV, labels_N, noisy.noise_BT[at], loss_shares(weights_BT)[at])
        return self._of_rows(loss, batch), {"accuracy": self._accuracy(logits_NV, labels_N, ~batch.is_padding()[at])}

    def _fine_tuning_loss(self, batch: DiffusionBatch) -> tuple[Tensor, dict[str, Tensor]]:
        at = (batch.positions_BT >= batch.prompt_lens_B[:, None]) & ~batch.is_padding()
        logits_NV = self.module(batch.ids_BT, batch.positions_BT, mask=Causal(), logits_at=at)
        labels_N = batch.ids_BT[at]
        certain_N = torch.ones_like(labels_N, dtype=torch.float32)
        loss = adaptation_loss(logits_NV, labels_N, certain_N, loss_shares(at.float())[at])
        return self._of_rows(loss, batch), {"accuracy": self._accuracy(logits_NV, labels_N, certain_N > 0)}

    def _of_rows(self, mean: Tensor, batch: DiffusionBatch) -> Tensor:
        """This rank's share of the mean over all ranks' rows, of which it may have one more than others."""
        return mean * (len(batch.ids_BT) * self.world_size / self.sequences.batch_size)

    def _accuracy(self, logits_NV: Tensor, labels_N: Tensor, counted_N: Tensor) -> Tensor:
        right_N = (logits_NV.argmax(-1) == labels_N) & counted_N
        counts = self.reduce(torch.stack([right_N.sum(), counted_N.sum()]).float())
        return counts[0] / counts[1].clamp(min=1)

    def _one_stream(self, batch: DiffusionBatch, noisy: Noisy, generator: torch.Generator) -> Tensor:
        probability = annealing_probability(self.steps_done, self.config.annealing_steps)
        mask: MaskSpec = Full(batch.lengths_B)
        if probability < 1:
            annealed = annealed_mask((len(batch.ids_BT), self.num_columns), probability, generator, self.device)
            # Columns after a row do not exist for it, in whatever direction they lie.
            lives_BT = batch.positions_BT < batch.lengths_B[:, None]
            mask = Dense(annealed.allow_BTS & lives_BT[:, None, :])
        return self.module(noisy.ids_BT, batch.positions_BT, mask=mask, logits_at=noisy.masked_BT)

    def _two_streams(self, batch: DiffusionBatch, noisy: Noisy, generator: torch.Generator) -> Tensor:
        blocks = BlockCausal(batch.prompt_lens_B, self.config.block_size or 1, batch.lengths_B)
        ids, positions = DoubleStream.join(noisy.ids_BT, batch.ids_BT)
        marked = torch.cat((noisy.masked_BT, torch.zeros_like(noisy.masked_BT)), dim=1)
        return self.module(ids, positions, mask=DoubleStream(blocks, self.num_columns), logits_at=marked)
