"""Many responses of a small Llama at once on one GPU: a fixed batch, a preallocated cache, one CUDA graph a step.

For benchmarks that need a million tokens of a 135M model in seconds; pipelines generate with vLLM. Prompts are padded
on the left, so that all rows write the same column. Dimension letters: B rows, C columns, N heads, M key heads, d head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Response:
    """A prompt and what the model said. `beyond` goes on behind the end, as a verification would see it."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    beyond: tuple[int, ...]


class BatchedLlama:
    """Sampling from a transformers Llama with all rows in step.

    Args:
        rows: B; shorter batches are filled up.
        prompt_columns: longest prompt.
        max_new_tokens: longest response.
        beyond: tokens generated behind the end.
    """

    def __init__(
        self, model: Any, *, rows: int, prompt_columns: int, max_new_tokens: int, beyond: int, eos_id: int
    ) -> None:
        config = model.config
        self.model, self.rows, self.prompt_columns, self.eos_id = model, rows, prompt_columns, eos_id
        self.max_new_tokens, self.beyond = max_new_tokens, beyond
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.eps = config.rms_norm_eps
        weight = model.lm_head.weight
        self.device = weight.device
        columns = -(-(prompt_columns + max_new_tokens + beyond) // 8) * 8
        head_dim = config.hidden_size // self.heads
        cache = (config.num_hidden_layers, rows, self.key_heads, columns, head_dim)
        self.keys, self.values = weight.new_zeros(cache), weight.new_zeros(cache)
        self.bias = weight.new_zeros(rows, 1, 1, columns)
        positions = torch.arange(columns, device=self.device)[None]
        self.cos, self.sin = (t[0] for t in model.model.rotary_emb(weight, positions))
        self.token = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.position = torch.zeros_like(self.token)
        self.column = torch.zeros(1, dtype=torch.long, device=self.device)
        self.out = torch.zeros(rows, max_new_tokens + beyond, dtype=torch.long, device=self.device)
        self.temperature = torch.zeros((), device=self.device)
        self.fused = [
            (
                torch.cat(
                    [layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight]
                ),
                torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]),
            )
            for layer in model.model.layers
        ]
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], temperature: float, longest: int | None = None
    ) -> list[Response]:
        """One response a prompt, at most B prompts; where a longest is given, the end of longer ones is of no use."""
        self._prefill(prompts)
        self.temperature.fill_(temperature)
        if self.device.type == "cuda" and self.graph is None:
            self._capture()
            self._prefill(prompts)
        steps = self.out.shape[1] if longest is None else min(longest + self.beyond, self.out.shape[1])
        ended = torch.zeros(self.rows, dtype=torch.bool, device=self.device)
        taken = 0
        while taken < steps:
            count = min(32, steps - taken)
            for _ in range(count):
                if self.graph is not None:
                    self.graph.replay()
                else:
                    self._step()
            taken += count
            ended |= (self.out[:, : max(taken - self.beyond, 0)] == self.eos_id).any(-1)
            if bool(ended[: len(prompts)].all()):
                break
        return [self._response(p, o) for p, o in zip(prompts, self.out[: len(prompts)].tolist(), strict=True)]

    def _response(self, prompt: Sequence[int], out: list[int]) -> Response:
        length = out.index(self.eos_id) + 1 if self.eos_id in out[: self.max_new_tokens] else self.max_new_tokens
        return Response(tuple(prompt), tuple(out[:length]), tuple(out[length : length + self.beyond]))

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Keys and values of all prompts but their last tokens, which the first step is given."""
        width = self.prompt_columns
        ids = torch.zeros(self.rows, width, dtype=torch.long)
        lengths = torch.ones(self.rows, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            lengths[row] = len(prompt)
        ids, lengths = ids.to(self.device), lengths.to(self.device)
        columns = torch.arange(self.bias.shape[-1], device=self.device)
        known = (columns >= width - lengths[:, None]) & (columns < width - 1)
        self.bias.copy_(torch.zeros_like(self.bias).masked_fill_(~known[:, None, None], -torch.inf))
        self.out.zero_()
        for start in range(0, self.rows, 128):
            part = slice(start, start + 128)
            self._fill(part, ids[part], lengths[part])
        self.token.copy_(ids[:, -1])
        self.position.copy_(lengths - 1)
        self.column.fill_(width - 1)

    def _fill(self, part: slice, ids_BT: Tensor, lengths_B: Tensor) -> None:
        width = ids_BT.shape[1]
        columns = torch.arange(width, device=self.device)
        mask = columns >= width - lengths_B[:, None]
        positions = (columns - (width - lengths_B)[:, None]).clamp(min=0)
        cache = self.model(
            ids_BT, attention_mask=mask.long(), position_ids=positions, use_cache=True, logits_to_keep=1
        ).past_key_values
        for index, layer in enumerate(cache.layers):
            self.keys[index, part, :, :width] = layer.keys
            self.values[index, part, :, :width] = layer.values

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()

    def _step(self) -> None:
        """One token of every row: reads and writes the buffers of this object alone."""
        self.bias.index_fill_(-1, self.column, 0.0)
        x = F.embedding(self.token, self.model.model.embed_tokens.weight)
        cos, sin = self.cos[self.position][:, None], self.sin[self.position][:, None]
        for index, (layer, (qkv, gate_up)) in enumerate(zip(self.model.model.layers, self.fused, strict=True)):
            heads = F.linear(self._norm(x, layer.input_layernorm), qkv).unflatten(-1, (-1, self.keys.shape[-1]))
            rotated = _rotate(heads[:, : self.heads + self.key_heads], cos, sin)
            queries, keys = rotated.split([self.heads, self.key_heads], dim=1)
            self.keys[index].index_copy_(2, self.column, keys[:, :, None])
            self.values[index].index_copy_(2, self.column, heads[:, self.heads + self.key_heads :, None])
            # Query heads that share a key head are rows of one small product: keys are read once.
            groups = queries.unflatten(1, (self.key_heads, -1))
            bias = self.bias.expand(-1, self.key_heads, groups.shape[2], -1)
            attended = F.scaled_dot_product_attention(groups, self.keys[index], self.values[index], attn_mask=bias)
            x = x + F.linear(attended.flatten(1), layer.self_attn.o_proj.weight)
            gate, up = F.linear(self._norm(x, layer.post_attention_layernorm), gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer.mlp.down_proj.weight)
        logits = F.linear(self._norm(x, self.model.model.norm), self.model.lm_head.weight).float()
        # Gumbel-max: at temperature 0 the noise is multiplied away.
        noise = -torch.empty_like(logits).exponential_().log()
        self.token.copy_((logits + self.temperature * noise).argmax(-1))
        self.out.index_copy_(1, self.column - (self.prompt_columns - 1), self.token[:, None])
        self.position.add_(1)
        self.column.add_(1)

    def _norm(self, x: Tensor, norm: Any) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), norm.weight, self.eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def repetitive(tokens: Sequence[int]) -> bool:
    """Whether more than 30 % of a response's 4-grams occurred before in it."""
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return bool(grams) and 1 - len(set(grams)) / len(grams) > 0.3
