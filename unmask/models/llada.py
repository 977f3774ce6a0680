"""LLaDA (arXiv 2502.09992), under its published tensor names: full attention, logits not shifted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from unmask.errors import CheckpointError
from unmask.models.transformer import DiffusionLM, ModelConfig, init_weights, rope_frequencies
from unmask.models.weights import conventions, entry, load_network, read_config, save_network, token_ids

_REQUIRED = {"block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "include_bias": False}
_OUTER_NAMES = {
    "model.embed_tokens.weight": "model.transformer.wte.weight",
    "model.norm.weight": "model.transformer.ln_f.weight",
    "lm_head.weight": "model.transformer.ff_out.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
_OUTER_INTERNAL = {published: internal for internal, published in _OUTER_NAMES.items()}
_LAYER_INTERNAL = {published: internal for internal, published in _LAYER_NAMES.items()}


def parse(config: dict[str, Any]) -> ModelConfig:
    """Read a LLaDA `config.json`. Raises CheckpointError where it describes another architecture."""
    for key, value in _REQUIRED.items():
        if config.get(key, value) != value:
            raise CheckpointError(f"LLaDA with {key} = {config[key]!r} is not supported, only {value!r}", field=key)
    num_heads = entry(config, "n_heads")
    head_dim = entry(config, "d_model") // num_heads
    section = config.get("unmask", {})
    return ModelConfig(
        family="llada",
        vocab_size=config.get("embedding_size") or entry(config, "vocab_size"),
        hidden_size=config["d_model"],
        intermediate_size=config.get("mlp_hidden_size") or config["mlp_ratio"] * config["d_model"],
        num_layers=entry(config, "n_layers"),
        num_heads=num_heads,
        num_kv_heads=config.get("n_kv_heads") or num_heads,
        head_dim=head_dim,
        norm_eps=config.get("rms_norm_eps", 1e-5),
        rope_inv_freq=rope_frequencies(config.get("rope_theta", 10000.0), head_dim),
        tie_embeddings=config.get("weight_tying", False),
        qkv_bias=config.get("include_qkv_bias", False),
        max_length=entry(config, "max_sequence_length"),
        shift=False,
        mask_id=entry(config, "mask_token_id"),
        eos_ids=token_ids(entry(config, "eos_token_id")),
        attention=section.get("attention", "bidirectional"),
        block_size=section.get("block_size"),
        source=config,
    )


def build(config: dict[str, Any], *, seed: int = 0, std: float = 0.02) -> DiffusionLM:
    """A network with random weights, from a LLaDA `config.json`."""
    network = DiffusionLM(parse(config))
    init_weights(network, seed=seed, std=std)
    return network.eval()


def load(directory: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> DiffusionLM:
    """Load a LLaDA checkpoint directory. `dtype` None keeps the checkpoint's. Raises CheckpointError."""
    config = parse(read_config(directory))
    return load_network(directory, config, to_internal=internal_name, dtype=dtype, device=device)


def save(network: DiffusionLM, directory: str | Path) -> None:
    """Write a checkpoint under the published tensor names."""
    config = {**network.config.source, "unmask": conventions(network)}
    save_network(network, directory, config, to_published=published_name)


def published_name(internal: str) -> str:
    """`model.layers.3.self_attn.o_proj.weight` -> `model.transformer.blocks.3.attn_out.weight`."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", internal)
    if match is None:
        return _OUTER_NAMES[internal]
    layer, module, kind = match.groups()
    return f"model.transformer.blocks.{layer}.{_LAYER_NAMES[module]}.{kind}"


def internal_name(published: str) -> str:
    """The reverse of `published_name`; an unknown name comes back as it is, for the loader to refuse."""
    match = re.fullmatch(r"model\.transformer\.blocks\.(\d+)\.(\w+)\.(weight|bias)", published)
    if match is None or match[2] not in _LAYER_INTERNAL:
        return _OUTER_INTERNAL.get(published, published)
    layer, module, kind = match.groups()
    return f"model.layers.{layer}.{_LAYER_INTERNAL[module]}.{kind}"
