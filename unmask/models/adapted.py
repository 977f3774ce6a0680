"""Causal LMs of Llama, Qwen2 or Qwen3 shape turned into diffusion LMs (DiffuLLaMA, arXiv 2410.17891).

Tensors and their names stay, and so does the shift. Without the adaptation record in its `config.json` a checkpoint
is the plain causal LM that it was, e.g. APD's verifier.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from unmask.denoiser import Attention
from unmask.errors import CheckpointError, ConfigError
from unmask.models.transformer import DiffusionLM, ModelConfig, init_weights, rope_frequencies
from unmask.models.weights import conventions, load_network, read_config, save_network, token_ids

SHAPES = ("llama", "qwen2", "qwen3")
_STATIC_ROPE = ("linear", "llama3", "yarn")
_ARCHITECTURE = "UnmaskAdaptedLM"


def parse(config: dict[str, Any]) -> ModelConfig:
    """Read the `config.json` of a causal LM, adapted or not. Raises CheckpointError for a shape that is not known."""
    shape = config.get("model_type")
    if shape not in SHAPES:
        raise CheckpointError(f"model_type {shape!r} cannot be adapted; known shapes: {SHAPES}", field="model_type")
    plain = {key: value for key, value in config.items() if key != "unmask"}
    hf = CONFIG_MAPPING[shape].from_dict(plain)
    _refuse_variants(hf)
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    inv_freq, rope_scale = _rope(hf, head_dim)
    section = config.get("unmask", {"attention": "causal"})
    return ModelConfig(
        family="adapted",
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads or hf.num_attention_heads,
        head_dim=head_dim,
        norm_eps=hf.rms_norm_eps,
        rope_inv_freq=inv_freq,
        rope_scale=rope_scale,
        tie_embeddings=hf.tie_word_embeddings,
        qkv_bias=shape == "qwen2" or getattr(hf, "attention_bias", False),
        output_bias=shape != "qwen2" and getattr(hf, "attention_bias", False),
        qk_norm=shape == "qwen3",
        max_length=hf.max_position_embeddings,
        shift=True,
        mask_id=section.get("mask_token_id"),
        eos_ids=token_ids(config.get("eos_token_id")),
        attention=section["attention"],
        block_size=section.get("block_size"),
        source=config,
    )


def build(config: dict[str, Any], *, seed: int = 0, std: float = 0.02) -> DiffusionLM:
    """A network with random weights, from a causal LM's `config.json` with or without an `unmask` section."""
    network = DiffusionLM(parse(config))
    init_weights(network, seed=seed, std=std)
    return network.eval()


def load(directory: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> DiffusionLM:
    """Load an adapted checkpoint, or a causal LM's as it is. `dtype` None keeps the checkpoint's.

    Raises:
        CheckpointError: unknown shape or unreadable weights.
    """
    config = parse(read_config(directory))
    return load_network(directory, config, to_internal=str, dtype=dtype, device=device)


def save(network: DiffusionLM, directory: str | Path) -> None:
    """Write a checkpoint under the published tensor names.

    An adapted one names an architecture of its own, so that no engine mistakes it for the causal LM it was.
    """
    config = dict(network.config.source)
    if network.config.attention != "causal":
        config |= {"unmask": conventions(network), "architectures": [_ARCHITECTURE]}
    save_network(network, directory, config, to_published=str)


def adapt(
    network: DiffusionLM,
    *,
    mask_id: int,
    attention: Attention = "bidirectional",
    block_size: int | None = None,
    seed: int = 0,
) -> DiffusionLM:
    """Turn a causal LM into an untrained diffusion LM that shares its tensors.

    An unused token becomes the mask, which avoids resizing a tied head. Its embedding, in which nothing was ever
    learned, is set to the mean embedding plus noise of a tenth of the embeddings' spread.

    Args:
        network: from `load`; its mask row is overwritten.
        mask_id: a special id that occurs in no text.
        attention: `bidirectional` (a teacher) or `block_causal` (exact caches), the latter with a `block_size`.

    Raises:
        ConfigError: impossible mask id, or block size and attention that do not go together.
    """
    if not 0 <= mask_id < network.vocab_size or mask_id in network.eos_ids:
        raise ConfigError(f"{mask_id} must be an unused id below {network.vocab_size}", field="mask_id")
    if (attention == "block_causal") != (block_size is not None):
        raise ConfigError("give a block size with block_causal attention, and only then", field="block_size")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight = network.model.embed_tokens.weight
        noise = torch.randn(weight.shape[1], generator=generator).to(weight)
        weight[mask_id] = weight.mean(0) + 0.1 * weight.std(0) * noise
    network.config = dataclasses.replace(network.config, attention=attention, block_size=block_size, mask_id=mask_id)
    return network


def _refuse_variants(hf: PreTrainedConfig) -> None:
    sliding = any(kind != "full_attention" for kind in getattr(hf, "layer_types", None) or [])
    if sliding or getattr(hf, "mlp_bias", False) or hf.hidden_act != "silu":
        raise CheckpointError("sliding-window attention, MLP biases and activations other than SiLU are not supported")


def _rope(hf: PreTrainedConfig, head_dim: int) -> tuple[tuple[float, ...], float]:
    kind = hf.rope_parameters.get("rope_type", "default")
    if kind == "default":
        return rope_frequencies(hf.rope_parameters["rope_theta"], head_dim), 1.0
    if kind not in _STATIC_ROPE:
        raise CheckpointError(f"rotary scaling '{kind}' depends on the length and is not supported", field="rope_type")
    inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](hf)
    return tuple(inv_freq.tolist()), float(scale)
