"""`config.json` of a DFlash draft as the `speculators` library writes it, to and from z-lab's.

The tensors have the same names in both. Layers are counted differently: speculators' `aux_hidden_state_layer_ids` name
a state before a block (transformers' `hidden_states` index), z-lab's `target_layer_ids` the block behind it, one less.
"""

from __future__ import annotations

from typing import Any

from unmask.errors import CheckpointError

_OUTSIDE = frozenset({"architectures", "block_size", "num_target_layers", "dflash_config"})
"""Keys of z-lab's file that do not describe the draft's own layers."""


def is_speculators(tree: dict[str, Any]) -> bool:
    """Whether a `config.json` is of this format."""
    return "speculators_model_type" in tree


def to_speculators(zlab: dict[str, Any], *, record_key: str, verifier: str | None = None) -> dict[str, Any]:
    """Rewrite z-lab's `config.json`.

    Args:
        record_key: our record of the target; it is kept at the top.
        verifier: directory or hub id of the target.
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
        "sliding_window_non_causal": False,
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

    Raises:
        CheckpointError: another kind of draft, a reduced vocabulary, or no layer ids.
    """
    if tree["speculators_model_type"] != "dflash":
        raise CheckpointError(f"'{tree['speculators_model_type']}' is no DFlash draft", field="speculators_model_type")
    layers = tree["transformer_layer_config"]
    if tree.get("draft_vocab_size", layers["vocab_size"]) != layers["vocab_size"]:
        raise CheckpointError("drafts with a vocabulary of their own are not supported", field="draft_vocab_size")
    ids = tree.get("aux_hidden_state_layer_ids")
    if not ids:
        raise CheckpointError("missing from the draft's config.json", field="aux_hidden_state_layer_ids")
    record = tree.get(record_key)
    zlab = {
        "architectures": ["DFlashDraftModel"],
        **layers,
        "block_size": tree["block_size"],
        "num_target_layers": tree.get("num_target_layers", (record or {}).get("num_layers")),
        "sample_from_anchor": tree.get("sample_from_anchor", False),
        "dflash_config": {
            "mask_token_id": tree["mask_token_id"],
            "target_layer_ids": [i - 1 for i in ids],
            "block_size": tree["block_size"],
        },
    }
    return zlab | ({record_key: record} if record is not None else {})
