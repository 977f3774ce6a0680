"""The layers of a draft over paged context, in as few launches as their products allow.

Projections that read the same rows are one product each, and what lies between two products is one operation. The
weights are those of the draft's modules, which become views of the joined ones: loading others into the modules changes
both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.models.dflash import DFlashDraft, DFlashLayer
from unmask.pairing import block_ops
from unmask.pairing.context_cache import ContextCache
from unmask.pairing.paged_attention import gathered_attention


@dataclass(frozen=True, slots=True)
class BlockInputs:
    """Columns of the input table for B requests: int32 `last_tokens`, `anchors` and `lengths` [B], `gaps` [B, 2], and
    `pages` [B, W]."""

    last_tokens: Tensor
    anchors: Tensor
    lengths: Tensor
    gaps: Tensor
    pages: Tensor


class BlockNetwork:
    """A draft's block pass without its head.

    Args:
        draft: whose modules share their weights with this from now on.
        embedding: the target's token embeddings [V, H].
        cache: context of the requests.
    """

    def __init__(self, draft: DFlashDraft, embedding: Tensor, cache: ContextCache) -> None:
        self._draft, self._embedding, self._cache = draft, embedding, cache
        self._ops: Any = block_ops
        self._attend: Callable[..., Tensor] = gathered_attention
        if embedding.is_cuda:
            from unmask.pairing import block_ops_triton
            from unmask.pairing.paged_attention_triton import paged_attention

            self._ops, self._attend = block_ops_triton, paged_attention
        self._layers = [cast(DFlashLayer, layer) for layer in draft.layers]
        attentions = [layer.self_attn for layer in self._layers]
        self._qkv = [_joined([a.q_proj, a.k_proj, a.v_proj]) for a in attentions]
        self._gate_up = [_joined([layer.mlp.gate_proj, layer.mlp.up_proj]) for layer in self._layers]
        positions = torch.arange(draft.config.max_position_embeddings, device=embedding.device)
        self.rotary = draft.rotary(positions, embedding[:1])
        """Cosines and sines [P, 1, d] of all positions."""

    def __call__(self, inputs: BlockInputs, k: int) -> Tensor:
        """Rows [B, K + 1, H] after the final norm; a fixed sequence of kernels."""
        draft, config, ops = self._draft, self._draft.config, self._ops
        eps, num_rows, num_kv_heads = config.rms_norm_eps, k + 1, config.num_key_value_heads
        where = (inputs.pages, inputs.lengths, inputs.gaps, self._cache.page_size)
        first = self._layers[0].input_layernorm.weight
        x, normed = ops.embed_blocks(self._embedding, inputs.last_tokens, config.mask_token_id, num_rows, first, eps)
        following = [layer.input_layernorm.weight for layer in self._layers[1:]] + [draft.norm.weight]
        pools = zip(self._cache.keys, self._cache.values, strict=True)
        joined = zip(self._layers, self._qkv, self._gate_up, following, pools, strict=True)
        for layer, qkv, gate_up, next_norm, (keys, values) in joined:
            attention = layer.self_attn
            block = ops.split_heads(
                F.linear(normed, qkv),
                attention.q_norm.weight,
                attention.k_norm.weight,
                eps,
                self.rotary,
                inputs.anchors,
                num_rows,
                num_kv_heads,
            )
            attended = attention.o_proj(self._attend(*block, keys, values, *where).view(len(x), -1))
            x, normed = ops.add_norm(x, attended, layer.post_attention_layernorm.weight, eps)
            activated = ops.silu_mul(F.linear(normed, gate_up))
            x, normed = ops.add_norm(x, layer.mlp.down_proj(activated), next_norm, eps)
        return normed.view(-1, num_rows, config.hidden_size)


def _joined(projections: Sequence[nn.Linear]) -> Tensor:
    """One weight [sum of outputs, H]; the modules' own become views of it."""
    weight = torch.cat([p.weight.detach() for p in projections])
    for projection, rows in zip(projections, weight.split([p.out_features for p in projections]), strict=True):
        projection.weight = nn.Parameter(rows, requires_grad=False)
    return weight
