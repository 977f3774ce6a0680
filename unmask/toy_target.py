"""The toy target: a random two-layer causal LM over single characters, small enough to train in a minute on a CPU.

With the source `copying` it takes the diffusion line from the first stage to the last in minutes.
"""

from __future__ import annotations

import os
import string
from pathlib import Path

from unmask.files import atomic_directory, verify_directory, write_json

_CACHE_NAME = "toy-v1"
_EOS, _PADDING, _UNKNOWN, _MASK = "<|end|>", "<|pad|>", "<|unknown|>", "<|mask|>"
_CHARACTERS = string.ascii_lowercase + string.digits + " .,:?=+-*/#"
_TEMPLATE = "{% for message in messages %}{{ message['content'] }}={% endfor %}"
_SHAPE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


def toy_target() -> Path:
    """Directory of the toy target, built on first use under `$UNMASK_CACHE` (default `~/.cache/unmask`)."""
    root = Path(os.environ.get("UNMASK_CACHE") or Path.home() / ".cache" / "unmask")
    path = root / _CACHE_NAME
    if not verify_directory(path):
        with atomic_directory(path) as building:
            _build(building)
    return path


def _build(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from unmask.models import adapted

    vocabulary = {token: index for index, token in enumerate((_EOS, _PADDING, _UNKNOWN, _MASK, *_CHARACTERS))}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token=_EOS, pad_token=_PADDING, unk_token=_UNKNOWN, mask_token=_MASK
    )
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(directory)
    config = {**_SHAPE, "vocab_size": len(vocabulary), "eos_token_id": vocabulary[_EOS]}
    adapted.save(adapted.build(config, seed=0, std=0.05), directory)
    write_json(directory / "generation_config.json", {"eos_token_id": vocabulary[_EOS]})
