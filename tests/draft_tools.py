"""A tiny Llama target and a tiny draft for it, random and deterministic."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from unmask.config import DraftConfig
from unmask.models.dflash import DFlashDraft
from unmask.models.draft_start import draft_sizes, new_draft
from unmask.models.target import TargetModel
from unmask.types import TargetRecord

MASK = 1
VOCAB = 48


def tiny_llama(num_layers: int = 7, seed: int = 0, num_heads: int = 4) -> LlamaForCausalLM:
    """A float32 Llama whose greedy text is not constant."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def tiny_pair(
    block_size: int = 4, num_layers: int = 2, num_features: int = 3, init: str = "random", num_heads: int = 4
) -> tuple[TargetModel, DFlashDraft]:
    """A target and an untrained draft."""
    model = tiny_llama(num_heads=num_heads)
    shape = DraftConfig(num_layers=num_layers, block_size=block_size, num_target_features=num_features)
    sizes = draft_sizes(model.config, shape, MASK)
    return TargetModel(model, sizes.target_layer_ids), new_draft(sizes, model, init, seed=1).eval()


def record(**changes: object) -> TargetRecord:
    """The record of a tiny target."""
    values = {
        "revision": "sha256:0",
        "tokenizer_hash": "sha256:1",
        "chat_template_hash": "sha256:2",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 7,
    }
    return TargetRecord(**(values | changes))  # type: ignore[arg-type]
