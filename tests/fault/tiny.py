"""A random target small enough that serving it costs nearly nothing, and a draft of it; both served by real vLLM."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from unmask.checkpoints import save_draft
from unmask.config import EMBEDDED_TARGET, Recipe, ServeConfig, TargetConfig
from unmask.models.dflash import DFlashConfig, DFlashDraft, spread_layer_ids
from unmask.targets import describe_target, resolve_target

HIDDEN, LAYERS, VOCAB, HEAD_DIM = 128, 6, 49152, 32
BLOCK_SIZE = 6
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def save_tiny_target(path: Path, seed: int = 0) -> Path:
    """A target of six random layers in float32, with the embedded target's tokenizer.

    Wide random weights make its greedy text depend on every token before, so that a lost or doubled token changes all
    that follows.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // HEAD_DIM,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=2048,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2)
    model.save_pretrained(path)
    embedded = resolve_target(EMBEDDED_TARGET)
    for name in _TOKENIZER_FILES:
        if (embedded / name).is_file():
            shutil.copy(embedded / name, path / name)
    return path


def save_tiny_draft(target: Path, path: Path, seed: int = 0) -> Path:
    """A random draft of a tiny target: nearly nothing that it proposes is accepted."""
    torch.manual_seed(seed)
    config = DFlashConfig(
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=HIDDEN // HEAD_DIM,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        vocab_size=VOCAB,
        max_position_embeddings=2048,
        block_size=BLOCK_SIZE,
        mask_token_id=16,
        num_target_layers=LAYERS,
        target_layer_ids=spread_layer_ids(LAYERS, 2),
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    save_draft(DFlashDraft(config), path, describe_target(target), dtype=torch.float32)
    return path


def tiny_recipe(target: Path, draft: Path, *, target_replicas: int = 2, port: int = 0) -> Recipe:
    """How a tiny pairing is served: eight slots a target replica."""
    engine = {"kv_cache_memory_bytes": 1 << 26, "enforce_eager": True}
    return Recipe(
        target=TargetConfig(model=str(target), max_model_len=256, engine=engine),
        serve=ServeConfig(
            port=port,
            draft=str(draft),
            draft_retry_s=0.2,
            dtype="float32",
            target_replicas=target_replicas,
            max_num_seqs=8,
            max_queued=64,
        ),
    )
