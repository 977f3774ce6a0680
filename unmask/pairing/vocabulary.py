"""The two tensors of a target that its draft shares: token embeddings and LM head."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unmask.errors import CheckpointError

_EMBEDDING = "embed_tokens.weight"
_HEAD = "lm_head.weight"


def load_vocabulary(path: str | Path, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Read embedding [V, H] and LM head [V, H] of a HF directory, and nothing else of it.

    A target with tied weights stores no head: both are then one tensor.

    Raises:
        CheckpointError: no safetensors, a damaged file, or no token embeddings in it.
    """
    found: dict[str, Tensor] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    if name.endswith((_EMBEDDING, _HEAD)):
                        found[_EMBEDDING if name.endswith(_EMBEDDING) else _HEAD] = tensors.get_tensor(name).to(dtype)
        except SafetensorError as error:
            raise CheckpointError(f"'{file}' is damaged: {error}", field="target.model") from None
    if _EMBEDDING not in found:
        raise CheckpointError(f"'{path}' holds no '*{_EMBEDDING}' in safetensors files", field="target.model")
    return found[_EMBEDDING], found.get(_HEAD, found[_EMBEDDING])
