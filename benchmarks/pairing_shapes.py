"""Targets and drafts by shape: configurations without weights, and drafts with random ones."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from unmask.checkpoints import save_draft
from unmask.models.dflash import DFlashConfig, DFlashDraft, spread_layer_ids

K = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a target, and of the draft for it."""

    name: str
    model_type: str
    architecture: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    draft_layers: int
    features: int
    tied: bool
    """Whether the target's head is its embedding."""
    max_positions: int = 4096

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """Layers that the draft reads."""
        return spread_layer_ids(self.layers, self.features)

    def draft(self) -> DFlashConfig:
        """The draft's configuration."""
        return DFlashConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.draft_layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_positions,
            block_size=K + 1,
            mask_token_id=self.vocab_size - 1,
            num_target_layers=self.layers,
            target_layer_ids=self.layer_ids,
        )


_LLAMA = {"model_type": "llama", "architecture": "LlamaForCausalLM"}
SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="qwen3-8b", model_type="qwen3", architecture="Qwen3ForCausalLM", hidden=4096, intermediate=12288,
            layers=36, heads=32, kv_heads=8, head_dim=128, vocab_size=151936, draft_layers=5, features=5, tied=False,
        ),
        Shape(
            name="smollm2-135m", **_LLAMA, hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, head_dim=64,
            vocab_size=49152, draft_layers=2, features=3, tied=True,
        ),
        Shape(
            name="tiny", **_LLAMA, hidden=128, intermediate=256, layers=6, heads=2, kv_heads=1, head_dim=64,
            vocab_size=4096, draft_layers=2, features=2, tied=True,
        ),
    )
}  # fmt: skip
SHAPES["qwen3-8b-20k"] = replace(SHAPES["qwen3-8b"], name="qwen3-8b-20k", max_positions=20480)
SHAPES["tiny-1k"] = replace(SHAPES["tiny"], name="tiny-1k", max_positions=1024)


@contextmanager
def shape_folder(name: str, tiny: bool) -> Iterator[Path]:
    """A folder with a shape's configurations, and with weights if it is tiny, for as long as it is needed."""
    # Pages of files outside shared memory cannot be pinned everywhere.
    with tempfile.TemporaryDirectory(dir=None if tiny else "/dev/shm") as folder:  # noqa: S108
        write_shape(SHAPES[name], Path(folder))
        if tiny:
            write_weights(SHAPES[name], Path(folder))
        yield Path(folder)


def write_shape(shape: Shape, folder: Path) -> None:
    """Configurations of target and draft as vLLM reads them, in `target` and `draft`."""
    common: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }
    target = {
        "architectures": [shape.architecture],
        "model_type": shape.model_type,
        "num_hidden_layers": shape.layers,
        "tie_word_embeddings": shape.tied,
    }
    draft = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "num_hidden_layers": shape.draft_layers,
        "num_target_layers": shape.layers,
        "block_size": K + 1,
        "tie_word_embeddings": False,
        "dflash_config": {"target_layer_ids": list(shape.layer_ids), "mask_token_id": shape.vocab_size - 1},
    }
    for name, own in (("target", target), ("draft", draft)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(common | own))


def write_weights(shape: Shape, folder: Path) -> None:
    """Random weights for both: vLLM's DFlash draft does not take dummy ones on a CPU."""
    target = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "target"), dtype=torch.float32)
    target.save_pretrained(folder / "target")
    shutil.rmtree(folder / "draft")
    save_draft(DFlashDraft(shape.draft()), folder / "draft", None, dtype=torch.float32)
