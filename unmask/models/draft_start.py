"""A new draft for a target: its sizes are the target's, its weights start from the target's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from unmask.config import DraftConfig
from unmask.errors import CheckpointError
from unmask.models.dflash import DFlashConfig, DFlashDraft, spread_layer_ids

_HEAD_NORMS = ("q_norm.weight", "k_norm.weight")
_STD = 0.02
"""Of random weights: that of transformers' models."""


def draft_sizes(target: Any, draft: DraftConfig, mask_token_id: int) -> DFlashConfig:
    """Sizes of a draft for a target.

    Args:
        target: the target's transformers config (or its text part).
        draft: layers, block size and number of sampled target layers.
        mask_token_id: stands for a position that is still to be predicted.

    Raises:
        CheckpointError: more features asked for than the target has layers to sample.
    """
    layers = target.num_hidden_layers
    ids = spread_layer_ids(layers, draft.num_target_features)
    if len(set(ids)) < len(ids):
        raise CheckpointError(
            f"{draft.num_target_features} features cannot be spread over a target of {layers} layers; lower it",
            field="draft.num_target_features",
        )
    heads = target.num_attention_heads
    return DFlashConfig(
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_hidden_layers=draft.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=target.num_key_value_heads,
        head_dim=getattr(target, "head_dim", None) or target.hidden_size // heads,
        vocab_size=target.vocab_size,
        max_position_embeddings=target.max_position_embeddings,
        block_size=draft.block_size,
        mask_token_id=mask_token_id,
        num_target_layers=layers,
        target_layer_ids=ids,
        rms_norm_eps=target.rms_norm_eps,
        rope_parameters=dict(target.rope_parameters),
    )


def new_draft(config: DFlashConfig, target: PreTrainedModel, init: str, seed: int) -> DFlashDraft:
    """A draft with fresh float32 weights.

    `init="target"` copies the last target blocks, the final norm, and lets `fc` pass on the last feature, so that
    training starts from a network that already reads the target's residual stream; `"random"` draws the weights of all
    linear layers from N(0, 0.02), with biases of 0 and norms of 1, as in the paper.

    Raises:
        CheckpointError: the target has fewer blocks than the draft, or blocks of other weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draft = DFlashDraft(config)
        if init == "random":
            draft.apply(_draw)
    if init == "target":
        _copy_target(draft, target)
    return draft


def _draw(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _copy_target(draft: DFlashDraft, target: PreTrainedModel) -> None:
    decoder: Any = target.get_decoder()
    blocks = decoder.layers[-draft.config.num_hidden_layers :]
    if len(blocks) < len(draft.layers):
        raise CheckpointError(
            f"the target has {len(blocks)} layers, fewer than the draft's {len(draft.layers)}; "
            "use draft.init=random or fewer layers",
            field="draft.num_layers",
        )
    for own, block in zip(draft.layers, blocks, strict=True):
        names, weights = own.state_dict(), block.state_dict()
        # The target may lack the per-head norms (they start at 1) or hold biases, which the draft has not.
        missing = [n for n in names if n not in weights and not n.endswith(_HEAD_NORMS)]
        if missing:
            raise CheckpointError(
                f"blocks of a {type(block).__name__} have no '{missing[0]}' to start from; use draft.init=random",
                field="draft.init",
            )
        own.load_state_dict({n: t for n, t in weights.items() if n in names}, strict=False)
    hidden = draft.config.hidden_size
    with torch.no_grad():
        draft.norm.weight.copy_(decoder.norm.weight)
        draft.fc.weight.zero_()
        draft.fc.weight[:, -hidden:].copy_(torch.eye(hidden))
