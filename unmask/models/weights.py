"""Checkpoint directories: `config.json` and safetensors in, a network out, and back. No pickle, no remote code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from unmask.errors import CheckpointError
from unmask.files import atomic_path, write_json
from unmask.models.transformer import DiffusionLM, ModelConfig
from unmask.tensor_files import save_tensors

Rename = Callable[[str], str]


def read_config(directory: str | Path) -> dict[str, Any]:
    """The directory's `config.json`; `eos_token_id` also takes in those of `generation_config.json`.

    Raises:
        CheckpointError: missing or not a JSON object.
    """
    config = _read_json(Path(directory) / "config.json")
    generation_path = Path(directory) / "generation_config.json"
    if generation_path.is_file():
        known = token_ids(config.get("eos_token_id"))
        more = token_ids(_read_json(generation_path).get("eos_token_id"))
        config["eos_token_id"] = list(dict.fromkeys(known + more))
    return config


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """A config's token id entry, which may be absent, one id or a list."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def entry(config: dict[str, Any], key: str) -> Any:
    """A required entry of a `config.json`. Raises CheckpointError where it is missing."""
    if config.get(key) is None:
        raise CheckpointError(f"config.json has no '{key}'; this checkpoint is of another family", field=key)
    return config[key]


def conventions(network: DiffusionLM) -> dict[str, Any]:
    """The `unmask` section of a saved `config.json`: what the family's own config has no word for."""
    config = network.config
    return {"attention": config.attention, "block_size": config.block_size, "mask_token_id": config.mask_id}


def load_network(
    directory: str | Path,
    config: ModelConfig,
    *,
    to_internal: Rename,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> DiffusionLM:
    """Build the network of `config` and fill it with the directory's tensors, which must match name by name.

    Args:
        to_internal: a published tensor name to the network's own.
        dtype: of the loaded weights; None keeps the checkpoint's.

    Raises:
        CheckpointError: no safetensors, damaged files, missing, unknown or misshapen tensors.
    """
    with torch.device("meta"):
        network = DiffusionLM(config)
    expected = network.state_dict()
    loaded: dict[str, torch.Tensor] = {}
    for name, tensor in _tensors(Path(directory), device):
        internal = to_internal(name)
        if internal.endswith("rotary_emb.inv_freq") or (internal == "lm_head.weight" and config.tie_embeddings):
            continue
        if internal not in expected:
            raise CheckpointError(f"unknown tensor '{name}' in '{directory}'; the checkpoint is of another family")
        if tensor.shape != expected[internal].shape:
            shapes = f"{list(tensor.shape)}, expected {list(expected[internal].shape)}"
            raise CheckpointError(f"tensor '{name}' in '{directory}' has shape {shapes}; config.json does not fit it")
        loaded[internal] = tensor if dtype is None else tensor.to(dtype)
    missing = sorted(expected.keys() - loaded.keys())
    if missing:
        raise CheckpointError(f"'{directory}' lacks {len(missing)} tensors, among them '{missing[0]}'")
    network.load_state_dict(loaded, assign=True)
    return network.to(device).eval()


def save_network(network: DiffusionLM, directory: str | Path, config: dict[str, Any], *, to_published: Rename) -> None:
    """Write `config.json` and `model.safetensors`; each file appears whole or not at all."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {to_published(name): tensor.contiguous().cpu() for name, tensor in network.state_dict().items()}
    with atomic_path(directory / "model.safetensors") as temporary:
        save_tensors(tensors, temporary, metadata={"format": "pt"})
    write_json(directory / "config.json", config)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"no {path.name} in '{path.parent}'; give the path of a checkpoint directory")
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"'{path}' is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"'{path}' must hold a JSON object")
    return value


def _tensors(directory: Path, device: torch.device | str) -> Iterator[tuple[str, torch.Tensor]]:
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"no .safetensors in '{directory}'; convert the checkpoint, pickled weights are not read")
    for path in paths:
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in file.keys():  # noqa: SIM118  (not a mapping)
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"'{path}' is damaged: {error}") from None
