"""Drafts in z-lab's and speculators' layouts, and pairings refused by name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.draft_tools import record, tiny_pair
from unmask.checkpoints import CONFIDENCE, check_pairing, load_confidence, load_draft, read_config, save_draft
from unmask.errors import CheckpointError, PairingError
from unmask.objectives.confidence import ConfidenceHead
from unmask.targets import describe_target

GOLDEN_SPECULATORS = {
    "architectures": ["DFlashDraftModel"],
    "speculators_model_type": "dflash",
    "draft_vocab_size": 48,
    "block_size": 4,
    "aux_hidden_state_layer_ids": [2, 3, 5],
    "mask_token_id": 1,
    "sample_from_anchor": False,
    "sliding_window_non_causal": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "num_target_layers": 7,
    "speculators_config": {
        "algorithm": "dflash",
        "default_proposal_method": "greedy",
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
        "verifier": {"name_or_path": "of/target", "architectures": []},
    },
}


@pytest.mark.parametrize("form", ["zlab", "speculators"])
def test_round_trip_is_exact(tmp_path: Path, form: str) -> None:
    draft = tiny_pair()[1]
    save_draft(draft, tmp_path / "a", record(), dtype=torch.float32, form=form)  # type: ignore[arg-type]
    loaded = load_draft(tmp_path / "a")
    assert loaded.config == draft.config
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in draft.state_dict().items())
    assert read_config(tmp_path / "a")[1] == record()
    # There and back through the other layout: not a byte differs.
    other = "zlab" if form == "speculators" else "speculators"
    save_draft(loaded, tmp_path / "b", record(), dtype=torch.float32, form=other)  # type: ignore[arg-type]
    save_draft(load_draft(tmp_path / "b"), tmp_path / "c", record(), dtype=torch.float32, form=form)  # type: ignore[arg-type]
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


def test_speculators_layout_is_theirs(tmp_path: Path) -> None:
    save_draft(tiny_pair()[1], tmp_path / "draft", record(), form="speculators", verifier="of/target")
    tree = json.loads((tmp_path / "draft" / "config.json").read_text())
    layers = tree.pop("transformer_layer_config")
    assert tree.pop("unmask_target")["trained_layer_ids"] == [1, 2, 4]
    assert tree == GOLDEN_SPECULATORS
    assert (layers["model_type"], layers["hidden_size"], layers["num_hidden_layers"]) == ("qwen3", 32, 2)
    assert "dflash_config" not in layers


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"speculators_model_type": "eagle3"}, "speculators_model_type"),
        ({"draft_vocab_size": 8}, "draft_vocab_size"),
        ({"aux_hidden_state_layer_ids": None}, "aux_hidden_state_layer_ids"),
        ({"sample_from_anchor": True}, "sample_from_anchor"),
    ],
)
def test_other_speculators_are_refused_by_name(tmp_path: Path, change: dict, field: str) -> None:
    save_draft(tiny_pair()[1], tmp_path / "draft", record(), form="speculators")
    file = tmp_path / "draft" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=field):
        read_config(tmp_path / "draft")


@pytest.mark.parametrize("form", ["zlab", "speculators"])
def test_layer_ids_off_by_one_are_refused_by_name(tmp_path: Path, form: str) -> None:
    save_draft(tiny_pair()[1], tmp_path / "draft", record(), form=form)  # type: ignore[arg-type]
    check_pairing(tmp_path / "draft", record())
    file = tmp_path / "draft" / "config.json"
    tree = json.loads(file.read_text())
    holder, key = (
        (tree["dflash_config"], "target_layer_ids") if form == "zlab" else (tree, "aux_hidden_state_layer_ids")
    )
    holder[key] = [i + 1 for i in holder[key]]
    file.write_text(json.dumps(tree))
    with pytest.raises(PairingError, match="target_layer_ids"):
        check_pairing(tmp_path / "draft", record())


@pytest.mark.parametrize(("change", "field"), [("template", "chat_template_hash"), ("tokenizer", "tokenizer_hash")])
def test_another_template_or_tokenizer_is_refused_by_name(
    tmp_path: Path, light_target: Path, change: str, field: str
) -> None:
    before = describe_target(light_target)
    draft = tiny_pair()[1]
    sizes = {name: getattr(before, name) for name in ("revision", "tokenizer_hash", "chat_template_hash")}
    save_draft(draft, tmp_path / "draft", record(**sizes))
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in light_target.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    if change == "template":
        for name in ("chat_template.jinja", "tokenizer_config.json"):
            text = (changed / name).read_text()
            (changed / name).write_text(text.replace("<|im_start|>", "<|im_start|> "))
    else:
        tree = json.loads((changed / "tokenizer.json").read_text())
        vocabulary = tree["model"]["vocab"]
        names = sorted(vocabulary, key=vocabulary.__getitem__)
        names[-1], names[-2] = names[-2], names[-1]
        tree["model"]["vocab"] = {name: i for i, name in enumerate(names)}
        (changed / "tokenizer.json").write_text(json.dumps(tree))
    after = describe_target(changed)
    theirs = {name: getattr(after, name) for name in sizes} | {"revision": sizes["revision"]}
    with pytest.raises(PairingError, match=field):
        check_pairing(tmp_path / "draft", record(**theirs))


def test_a_confidence_head_lies_where_loaders_of_drafts_do_not_look(tmp_path: Path) -> None:
    draft, head = tiny_pair()[1], ConfidenceHead(32, 3)
    torch.nn.init.normal_(head.weight)
    save_draft(draft, tmp_path / "plain", record())
    save_draft(draft, tmp_path / "both", record(), confidence=head)
    digests = [hashlib.sha256((tmp_path / d / "model.safetensors").read_bytes()).digest() for d in ("plain", "both")]
    assert digests[0] == digests[1]
    assert [p.name for p in (tmp_path / "both").glob("*.safetensors")] == ["model.safetensors"]
    assert set(load_file(tmp_path / "both" / CONFIDENCE)) == {"weight", "bias"}
    loaded = load_confidence(tmp_path / "both")
    assert loaded is not None
    assert torch.equal(loaded.weight, head.weight)
    assert loaded.temperature is None
    for temperature in (0.0, 0.7):
        save_draft(draft, tmp_path / "tempered", record(), confidence=ConfidenceHead(32, 3, temperature))
        tempered = load_confidence(tmp_path / "tempered")
        assert tempered is not None
        assert tempered.temperature == temperature
    assert load_confidence(tmp_path / "plain") is None
    for tensors in ({"weight": torch.ones(3)}, {"weight": torch.ones(3), "bias": torch.ones(2), "more": torch.ones(1)}):
        save_file(tensors, tmp_path / "both" / CONFIDENCE)
        with pytest.raises(CheckpointError, match="is damaged"):
            load_confidence(tmp_path / "both")
    tensors = {"weight": torch.ones(3), "bias": torch.ones(2)}
    save_file(tensors, tmp_path / "both" / CONFIDENCE, {"trained_at_temperature": "hot"})
    with pytest.raises(CheckpointError, match="is damaged"):
        load_confidence(tmp_path / "both")
