"""Checkpoints of diffusion LMs with all that makes them usable: tokenizer, provenance, lineage, checksums."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmask.errors import CheckpointError
from unmask.files import atomic_directory, verify_directory
from unmask.models import families
from unmask.models.transformer import DiffusionLM

LINEAGE = "lineage.json"
"""What a checkpoint was made from, by what, and on which texts."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
)


def save_checkpoint(
    network: DiffusionLM,
    path: Path,
    *,
    tokenizer_of: Path,
    lineage: Mapping[str, Any],
    texts: Mapping[str, str],
) -> None:
    """Write a checkpoint directory atomically; an existing one is replaced.

    Args:
        network: merged; it is saved in the dtype that it has.
        tokenizer_of: the directory whose tokenizer and generation defaults go with it.
        texts: more text files by name.
    """
    with atomic_directory(path) as partial:
        families.save(network, partial)
        for name in _TOKENIZER_FILES:
            if (tokenizer_of / name).is_file():
                shutil.copyfile(tokenizer_of / name, partial / name)
        for name, text in {**texts, LINEAGE: json.dumps(lineage, indent=2, sort_keys=True) + "\n"}.items():
            (partial / name).write_text(text)


def read_lineage(path: Path) -> dict[str, Any]:
    """The lineage of a checkpoint directory whose files are all as they were saved.

    Raises:
        CheckpointError: no checkpoint of `save_checkpoint`, or one that was changed since.
    """
    file = path / LINEAGE
    if not file.is_file():
        raise CheckpointError(f"no checkpoint of this project at '{path}': {LINEAGE} is missing")
    if not verify_directory(path):
        raise CheckpointError(f"'{path}' has been changed since it was saved; make it again")
    return json.loads(file.read_text())
