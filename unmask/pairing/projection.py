"""The draft's context projection, run beside the target so that H-wide rows travel and not D * H."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.models.dflash import DFlashDraft


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """`DFlashDraft.project_features` as a record: `fc` [H, D * H], then the RMS norm `norm` [H]."""

    fc: Tensor
    norm: Tensor
    eps: float

    @classmethod
    def of(cls, draft: DFlashDraft) -> Projection:
        """The projection of a draft, sharing its weights."""
        return cls(fc=draft.fc.weight.detach(), norm=draft.hidden_norm.weight.detach(), eps=draft.config.rms_norm_eps)

    def to(self, device: torch.device) -> Projection:
        """A copy on a device that shares no memory with this one."""
        copies = {name: getattr(self, name).to(device, copy=True) for name in ("fc", "norm")}
        return replace(self, **copies)

    def __call__(self, features: Tensor) -> Tensor:
        """Raw feature rows [..., D * H] to context rows [..., H], in the projection's dtype."""
        fused = F.linear(features.to(self.fc.dtype), self.fc)
        return F.rms_norm(fused, self.norm.shape, self.norm, self.eps)
