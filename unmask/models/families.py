"""The families of diffusion LMs, and how a checkpoint directory finds its own."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from unmask.errors import CheckpointError
from unmask.models import adapted, dream, llada
from unmask.models.transformer import DiffusionLM, ModelConfig
from unmask.models.weights import read_config

FAMILIES: dict[str, ModuleType] = {"llada": llada, "dream": dream, "adapted": adapted}
_FAMILY_OF_TYPE = {"llada": "llada", "Dream": "dream"} | dict.fromkeys(adapted.SHAPES, "adapted")


def load(directory: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> DiffusionLM:
    """Load a checkpoint directory of any family, told by `model_type`. Raises CheckpointError."""
    return _family(read_config(directory)).load(directory, dtype=dtype, device=device)


def read(directory: str | Path) -> ModelConfig:
    """Shape and conventions of a checkpoint directory, without its weights. Raises CheckpointError."""
    config = read_config(directory)
    return _family(config).parse(config)


def save(network: DiffusionLM, directory: str | Path) -> None:
    """Write `network` as its family does."""
    FAMILIES[network.config.family].save(network, directory)


def _family(config: dict[str, Any]) -> ModuleType:
    model_type = config.get("model_type")
    if model_type not in _FAMILY_OF_TYPE:
        known = ", ".join(_FAMILY_OF_TYPE)
        raise CheckpointError(f"model_type {model_type!r} is none of {known}", field="model_type")
    return FAMILIES[_FAMILY_OF_TYPE[model_type]]
