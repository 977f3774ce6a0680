"""Drafts as `speculators` itself writes them: files that know nothing of us."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.draft_tools import VOCAB, record, tiny_pair
from tests.speculators_tools import speculators_config
from unmask.checkpoints import check_pairing, load_draft, read_config
from unmask.errors import CheckpointError, PairingError
from unmask.models.dflash import DFlashDraft

TABLE = torch.full((VOCAB, 32), torch.nan)
STORED_TOO = {
    "nothing": {},
    "the tables of the target": {"embed_tokens.weight": TABLE, "lm_head.weight": TABLE.clone()},
    "what training has of the target": {"verifier_lm_head.weight": TABLE, "verifier_norm.weight": torch.ones(32)},
    "maps between equal vocabularies": {
        "d2t": torch.zeros(VOCAB, dtype=torch.int64),
        "t2d": torch.ones(VOCAB, dtype=torch.bool),
    },
}


def written(path: Path, more: dict[str, Tensor], **changes: object) -> DFlashDraft:
    """Write a draft as they do; the draft."""
    draft = tiny_pair()[1]
    path.mkdir()
    (path / "config.json").write_text(json.dumps(speculators_config(draft.config) | changes))
    save_file(draft.state_dict() | more, path / "model.safetensors", {"format": "pt"})
    return draft


@pytest.mark.parametrize("more", STORED_TOO.values(), ids=STORED_TOO)
def test_their_draft_is_read_for_a_known_target(tmp_path: Path, more: dict[str, Tensor]) -> None:
    draft = written(tmp_path / "draft", more)
    loaded = load_draft(tmp_path / "draft", target=record())
    assert loaded.config == draft.config
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in draft.state_dict().items())
    assert check_pairing(tmp_path / "draft", record(), adopt=True) == draft.config


def test_their_draft_does_not_know_its_target(tmp_path: Path) -> None:
    written(tmp_path / "draft", {})
    for read in (read_config, load_draft):
        with pytest.raises(CheckpointError, match=r"^num_target_layers: missing .* publish\.adopt=true$"):
            read(tmp_path / "draft")
    with pytest.raises(PairingError, match=r"publish\.adopt=true"):
        check_pairing(tmp_path / "draft", record())
    with pytest.raises(PairingError, match="hidden_size: the draft was made for 32, the target has 64"):
        check_pairing(tmp_path / "draft", record(hidden_size=64), adopt=True)
    # Layer ids that such a target does not have.
    with pytest.raises(CheckpointError, match="target_layer_ids"):
        check_pairing(tmp_path / "draft", record(num_layers=3), adopt=True)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"draft_vocab_size": 8}, "draft_vocab_size"),
        ({"target_hidden_size": 64}, "target_hidden_size"),
        ({"mask_token_id": None}, "mask_token_id"),
        ({"sample_from_anchor": True}, "sample_from_anchor"),
        ({"transformer_layer_config": {"hidden_size": 32}}, "vocab_size"),
        ({"transformer_layer_config": {"hidden_size": 32, "vocab_size": 48}}, "head_dim"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, changes: dict, field: str) -> None:
    written(tmp_path / "draft", {}, **changes)
    with pytest.raises(CheckpointError, match=f"^{field}:"):
        load_draft(tmp_path / "draft", target=record())


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"d2t": torch.ones(VOCAB, dtype=torch.int64)}, "^d2t:"),
        ({"t2d": torch.ones(8, dtype=torch.bool)}, "^t2d:"),
        ({"lm_head.weight": TABLE[:8].clone()}, r"^lm_head\.weight:"),
        ({"selector.weight": torch.ones(3)}, r"not a DFlash draft's: selector\.weight"),
    ],
)
def test_tensors_of_other_drafts_are_refused_by_name(tmp_path: Path, more: dict[str, Tensor], field: str) -> None:
    written(tmp_path / "draft", more)
    with pytest.raises(CheckpointError, match=field):
        load_draft(tmp_path / "draft", target=record())
