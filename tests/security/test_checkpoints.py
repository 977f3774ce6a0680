"""Checkpoints of strangers: pickled weights and modelling code are never run, whoever loads them."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from unmask.checkpoints import load_draft
from unmask.errors import UserError
from unmask.models import families
from unmask.targets import describe_target, resolve_target

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 32, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "eos_token_id": 2, "hidden_act": "silu",
}  # fmt: skip


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def bomb(tmp_path: Path) -> Path:
    """A checkpoint directory whose weights are pickled and whose config names code of its own."""
    directory = tmp_path / "bomb"
    directory.mkdir()
    canary = tmp_path / "canary"
    for name in ("pytorch_model.bin", "model.pt", "weights.pkl"):
        (directory / name).write_bytes(pickle.dumps(Bomb(canary)))
    code = f"open({str(canary)!r}, 'w').close()\n"
    (directory / "modeling_evil.py").write_text(code)
    (directory / "configuration_evil.py").write_text(code)
    auto = {"AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilModel"}
    (directory / "config.json").write_text(json.dumps(LLAMA | {"auto_map": auto}))
    return directory


def test_the_bomb_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "canary")))  # noqa: S301
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "load",
    [families.load, load_draft, lambda d: describe_target(resolve_target(str(d), None))],
    ids=["lm", "draft", "target"],
)
def test_no_loader_sets_it_off(load: Callable[[Path], object], bomb: Path, tmp_path: Path) -> None:
    with pytest.raises((UserError, OSError)):
        load(bomb)
    assert not (tmp_path / "canary").exists()


def test_an_unknown_model_type_with_code_of_its_own_is_refused(bomb: Path, tmp_path: Path) -> None:
    config = json.loads((bomb / "config.json").read_text()) | {"model_type": "evil"}
    (bomb / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="model_type"):
        families.load(bomb)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/b", "a\0b", "%2e%2e", "", "..", "a b"])
def test_published_names_stay_inside_their_folder(name: str) -> None:
    from unmask.config import PublishConfig

    with pytest.raises(UserError):
        PublishConfig(name=name)
