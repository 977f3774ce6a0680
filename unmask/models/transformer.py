"""The decoder-only transformer that every diffusion LM here is: RMSNorm, rotary positions, grouped heads, SwiGLU.

LLaDA, Dream, Llama, Qwen2 and Qwen3 differ in a few switches, in how their checkpoints name the same tensors, and
in the shift (see LogitAligner); inside, tensors carry the names of Hugging Face's Llama.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from unmask.denoiser import Attention, MaskSpec
from unmask.models.aligner import LogitAligner
from unmask.models.attend import Attend, cached_attend, window_attend
from unmask.models.cache import CacheView, KVCache


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and conventions of one network, read from a checkpoint's `config.json` by its family."""

    family: Literal["llada", "dream", "adapted"]
    vocab_size: int
    """Rows of the embedding, padding of the vocabulary included."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_inv_freq: tuple[float, ...]
    rope_scale: float = 1.0
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    max_length: int
    shift: bool
    mask_id: int | None
    eos_ids: tuple[int, ...]
    attention: Attention
    block_size: int | None = None
    source: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The checkpoint's own `config.json`, written back on save."""


def rope_frequencies(theta: float, head_dim: int) -> tuple[float, ...]:
    """Unscaled rotary frequencies theta^(-2 j / head_dim), j = 0 .. head_dim / 2 - 1, as float32 values."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return tuple((1.0 / theta**exponents).tolist())


class RMSNorm(nn.Module):
    """Root-mean-square norm, accumulated in float32 whatever the dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype as `x`."""
        # Equal dtypes select the fused kernel; under autocast the weight is float32.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Rotary(nn.Module):
    """Rotary position tables of explicit positions, computed in float32."""

    inv_freq_bits: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Kept as bits: `network.bfloat16()` casts float buffers, and rounded frequencies ruin far positions.
        # On an explicit device: the table is real even when the network is built on the meta device.
        inv_freq = torch.tensor(config.rope_inv_freq, dtype=torch.float32, device="cpu")
        self.register_buffer("inv_freq_bits", inv_freq.view(torch.int32), persistent=False)
        self.scale = config.rope_scale

    def forward(self, positions_BT: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, each [B, T, 1, head_dim]."""
        inv_freq = self.inv_freq_bits.view(torch.float32).repeat(2)
        angles = positions_BT[:, :, None, None].float() * inv_freq
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


def rotate(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn queries or keys [B, T, heads, head_dim] to their positions (the two halves form the complex pairs)."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class SelfAttention(nn.Module):
    """Grouped-query attention; which columns it sees is decided by `attend`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        query_size, key_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], attend: Attend) -> torch.Tensor:
        """[B, T, H] -> [B, T, H]."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        return self.o_proj(attend(self.layer, q, k, v).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, H] -> [B, T, H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = SelfAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], attend: Attend) -> torch.Tensor:
        """[B, T, H] -> [B, T, H]."""
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.rotary = Rotary(config)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Last hidden states [B, T, H]."""
        x = self.embed_tokens(ids)
        rope = self.rotary(positions, x.dtype)
        for layer in self.layers:
            x = layer(x, rope, attend)
        return self.norm(x)


class DiffusionLM(nn.Module):
    """A masked-diffusion LM (or a causal LM seen through the same interface). Implements `Denoiser`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.aligner = LogitAligner(config.shift)
        self.use_flex_attention = False
        """Realise masks as flex_attention BlockMasks in uncached forwards (training on a GPU)."""
        self.model = Backbone(config)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def vocab_size(self) -> int:
        """See Denoiser."""
        return self.config.vocab_size

    @property
    def mask_id(self) -> int | None:
        """See Denoiser."""
        return self.config.mask_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """See Denoiser."""
        return self.config.eos_ids

    @property
    def max_length(self) -> int:
        """See Denoiser."""
        return self.config.max_length

    @property
    def attention(self) -> Attention:
        """See Denoiser."""
        return self.config.attention

    @property
    def block_size(self) -> int | None:
        """See Denoiser."""
        return self.config.block_size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.norm.weight.device

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        *,
        mask: MaskSpec,
        cache: CacheView | None = None,
        logits_at: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See Denoiser. The LM head runs on the rows of `logits_at` only.

        Raises:
            ValueError: a bool `logits_at` with a cache, or one that marks column 0 of a shifted model.
        """
        if cache is None:
            attend = window_attend(mask, positions, flex=self.use_flex_attention)
        else:
            attend = cached_attend(mask, positions, cache)
        hidden = self.model(ids, positions, attend)
        if cache is not None:
            cache.scatter_hidden(positions, hidden)
        return self.project(self._rows(hidden, positions, mask, cache, logits_at))

    def _rows(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        mask: MaskSpec,
        cache: CacheView | None,
        logits_at: torch.Tensor | None,
    ) -> torch.Tensor:
        if logits_at is None:
            return hidden
        if logits_at.dtype != torch.bool:
            first = None if cache is None else positions[:, :1]
            return self.aligner.gathered(hidden, logits_at, mask, cache=cache, first_column_B1=first)
        if cache is not None:
            raise ValueError("a bool logits_at marks fed columns; with a cache, give the columns themselves")
        return self.aligner.marked(hidden, logits_at, mask)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """The LM head: [..., H] -> [..., V]."""
        return F.linear(hidden, self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight)

    def new_cache(self, num_rows: int, capacity: int) -> KVCache:
        """See Denoiser."""
        config = self.config
        return KVCache(
            num_layers=config.num_layers,
            num_rows=num_rows,
            capacity=capacity,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            hidden_size=config.hidden_size,
            boundary=config.shift,
            dtype=self.model.norm.weight.dtype,
            device=self.device,
        )


@torch.no_grad()
def init_weights(model: DiffusionLM, *, seed: int, std: float = 0.02) -> None:
    """Draw every matrix from N(0, std^2); norms start at one and biases at zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
