"""What `speculators` 0.9 writes for a DFlash draft with the vocabulary of its target."""

from __future__ import annotations

from typing import Any

from unmask.models.dflash import DFlashConfig


def speculators_config(config: DFlashConfig) -> dict[str, Any]:
    """`config.json` of `DFlashDraftModel.save_pretrained`, key by key; only sizes and ids are put in."""
    return {
        "architectures": ["DFlashDraftModel"],
        "auto_map": {"": "config.DFlashSpeculatorConfig"},
        "aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
        "block_size": config.block_size,
        "draft_vocab_size": config.vocab_size,
        "dtype": "float32",
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": False,
        "sliding_window_non_causal": False,
        "speculators_config": {
            "algorithm": "dflash",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "accept_tolerance": 0.0,
                    "proposal_type": "greedy",
                    "speculative_tokens": config.block_size - 1,
                    "verifier_accept_k": 1,
                }
            ],
            "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "somewhere/else"},
        },
        "speculators_model_type": "dflash",
        "speculators_version": "0.9.0",
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "eos_token_id": None,
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            "hidden_size": config.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": config.intermediate_size,
            "layer_types": ["full_attention"] * config.num_hidden_layers,
            "max_position_embeddings": config.max_position_embeddings,
            "max_window_layers": 28,
            "model_type": "qwen3",
            "num_attention_heads": config.num_attention_heads,
            "num_hidden_layers": config.num_hidden_layers,
            "num_key_value_heads": config.num_key_value_heads,
            "pad_token_id": None,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_parameters": config.rope_parameters,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": config.vocab_size,
        },
        "transformers_version": "5.19.0",
    }
