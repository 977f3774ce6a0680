"""`config.json` of a DFlash draft as the `speculators` library writes it, to and from z-lab's.

The tensors have the same names in both. Layers are counted differently: speculators' `aux_hidden_state_layer_ids` name
a state before a block (transformers' `hidden_states` index), z-lab's `target_layer_ids` the block behind it, one less.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unmask.errors import CheckpointError

_OUTSIDE = frozenset({"architectures", "block_size", "num_target_layers", "dflash_config"})
"""Keys of z-lab's file that do not describe the draft's own layers."""
_TARGETS = frozenset({"embed_tokens.weight", "lm_head.weight", "d2t", "t2d"})
"""Tensors that the target has, or that nobody needs where vocabularies are equal."""
_OWN_VOCABULARY = "drafts with a vocabulary of their own are not supported"


def is_speculators(tree: dict[str, Any]) -> bool:
    """Whether a `config.json` is of this format."""
    return "speculators_model_type" in tree


def to_speculators(zlab: dict[str, Any], *, record_key: str, verifier: str | None = None) -> dict[str, Any]:
    """Rewrite z-lab's `config.json`.

    Args:
        record_key: our record of the target; it is kept at the top.
        verifier: directory or hub id of the target, from which `vllm serve` takes it.
    """
    dflash, record = zlab["dflash_config"], zlab.get(record_key)
    layers = {key: value for key, value in zlab.items() if key not in _OUTSIDE | {record_key}}
    tree = {
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": "dflash",
        "transformer_layer_config": layers,
        "draft_vocab_size": zlab["vocab_size"],
        "block_size": zlab["block_size"],
        "aux_hidden_state_layer_ids": [i + 1 for i in dflash["target_layer_ids"]],
        "mask_token_id": dflash["mask_token_id"],
        "sample_from_anchor": False,
        # vLLM makes one switch for all layers of it. Here it is without meaning: full layers are never causal.
        "sliding_window_non_causal": True,
        "tie_word_embeddings": False,
        "torch_dtype": zlab["torch_dtype"],
        "num_target_layers": zlab["num_target_layers"],
        "speculators_config": {
            "algorithm": "dflash",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": zlab["block_size"] - 1}],
            "verifier": {"name_or_path": verifier, "architectures": []},
        },
    }
    return tree | ({record_key: record} if record is not None else {})


def from_speculators(tree: dict[str, Any], *, record_key: str) -> dict[str, Any]:
    """Rewrite a speculators `config.json` as z-lab's.

    The number of the target's layers stays out where neither `num_target_layers` nor our record tells it: it is no key
    of theirs.

    Raises:
        CheckpointError: another kind of draft, a vocabulary or width of its own, or a missing key (named).
    """
    if tree["speculators_model_type"] != "dflash":
        raise CheckpointError(f"'{tree['speculators_model_type']}' is no DFlash draft", field="speculators_model_type")
    layers, ids, block_size, mask = (
        _required(tree, key)
        for key in ("transformer_layer_config", "aux_hidden_state_layer_ids", "block_size", "mask_token_id")
    )
    vocab_size, hidden_size = _required(layers, "vocab_size"), _required(layers, "hidden_size")
    if (tree.get("draft_vocab_size") or vocab_size) != vocab_size:
        raise CheckpointError(_OWN_VOCABULARY, field="draft_vocab_size")
    if (tree.get("target_hidden_size") or hidden_size) != hidden_size:
        raise CheckpointError("drafts of another width than the target's are not supported", field="target_hidden_size")
    record = tree.get(record_key)
    zlab = {
        "architectures": ["DFlashDraftModel"],
        **layers,
        "block_size": block_size,
        "num_target_layers": tree.get("num_target_layers", (record or {}).get("num_layers")),
        "sample_from_anchor": tree.get("sample_from_anchor", False),
        "dflash_config": {
            "mask_token_id": mask,
            "target_layer_ids": [i - 1 for i in ids],
            "block_size": block_size,
        },
    }
    return zlab | ({record_key: record} if record is not None else {})


def own_tensors(weights: Mapping[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """The draft's own tensors: a file may also hold the target's tables, and maps between equal vocabularies.

    Raises:
        CheckpointError: a head or map of another vocabulary than the target's (named).
    """
    for name in ("lm_head.weight", "d2t", "t2d"):
        # `d2t` holds what is added to an id of the draft's to make it the target's.
        if name in weights and (len(weights[name]) != vocab_size or (name == "d2t" and weights[name].any())):
            raise CheckpointError(_OWN_VOCABULARY, field=name)
    return {name: t for name, t in weights.items() if name not in _TARGETS and not name.startswith("verifier_")}


def _required(tree: dict[str, Any], key: str) -> Any:
    value = tree.get(key)
    if value is None or value == []:
        raise CheckpointError("missing from the draft's config.json", field=key)
    return value
