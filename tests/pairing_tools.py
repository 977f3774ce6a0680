"""Small pairings for tests: a random draft, its vocabulary, and the slow obvious way to draft."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.models.dflash import DFlashConfig, DFlashDraft
from unmask.pairing.client import DraftLink
from unmask.pairing.hello import TargetShape
from unmask.types import ProposalRow

HIDDEN = 32
VOCAB = 97
LAYER_IDS = (1, 3)
BLOCK_SIZE = 6
SECRET = b"0123456789abcdef0123456789abcdef"
SHAPE = TargetShape(hidden_size=HIDDEN, vocab_size=VOCAB, layer_ids=LAYER_IDS)


def tiny_draft(seed: int = 0, **changes: object) -> DFlashDraft:
    """A draft of two small random layers in float32."""
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "block_size": BLOCK_SIZE,
        "mask_token_id": 96,
        "num_target_layers": 6,
        "target_layer_ids": LAYER_IDS,
    }
    generator = torch.Generator().manual_seed(seed)
    draft = DFlashDraft(DFlashConfig(**(sizes | changes)))
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return draft.eval().requires_grad_(False)


def tiny_vocabulary(seed: int = 1) -> Tensor:
    """A token table [V, H] that serves as embedding and head."""
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(seed))


def raw_features(num_rows: int, seed: int) -> Tensor:
    """Hidden states [num_rows, D * H] of an imagined target."""
    return torch.randn(num_rows, len(LAYER_IDS) * HIDDEN, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def reference_block(
    draft: DFlashDraft,
    vocabulary: Tensor,
    raw: Tensor,
    last_token: int,
    k: int,
    positions: Tensor | None = None,
) -> list[int]:
    """Draft one block of one request from all of its raw features, with no cache and no padding.

    `positions` [T] are given where features are missing; the anchor follows the last.
    """
    hidden = reference_states(draft, vocabulary, raw, last_token, k, positions)
    return (hidden @ vocabulary.T).argmax(-1).tolist()


def reference_states(
    draft: DFlashDraft,
    vocabulary: Tensor,
    raw: Tensor,
    last_token: int,
    k: int,
    positions: Tensor | None = None,
) -> Tensor:
    """Final states [K, H] of such a block."""
    positions = torch.arange(len(raw)) if positions is None else positions
    keys, values = draft.context_kv(draft.project_features(raw), positions)
    length, anchor = len(raw), int(positions[-1]) + 1
    ids = torch.tensor([last_token] + [draft.config.mask_token_id] * k)
    x_BQH = F.embedding(ids, vocabulary)[None]
    positions_BQ = torch.arange(anchor, anchor + k + 1)[None]
    mask = torch.ones(1, 1, k + 1, length + k + 1, dtype=torch.bool)
    return draft(x_BQH, positions_BQ, keys[:, None], values[:, None], mask)[0, 1:]


def row(request: int, start: int, num_features: int, last_token: int = 1) -> ProposalRow:
    """A `ProposalRow` by position."""
    return ProposalRow(request=request, start=start, num_features=num_features, last_token=last_token)


def eventually(condition: Callable[[], object], within_s: float = 10.0) -> None:
    """Wait until a condition holds, or fail."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


def assert_proposes(
    link: DraftLink, vocabulary: Tensor, draft: DFlashDraft | None = None, request: int = 1, k: int = BLOCK_SIZE - 1
) -> None:
    """A request that starts now gets the block of the reference."""
    raw = raw_features(9, seed=request)
    expected = reference_block(draft or tiny_draft(), vocabulary, raw, 1, k)
    assert link.propose([row(request, 0, 9)], raw) == [expected]
