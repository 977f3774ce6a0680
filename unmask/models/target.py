"""The frozen target seen from the training and evaluation side: logits, features, embedding and head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel

from unmask.errors import CheckpointError


class TargetModel:
    """A causal LM whose hidden states after chosen blocks condition a draft.

    Feature j is the residual stream after block `layer_ids[j]`, before any final norm (transformers'
    `hidden_states[id + 1]`; vLLM's auxiliary id `id + 1`).
    """

    def __init__(self, model: PreTrainedModel, layer_ids: Sequence[int]) -> None:
        self.model = model.eval().requires_grad_(False)
        self.layer_ids = tuple(layer_ids)
        blocks = self.blocks
        if max(self.layer_ids) >= len(blocks):
            raise CheckpointError(f"layer {max(self.layer_ids)} asked of a target with {len(blocks)} blocks")

    @classmethod
    def load(cls, path: str | Path, layer_ids: Sequence[int], dtype: torch.dtype = torch.float32) -> TargetModel:
        """Load a local HF directory; safetensors only, no remote code."""
        model = AutoModelForCausalLM.from_pretrained(
            Path(path), dtype=dtype, use_safetensors=True, local_files_only=True, attn_implementation="sdpa"
        )
        return cls(model, layer_ids)

    def to(self, device: torch.device | str) -> TargetModel:
        """Move the weights."""
        cast(nn.Module, self.model).to(device)
        return self

    @property
    def blocks(self) -> nn.ModuleList:
        """The target's decoder blocks."""
        return cast(nn.ModuleList, self.model.get_decoder().layers)

    @property
    def embedding(self) -> Tensor:
        """Token embedding table [V, H], shared with the draft."""
        return cast(nn.Embedding, self.model.get_input_embeddings()).weight

    @property
    def lm_head(self) -> Tensor:
        """LM head [V, H], shared with the draft."""
        return cast(nn.Linear, self.model.get_output_embeddings()).weight

    @property
    def device(self) -> torch.device:
        """Where the target's weights are."""
        return self.embedding.device

    def new_cache(self) -> DynamicCache:
        """An empty KV cache for `forward`."""
        return DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def forward(self, ids_BT: Tensor, cache: Cache | None = None) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V] and features [B, T, D * H] of the new rows; `cache` is extended in place."""
        with self._capture() as captured:
            logits = self.model(ids_BT, past_key_values=cache, use_cache=cache is not None).logits
        return logits, torch.cat(captured, dim=-1)

    @torch.no_grad()
    def features(self, ids_BT: Tensor, attention_mask_BT: Tensor | None = None, *, final: bool = False) -> Tensor:
        """Features [B, T, D * H] of whole sequences, right-padded; the LM head is not run.

        With `final`, the states that the LM head would be given follow: [B, T, D * H + H].
        """
        with self._capture() as captured:
            last = self.model.get_decoder()(ids_BT, attention_mask=attention_mask_BT, use_cache=False)[0]
        return torch.cat([*captured, last] if final else captured, dim=-1)

    @contextmanager
    def _capture(self) -> Iterator[list[Tensor]]:
        """Collect block outputs by hooks: they see the residual stream itself, whatever a model reports."""
        captured: list[Tensor] = []

        def keep(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            captured.append(output if isinstance(output, Tensor) else output[0])

        blocks = self.blocks
        handles = [blocks[i].register_forward_hook(keep) for i in self.layer_ids]
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()


def crop(cache: DynamicCache, num_rows: int) -> None:
    """Remove the newest `num_rows` positions from a cache."""
    if num_rows:
        cache.crop(-num_rows)
