"""Draft directories: the published layout, atomic, refused by name when they do not fit."""

import json
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.draft_tools import record, tiny_pair
from unmask.checkpoints import WEIGHTS, check_pairing, load_draft, read_config, save_draft
from unmask.errors import CheckpointError, PairingError
from unmask.files import verify_directory


@pytest.fixture
def saved(tmp_path):
    _, draft = tiny_pair()
    path = tmp_path / "draft"
    save_draft(draft, path, record(), dtype=torch.float32)
    return draft, path


def test_a_draft_comes_back_as_it_was(saved):
    draft, path = saved
    loaded = load_draft(path)
    assert loaded.config == draft.config
    for name, tensor in draft.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert read_config(path)[1] == record()
    assert verify_directory(path)


def test_tensor_names_are_those_of_published_drafts(saved):
    _, path = saved
    layer = ["input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    layer += [f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    expected = {"fc.weight", "hidden_norm.weight", "norm.weight"}
    expected |= {f"layers.{i}.{n}.weight" for i in range(2) for n in layer}
    assert set(load_file(path / WEIGHTS)) == expected
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["model_type"] == "qwen3"
    assert config["block_size"] == config["dflash_config"]["block_size"] == 4
    assert config["dflash_config"]["mask_token_id"] == 1
    assert config["dflash_config"]["target_layer_ids"] == [1, 2, 4]


def test_a_published_draft_without_our_keys_loads(saved):
    """Older files: rope_theta and rope_scaling at the top, block size there too, tensors under `model.`."""
    draft, path = saved
    config = json.loads((path / "config.json").read_text())
    for key in ("unmask_target", "rope_parameters"):
        del config[key]
    del config["dflash_config"]["block_size"]
    config["rope_theta"] = 10000.0
    config["rope_scaling"] = None
    (path / "config.json").write_text(json.dumps(config))
    save_file({f"model.{n}": t for n, t in load_file(path / WEIGHTS).items()}, path / WEIGHTS)
    loaded = load_draft(path)
    assert torch.equal(loaded.fc.weight, draft.fc.weight)
    assert torch.allclose(loaded.rotary_emb.inv_freq, draft.rotary_emb.inv_freq)
    with pytest.raises(PairingError, match="adopt"):
        check_pairing(path, record())


@pytest.mark.parametrize(
    "field", ["revision", "tokenizer_hash", "chat_template_hash", "vocab_size", "hidden_size", "num_layers"]
)
def test_another_target_is_refused_by_name(saved, field):
    _, path = saved
    check_pairing(path, record())
    changed = record(**{field: 99 if isinstance(getattr(record(), field), int) else "sha256:other"})
    with pytest.raises(PairingError, match=field if field != "num_layers" else "num_target_layers"):
        check_pairing(path, changed)


def test_damage_is_found(saved):
    _, path = saved
    weights = load_file(path / WEIGHTS)
    save_file({n: t for n, t in weights.items() if n != "norm.weight"}, path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        load_draft(path)
    save_file(weights | {"lm_head.weight": torch.zeros(2)}, path / WEIGHTS)
    with pytest.raises(CheckpointError, match="lm_head"):
        load_draft(path)
    (path / WEIGHTS).write_bytes(b"\x00" * 40)
    with pytest.raises(CheckpointError, match="damaged"):
        load_draft(path)
    (path / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="safetensors only"):
        load_draft(path)
    (path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_draft(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["sliding_attention"]}, "sliding"),
        ({"sample_from_anchor": True}, "sample_from_anchor"),
        ({"dflash_config": {"target_layer_ids": [1, 2, 4]}}, "mask_token_id"),
    ],
)
def test_kinds_that_would_be_read_wrongly_are_refused(saved, change, message):
    _, path = saved
    config = json.loads((path / "config.json").read_text()) | change
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_draft(path)


def test_a_failed_save_leaves_the_old_draft(saved):
    draft, path = saved
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_draft(draft, path, record(revision="new"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert verify_directory(path)
    assert read_config(path)[1] == record()
    assert [p.name for p in path.parent.iterdir()] == ["draft"]
