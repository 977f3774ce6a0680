"""Tiny random networks, requests for them, and predictions of whole rows under masks built entry by entry.

Tests that compare tokens draw fixed examples (`derandomize`): two ways to compute one probability differ in the last
bit, so of very many fresh examples one would meet a tie with a threshold or with another token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from unmask.decoding.request import DecodeRequest
from unmask.masking.attention import Dense
from unmask.models import adapted, dream, llada
from unmask.models.transformer import DiffusionLM
from unmask.types import SamplingOptions

VOCAB = 41
MASK = 40
EOS = 39

LLADA = {
    "model_type": "llada", "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 48,
    "vocab_size": VOCAB, "embedding_size": VOCAB, "max_sequence_length": 256, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "mask_token_id": MASK, "eos_token_id": EOS, "block_type": "llama",
    "layer_norm_type": "rms", "activation_type": "silu", "include_bias": False, "weight_tying": False,
}  # fmt: skip
DREAM = {
    "model_type": "Dream", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": VOCAB, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "mask_token_id": MASK, "eos_token_id": EOS,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": VOCAB, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "eos_token_id": EOS, "tie_word_embeddings": True,
}  # fmt: skip

Allow = Callable[[int, int], bool]


def tiny(
    family: str, *, attention: str = "bidirectional", block_size: int | None = None, seed: int = 0, std: float = 0.3
) -> DiffusionLM:
    """A random float32 network: llada, dream, adapted (of Llama shape) or causal (a plain Llama).

    The wide initialisation spreads confidences over (0, 1), so that thresholds have something to decide.
    """
    section = {"unmask": {"attention": attention, "block_size": block_size, "mask_token_id": MASK}}
    if family == "llada":
        return llada.build(LLADA | section, seed=seed, std=std)
    if family == "dream":
        return dream.build(DREAM | section, seed=seed, std=std)
    return adapted.build(LLAMA | (section if family == "adapted" else {}), seed=seed, std=std)


def random_ids(num_rows: int, num_columns: int, seed: int = 0) -> torch.Tensor:
    """Ordinary tokens: neither mask nor EOS."""
    return torch.randint(0, EOS, (num_rows, num_columns), generator=torch.Generator().manual_seed(seed))


def request(
    prompt_len: int, max_tokens: int, *, seed: int = 0, temperature: float = 0.0, **options: object
) -> DecodeRequest:
    """A request whose prompt and id follow from its sizes and seed."""
    return DecodeRequest(
        request_id=f"{prompt_len}-{max_tokens}-{seed}-{temperature}",
        prompt_ids=tuple(random_ids(1, prompt_len, seed)[0].tolist()),
        options=SamplingOptions(max_tokens=max_tokens, seed=seed, temperature=temperature, **options),
    )


@torch.no_grad()
def raw_rows(network: DiffusionLM, tokens: list[int], allow: Allow) -> torch.Tensor:
    """Output rows [T, V] of one whole row under a mask built entry by entry."""
    size = len(tokens)
    dense = torch.tensor([[[allow(query, key) for key in range(size)] for query in range(size)]])
    ids, positions = torch.tensor([tokens]), torch.arange(size)[None]
    return network(ids, positions, mask=Dense(dense))[0].float()


def predictions(network: DiffusionLM, tokens: list[int], allow: Allow) -> torch.Tensor:
    """z [T, V]: row i predicts the token of column i, the mask token excluded. Row 0 is NaN with a shift."""
    rows = raw_rows(network, tokens, allow)
    if network.config.shift:
        rows = torch.cat((torch.full_like(rows[:1], torch.nan), rows[:-1]))
    rows[:, MASK] = -torch.inf
    return rows


def everything(query: int, key: int) -> bool:
    """Full attention."""
    return True


def causal(query: int, key: int) -> bool:
    """Causal attention."""
    return key <= query


def block_causal(prompt_len: int, block_size: int) -> Allow:
    """D2F's rule, written as the paper has it."""

    def block(column: int) -> int:
        return -1 if column < prompt_len else (column - prompt_len) // block_size

    def allow(query: int, key: int) -> bool:
        return key < prompt_len or (block(key) <= block(query) and block(query) >= 0)

    return allow
