"""Targets: a name resolved to a safe local directory, and the record that identifies it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from unmask.config import EMBEDDED_TARGET, TOY_TARGET
from unmask.embedded_target import embedded_target
from unmask.errors import CheckpointError, nearest
from unmask.files import sha256_file
from unmask.toy_target import toy_target
from unmask.types import TargetRecord

_EMBEDDED = {EMBEDDED_TARGET: embedded_target, TOY_TARGET: toy_target}
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
_UNSAFE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
_SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})$")
_OWN_TYPES = ("llada", "Dream")
"""Published with code of their own, which `unmask.models` replaces."""
_RESERVED = re.compile(r"reserved|unused|placeholder", re.IGNORECASE)


def resolve_target(model: str, revision: str | None = None) -> Path:
    """Local HF directory of a target, with safetensors weights and no code of its own.

    Args:
        model: `embedded:smollm2-135m-instruct`, `embedded:toy`, a local directory, or a hub id.
        revision: commit hash, tag or branch of a hub id.

    Raises:
        CheckpointError: unknown name, damaged or unsafe directory, or a hub id that cannot be fetched.
    """
    if model.startswith("embedded:"):
        if model not in _EMBEDDED:
            raise CheckpointError(f"unknown model{nearest(model, _EMBEDDED)}", field="target.model")
        return _EMBEDDED[model]()
    path = Path(model).expanduser()
    if not path.is_dir():
        if path.exists() or model.startswith((".", "/", "~")):
            raise CheckpointError(f"'{model}' is not a directory; give a HF model directory", field="target.model")
        path = _fetch(model, revision)
    validate_directory(path)
    return path.absolute()


def validate_directory(path: Path) -> dict[str, Any]:
    """Check that a directory is a HF model that loads without running code; return its config.

    Raises:
        CheckpointError: the field or file at fault, and what to do.
    """
    config = _read_json(path / "config.json")
    if not any(path.glob("*.safetensors")):
        unsafe = sorted(file.name for file in path.iterdir() if file.suffix in _UNSAFE_SUFFIXES)
        found = f" ('{unsafe[0]}' is a pickle, which can run code when read; convert it)" if unsafe else ""
        raise CheckpointError(f"'{path}' holds no *.safetensors weights{found}", field="target.model")
    if not (path / "tokenizer.json").is_file():
        raise CheckpointError(
            f"'{path}' holds no tokenizer.json; save the model's fast tokenizer there", field="target.model"
        )
    if "auto_map" in config and not _readable_without_it(config.get("model_type")):
        raise CheckpointError(
            f"'{path}' needs code from its repository, which is never run; "
            f"use a model type that transformers knows, not '{config.get('model_type')}'",
            field="target.model",
        )
    return config


def describe_target(path: Path) -> TargetRecord:
    """The record by which a draft recognises its target.

    Raises:
        CheckpointError: the directory is not a valid target.
    """
    config = validate_directory(path)
    # LLaDA has names of its own for them.
    sizes = config.get("text_config", config)
    try:
        return TargetRecord(
            revision=_revision(path),
            tokenizer_hash=_short(sha256_file(path / "tokenizer.json")),
            chat_template_hash=_short(hashlib.sha256(_chat_template(path).encode()).hexdigest()),
            vocab_size=sizes.get("embedding_size") or sizes["vocab_size"],
            hidden_size=sizes.get("d_model") or sizes["hidden_size"],
            num_layers=sizes.get("n_layers") or sizes["num_hidden_layers"],
        )
    except KeyError as error:
        raise CheckpointError(f"'{path / 'config.json'}' lacks {error}", field="target.model") from None


def unused_special_token(tokenizer: Any) -> int:
    """Id of a special token that never stands for text: the mask token of a draft. Deterministic.

    The tokenizer's own mask token if it has one, else the lowest reserved special token, else the lowest
    special token with no role that the chat template does not write.

    Raises:
        CheckpointError: the tokenizer has no such token.
    """
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id
    roles = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    template = json.dumps(tokenizer.chat_template or "", ensure_ascii=False)
    free = sorted(
        (not _RESERVED.search(token.content), index)
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special and index not in roles and token.content not in template
    )
    if not free:
        raise CheckpointError(
            "the tokenizer has no unused special token; name an id that never occurs in text",
            field="draft.mask_token_id",
        )
    return free[0][1]


def eos_ids(target: str | Path) -> frozenset[int]:
    """Tokens that end a response, from the generation config of a target's directory."""
    # Imported here: a name is resolved in places that need no model.
    from transformers import GenerationConfig

    ids = GenerationConfig.from_pretrained(target, local_files_only=True).eos_token_id
    return frozenset(ids if isinstance(ids, list) else [ids])


def _fetch(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"'{model}' is no local directory and could not be fetched from the hub: {error}", field="target.model"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"'{path}' is missing; give a HF model directory", field="target.model") from None
    except ValueError as error:
        raise CheckpointError(f"'{path}' is not valid JSON: {error}", field="target.model") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"'{path}' must hold a JSON object", field="target.model")
    return value


def _readable_without_it(model_type: Any) -> bool:
    if model_type in _OWN_TYPES:
        return True
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def _revision(path: Path) -> str:
    snapshot = _SNAPSHOT.search(path.absolute().as_posix())
    if snapshot:
        return snapshot.group(1)
    digest = hashlib.sha256()
    for file in (path / "config.json", *sorted(path.glob("*.safetensors"))):
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _chat_template(path: Path) -> str:
    """The template's text, wherever the version of transformers that saved it put it; empty without one."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text()
    config = path / "tokenizer_config.json"
    template = _read_json(config).get("chat_template", "") if config.is_file() else ""
    return template if isinstance(template, str) else json.dumps(template, sort_keys=True)


def _short(hex_digest: str) -> str:
    return f"sha256:{hex_digest}"
