"""A target of Qwen3-8B's shape with random weights, for engines that read their model from a directory."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from unmask.config import TargetConfig
from unmask.targets import resolve_target

QWEN3_8B = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    "rope_theta": 1e6, "tie_word_embeddings": False,
}  # fmt: skip


def make_dummy(folder: Path) -> Path:
    """A directory with a network of Qwen3-8B's shape, random weights, and the embedded target's tokenizer."""
    path = folder / "qwen3-8b-dummy"
    if path.is_dir():
        return path
    tokenizer = AutoTokenizer.from_pretrained(resolve_target(TargetConfig().model))
    config = Qwen3Config(**QWEN3_8B, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    del model
    torch.cuda.empty_cache()  # the engines of other processes want the memory
    return path
