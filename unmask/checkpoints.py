"""DFlash checkpoints on disk: z-lab's or speculators' layout, safetensors only, written atomically.

A draft saved here loads unchanged in vLLM's `dflash` method, and a published draft of either kind loads here. Beside
the loader's keys, `config.json` holds the record of the target that the draft was trained for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from unmask.errors import CheckpointError, PairingError
from unmask.files import atomic_directory
from unmask.models.dflash import DFlashConfig, DFlashDraft
from unmask.objectives.confidence import ConfidenceHead
from unmask.speculators_format import from_speculators, is_speculators, own_tensors, to_speculators
from unmask.tensor_files import save_tensors
from unmask.types import TargetRecord

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIDENCE = "confidence/head.safetensors"
RECORD = "unmask_target"
_TEMPERATURE = "trained_at_temperature"
"""Key of the head's file: see `ConfidenceHead`."""
TRAINED_ON = "trained_layer_ids"
"""Key of the record that repeats the layer ids: a draft read with others would be served the wrong features."""


def config_to_json(config: DFlashConfig, target: TargetRecord | None) -> dict[str, Any]:
    """The `config.json` of a draft: every key that z-lab's, vLLM's and SGLang's loaders read."""
    own = {"block_size", "mask_token_id", "target_layer_ids", "rope_parameters"}
    sizes = {k: v for k, v in dataclasses.asdict(config).items() if k not in own}
    tree: dict[str, Any] = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        **sizes,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "sliding_window": None,
        "rope_parameters": config.rope_parameters,
        "rope_theta": config.rope_parameters.get("rope_theta", 10000.0),
        "torch_dtype": "bfloat16",
        "block_size": config.block_size,
        "dflash_config": {
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": list(config.target_layer_ids),
            "block_size": config.block_size,
        },
    }
    if target is not None:
        tree[RECORD] = dataclasses.asdict(target) | {TRAINED_ON: list(config.target_layer_ids)}
    return tree


def config_from_json(
    tree: dict[str, Any], target: TargetRecord | None = None
) -> tuple[DFlashConfig, TargetRecord | None]:
    """Read a draft's `config.json`, z-lab's or speculators'.

    Args:
        target: whose number of layers counts where the file does not say it; speculators' own never do.

    Raises:
        CheckpointError: a missing or unsupported key (named).
        PairingError: layer ids other than those trained on.
    """
    if is_speculators(tree):
        tree = from_speculators(tree, record_key=RECORD)
    dflash = tree.get("dflash_config") or {}
    if "sliding_attention" in (tree.get("layer_types") or []):
        raise CheckpointError("sliding-window draft layers are not supported", field="layer_types")
    if tree.get("sample_from_anchor"):
        raise CheckpointError(
            "this draft predicts one token to the right of each row (DSpark type), not a DFlash draft",
            field="sample_from_anchor",
        )
    rope = tree.get("rope_parameters") or {"rope_type": "default", **(tree.get("rope_scaling") or {})}
    merged: dict[str, Any] = {
        **tree,
        "rope_parameters": {"rope_theta": tree.get("rope_theta", 10000.0), **rope},
        "block_size": tree.get("block_size", dflash.get("block_size")),
        "mask_token_id": dflash.get("mask_token_id"),
        "target_layer_ids": tuple(dflash.get("target_layer_ids") or ()),
    }
    if merged.get("num_target_layers") is None and target is not None:
        merged["num_target_layers"] = target.num_layers
    names = {f.name for f in dataclasses.fields(DFlashConfig)}
    missing = sorted(n for n in names - {"rms_norm_eps"} if merged.get(n) is None)
    if missing:
        known = "; publish it for its target with publish.adopt=true" if missing == ["num_target_layers"] else ""
        raise CheckpointError(f"missing from the draft's config.json{known}", field=missing[0])
    config = DFlashConfig(**{n: merged[n] for n in names if n in merged})
    record = dict(tree.get(RECORD) or {})
    trained_on = tuple(record.pop(TRAINED_ON, config.target_layer_ids))
    if trained_on != config.target_layer_ids:
        raise PairingError(
            f"the draft was trained on the target's layers {list(trained_on)}, its config.json asks for "
            f"{list(config.target_layer_ids)}; restore them",
            field="dflash_config.target_layer_ids",
        )
    return config, TargetRecord(**record) if record else None


def save_draft(
    draft: DFlashDraft,
    path: Path,
    target: TargetRecord | None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    texts: Mapping[str, str] | None = None,
    form: Literal["zlab", "speculators"] = "zlab",
    verifier: str | None = None,
    confidence: ConfidenceHead | None = None,
) -> None:
    """Write a draft directory atomically; an existing one is replaced.

    Args:
        target: the record of the target that it was trained for.
        texts: more text files by name, such as the model card.
        form: whose layout `config.json` has; the weights are the same.
        verifier: directory or hub id of the target, for speculators' layout.
        confidence: its confidence head, kept in a folder of its own, where no loader of drafts looks for weights.
    """
    config = config_to_json(draft.config, target)
    if form == "speculators":
        config = to_speculators(config, record_key=RECORD, verifier=verifier)
    with atomic_directory(path) as partial:
        weights = {name: t.detach().to("cpu", dtype).contiguous() for name, t in draft.state_dict().items()}
        save_tensors(weights, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if confidence is not None:
            (partial / CONFIDENCE).parent.mkdir()
            head = {name: t.detach().float().cpu().contiguous() for name, t in confidence.state_dict().items()}
            known = confidence.temperature is not None
            save_tensors(head, partial / CONFIDENCE, {_TEMPERATURE: repr(confidence.temperature)} if known else None)
        for name, text in (texts or {}).items():
            (partial / name).write_text(text)


def load_draft(
    path: str | Path, dtype: torch.dtype = torch.float32, *, target: TargetRecord | None = None
) -> DFlashDraft:
    """Load a draft directory: ours, z-lab's or speculators'.

    Args:
        target: see `config_from_json`.

    Raises:
        CheckpointError: anything but a sound draft.
        PairingError: layer ids other than those trained on.
    """
    path = Path(path)
    tree = _read_tree(path)
    config, _ = config_from_json(tree, target)
    draft = DFlashDraft(config)
    weights = _read_weights(path)
    if is_speculators(tree):
        weights = own_tensors(weights, config.vocab_size)
    expected = draft.state_dict()
    for name, tensor in expected.items():
        if name not in weights:
            raise CheckpointError(f"tensor '{name}' is missing from '{path}'")
        if weights[name].shape != tensor.shape:
            raise CheckpointError(
                f"tensor '{name}' has shape {tuple(weights[name].shape)}, the config asks for {tuple(tensor.shape)}"
            )
    unknown = sorted(set(weights) - set(expected))
    if unknown:
        raise CheckpointError(f"'{path}' holds tensors that are not a DFlash draft's: {', '.join(unknown[:3])}")
    draft.load_state_dict(weights)
    return draft.to(dtype).eval().requires_grad_(False)


def load_confidence(path: str | Path) -> ConfidenceHead | None:
    """The confidence head of a draft directory; None if it has none. Raises CheckpointError if it is damaged."""
    file = Path(path) / CONFIDENCE
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - it is no mapping
            temperature = (content.metadata() or {}).get(_TEMPERATURE)
        head = ConfidenceHead(
            len(tensors["weight"]), len(tensors["bias"]), None if temperature is None else float(temperature)
        )
        head.load_state_dict(tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        # Cut short, or other things than a head's.
        raise CheckpointError(f"'{file}' is damaged: {error}") from None
    return head.eval().requires_grad_(False)


def read_config(path: str | Path, target: TargetRecord | None = None) -> tuple[DFlashConfig, TargetRecord | None]:
    """The sizes and the target record of a draft directory, without its weights.

    Args:
        target: see `config_from_json`.

    Raises:
        CheckpointError: no draft, or a `config.json` that is damaged or says too little.
        PairingError: layer ids other than those trained on.
    """
    return config_from_json(_read_tree(Path(path)), target)


def check_pairing(draft_path: str | Path, target: TargetRecord, *, adopt: bool = False) -> DFlashConfig:
    """Refuse a draft whose records do not fit the target.

    Args:
        adopt: take a draft without a record to be for this target, if its sizes are.

    Raises:
        CheckpointError: see `read_config`.
        PairingError: the first field that differs.
    """
    config, record = read_config(draft_path, target)
    for name, of_draft, of_target in (
        ("hidden_size", config.hidden_size, target.hidden_size),
        ("vocab_size", config.vocab_size, target.vocab_size),
        ("num_target_layers", config.num_target_layers, target.num_layers),
    ):
        if of_draft != of_target:
            raise PairingError(f"the draft was made for {of_draft}, the target has {of_target}", field=name)
    if record is None and adopt:
        return config
    if record is None:
        raise PairingError(
            f"'{draft_path}' does not say which target it is for; publish it with publish.adopt=true",
            field=RECORD,
        )
    for field in dataclasses.fields(TargetRecord):
        ours, theirs = getattr(target, field.name), getattr(record, field.name)
        if ours != theirs:
            raise PairingError(
                f"the draft was trained for {theirs}, this target has {ours}; distil a draft for this target",
                field=field.name,
            )
    return config


def _read_tree(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"no draft at '{path}': config.json is missing")
    try:
        return json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"'{file}' is not valid JSON: {error}") from None


def _read_weights(path: Path) -> dict[str, Tensor]:
    index = path / INDEX
    names = [WEIGHTS]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    weights: dict[str, Tensor] = {}
    for name in names:
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"'{file}' is missing; drafts are loaded from safetensors only")
        try:
            weights |= load_file(file)
        except SafetensorError as error:
            raise CheckpointError(f"'{file}' is damaged: {error}") from None
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}
