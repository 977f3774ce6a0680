"""The DFlash draft: a block-diffusion decoder conditioned on a target's hidden states (arXiv 2602.06036).

Dimension letters: B batch, Q query (block) rows, S context rows, H hidden, N heads, L draft layers,
D sampled target layers, d head size.

The context enters through attention alone. Feature rows are fused once (`fc`, then `hidden_norm`), and each
layer passes them through its own key and value projections and concatenates the result in front of the
block's keys and values. The context is never normalised by a layer and never updated, so its keys and values
can be made ahead of the draft step and cached. Embedding table and LM head are the target's.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from unmask.errors import CheckpointError
from unmask.masking.anchored import context_mask
from unmask.models.attend import compiled_flex


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DFlashConfig:
    """Sizes of a draft; `unmask.checkpoints` maps them to and from the files' `config.json`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    block_size: int
    mask_token_id: int
    num_target_layers: int
    target_layer_ids: tuple[int, ...]
    """0-based; id j is the residual stream after target block j, before any final norm."""
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] = dataclasses.field(default_factory=lambda: {"rope_type": "default"})

    def __post_init__(self) -> None:
        if not self.target_layer_ids:
            raise CheckpointError("needs at least one target layer", field="dflash_config.target_layer_ids")
        last = self.num_target_layers - 2
        if min(self.target_layer_ids) < 0 or max(self.target_layer_ids) > last:
            raise CheckpointError(
                f"{list(self.target_layer_ids)} must lie in 0..{last}: the last block's output is post-norm in some "
                "engines and pre-norm in others, so a draft trained on it would be served other features",
                field="dflash_config.target_layer_ids",
            )


def spread_layer_ids(num_target_layers: int, num_features: int) -> tuple[int, ...]:
    """The D sampled target layers, evenly spaced from block 1 to block N - 3 (one feature: the middle block)."""
    if num_features == 1:
        return (num_target_layers // 2,)
    span = num_target_layers - 4
    return tuple(round(1 + i * span / (num_features - 1)) for i in range(num_features))


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm that runs fused under autocast too, where weights and rows differ in dtype."""

    def forward(self, x: Tensor) -> Tensor:
        # On a GPU autocast computes the norm in float32; rows go on in their own dtype.
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(x.dtype)


class DFlashAttention(nn.Module):
    """Grouped-query attention of block rows over [context ; block], with per-head norms of q and k."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        hidden, head_dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head_dim, hidden, bias=False)
        self.q_norm = RMSNorm(head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(head_dim, eps=config.rms_norm_eps)

    def heads(self, projected: Tensor) -> Tensor:
        """[..., heads * d] to [..., heads, d]."""
        return projected.unflatten(-1, (-1, self.head_dim))

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of rows x [..., T, H]: each [..., T, num_kv_heads, d]."""
        keys = rotate(self.k_norm(self.heads(self.k_proj(x))), cos, sin)
        return keys, self.heads(self.v_proj(x))

    def forward(
        self, x_BQH: Tensor, cos: Tensor, sin: Tensor, context_k: Tensor, context_v: Tensor, mask: Tensor | BlockMask
    ) -> Tensor:
        """Block rows attend to context [B, S, n_kv, d] and to themselves where `mask` allows."""
        queries = rotate(self.q_norm(self.heads(self.q_proj(x_BQH))), cos, sin)
        block_k, block_v = self.keys_values(x_BQH, cos, sin)
        keys = torch.cat([context_k.to(block_k.dtype), block_k], dim=1)
        values = torch.cat([context_v.to(block_v.dtype), block_v], dim=1)
        queries, keys, values = (t.transpose(1, 2) for t in (queries, keys, values))
        if isinstance(mask, BlockMask):
            attended = compiled_flex()(queries, keys, values, block_mask=mask, enable_gqa=True)
        else:
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        return self.o_proj(attended.transpose(1, 2).flatten(-2))


class DFlashMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DFlashLayer(nn.Module):
    """Pre-norm attention and MLP on block rows; the context is read, never written."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = DFlashAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = DFlashMLP(config)

    def forward(
        self, x_BQH: Tensor, cos: Tensor, sin: Tensor, context_k: Tensor, context_v: Tensor, mask: Tensor | BlockMask
    ) -> Tensor:
        x_BQH = x_BQH + self.self_attn(self.input_layernorm(x_BQH), cos, sin, context_k, context_v, mask)
        return x_BQH + self.mlp(self.post_attention_layernorm(x_BQH))


class DFlashDraft(nn.Module):
    """The draft network. Module names are those of the published checkpoints."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(len(config.target_layer_ids) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(DFlashLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(_rope_config(config))

    def project_features(self, features: Tensor) -> Tensor:
        """Fuse the target's hidden states [..., D * H] into context rows [..., H]: `fc`, then `hidden_norm`."""
        return self.hidden_norm(self.fc(features))

    def context_kv(self, context: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that context rows contribute to every layer.

        Args:
            context: [..., S, H] from `project_features`.
            positions: int64 [..., S], absolute.

        Returns:
            Keys (normed and rotated) and values, each [L, ..., S, num_kv_heads, d].
        """
        cos, sin = self.rotary(positions, context)
        pairs = [cast(DFlashLayer, layer).self_attn.keys_values(context, cos, sin) for layer in self.layers]
        return torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs])

    def forward(
        self, x_BQH: Tensor, positions_BQ: Tensor, context_k: Tensor, context_v: Tensor, mask: Tensor | BlockMask
    ) -> Tensor:
        """One denoising pass over block rows; the LM head is applied by the caller.

        Args:
            x_BQH: embedded block rows, anchors and masks.
            positions_BQ: int64 absolute positions.
            context_k: [L, B, S, num_kv_heads, d]; so is `context_v`.
            mask: bool, broadcastable to [B, 1, Q, S + Q]; or a BlockMask over the same rows and keys (training).

        Returns:
            [B, Q, H] after the final norm. Row k of a block predicts the token AT its own position.
        """
        cos, sin = self.rotary(positions_BQ, x_BQH)
        for layer, layer_k, layer_v in zip(self.layers, context_k, context_v, strict=True):
            x_BQH = layer(x_BQH, cos, sin, layer_k, layer_v, mask)
        return self.norm(x_BQH)

    def denoise(
        self, x_BQH: Tensor, positions_BQ: Tensor, context_k: Tensor, context_v: Tensor, context_lens_B: Tensor
    ) -> Tensor:
        """`forward` for serving: one block a request over a context right-padded to S rows."""
        mask = context_mask(context_lens_B, context_k.shape[2], x_BQH.shape[1])
        return self(x_BQH, positions_BQ, context_k, context_v, mask)

    def rotary(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [..., T, 1, d] in the dtype of `like`."""
        flat = positions.reshape(1, -1)
        cos, sin = self.rotary_emb(like, flat)
        shape = (*positions.shape, 1, self.config.head_dim)
        return cos.reshape(shape), sin.reshape(shape)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-split layout; x is [..., T, heads, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _rope_config(config: DFlashConfig) -> Qwen3Config:
    """transformers derives the frequencies, so that every RoPE scaling it knows works here too."""
    return Qwen3Config(
        hidden_size=config.hidden_size,
        head_dim=config.head_dim,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=dict(config.rope_parameters),
    )
