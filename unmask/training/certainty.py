"""dParallel: certainty forcing of a diffusion LM on its own trajectories (arXiv 2509.26488)."""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.config import StudentConfig
from unmask.masking.attention import Full
from unmask.masking.schedules import semi_autoregressive_views
from unmask.objectives.certainty_forcing import certainty_forcing_loss
from unmask.training.diffusion_batch import DiffusionBatch
from unmask.training.diffusion_trainer import DiffusionTrainer


class CertaintyForcingTrainer(DiffusionTrainer[StudentConfig]):
    """Two complementary views a row; each is CE + beta * entropy of what is already right."""

    def loss(self, batch: DiffusionBatch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """See DiffusionTrainer."""
        views = semi_autoregressive_views(
            batch.ids_BT,
            batch.prompt_lens_B,
            batch.lengths_B,
            block_size=self.config.block_size,
            mask_id=self.mask_id,
            generator=generator,
            ratio=self.config.mask_ratio,
            ratio_top=self.config.mask_ratio_top,
            text_lens_B=batch.text_lens_B if self.config.text_segments else None,
        )
        # One forward of both views: a data-parallel wrapper expects one a step.
        logits_NV = self.module(
            torch.cat([view.ids_BT for view in views]),
            batch.positions_BT.repeat(2, 1),
            mask=Full(batch.lengths_B.repeat(2)),
            logits_at=torch.cat([view.loss_BT for view in views]),
        )
        labels = [batch.ids_BT[view.loss_BT] for view in views]
        total = logits_NV.new_zeros((), dtype=torch.float32)
        reports = []
        for logits, label in zip(logits_NV.split([len(label) for label in labels]), labels, strict=True):
            part = certainty_forcing_loss(
                logits, label, beta=self.config.beta, temperature=self.config.entropy_temperature
            )
            count = torch.tensor(float(part.num_positions), device=self.device)
            counts = self.reduce(torch.stack([count, part.num_right]))
            cross_entropy = self.share(part.cross_entropy, count, counts[0])
            entropy = self.share(part.entropy, part.num_right, counts[1])
            total = total + cross_entropy + self.config.beta * entropy
            reports.append(torch.stack([cross_entropy.detach(), entropy.detach(), counts[1] / counts[0].clamp(min=1)]))
        means = self.reduce(torch.stack(reports).mean(0)) / self.world_size
        return total, dict(zip(("cross_entropy", "entropy", "accuracy"), means, strict=True))
