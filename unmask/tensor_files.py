"""Tensors written to safetensors files."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write contiguous CPU tensors to a safetensors file.

    Raises:
        OSError: the file cannot be written; safetensors has an error of its own for that, which no caller expects.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"cannot write '{path}': {error}") from error
