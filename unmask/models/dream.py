"""Dream (arXiv 2508.15487), under its published tensor names: Qwen2 shape, full attention, logits shifted by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from unmask.errors import CheckpointError
from unmask.models.transformer import DiffusionLM, ModelConfig, init_weights, rope_frequencies
from unmask.models.weights import conventions, entry, load_network, read_config, save_network, token_ids


def parse(config: dict[str, Any]) -> ModelConfig:
    """Read a Dream `config.json`. Raises CheckpointError where it describes another architecture."""
    for key in ("rope_scaling", "use_sliding_window", "use_mrope"):
        if config.get(key):
            raise CheckpointError(f"Dream with {key} = {config[key]!r} is not supported", field=key)
    num_heads = entry(config, "num_attention_heads")
    head_dim = entry(config, "hidden_size") // num_heads
    section = config.get("unmask", {})
    return ModelConfig(
        family="dream",
        vocab_size=entry(config, "vocab_size"),
        hidden_size=config["hidden_size"],
        intermediate_size=entry(config, "intermediate_size"),
        num_layers=entry(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=entry(config, "num_key_value_heads"),
        head_dim=head_dim,
        norm_eps=entry(config, "rms_norm_eps"),
        rope_inv_freq=rope_frequencies(entry(config, "rope_theta"), head_dim),
        tie_embeddings=config.get("tie_word_embeddings", False),
        qkv_bias=True,
        max_length=entry(config, "max_position_embeddings"),
        shift=True,
        mask_id=entry(config, "mask_token_id"),
        eos_ids=token_ids(entry(config, "eos_token_id")),
        attention=section.get("attention", "bidirectional"),
        block_size=section.get("block_size"),
        source=config,
    )


def build(config: dict[str, Any], *, seed: int = 0, std: float = 0.02) -> DiffusionLM:
    """A network with random weights, from a Dream `config.json`."""
    network = DiffusionLM(parse(config))
    init_weights(network, seed=seed, std=std)
    return network.eval()


def load(directory: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> DiffusionLM:
    """Load a Dream checkpoint directory. `dtype` None keeps the checkpoint's. Raises CheckpointError."""
    config = parse(read_config(directory))
    return load_network(directory, config, to_internal=str, dtype=dtype, device=device)


def save(network: DiffusionLM, directory: str | Path) -> None:
    """Write a checkpoint under the published tensor names."""
    config = {**network.config.source, "unmask": conventions(network)}
    save_network(network, directory, config, to_published=str)
