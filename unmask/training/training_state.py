"""Training checkpoints: safetensors and JSON only, whole or absent, the newest sound one is resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from unmask.files import atomic_directory, verify_directory
from unmask.training.draft_trainer import DraftTrainer

_TENSORS = "state.safetensors"
_META = "state.json"


def save_state(directory: Path, trainer: DraftTrainer, meta: dict[str, Any], keep: int = 2) -> Path:
    """Write `step-NNNNNNNN` under a directory atomically, then remove all but the newest `keep`.

    Args:
        meta: JSON values that come back with the state (seconds used, first loss ...).
    """
    path = directory / f"step-{trainer.steps_done:08d}"
    state = trainer.state_dict()
    with atomic_directory(path) as partial:
        save_file(_flatten(state), partial / _TENSORS)
        (partial / _META).write_text(json.dumps(meta | {"steps_done": trainer.steps_done}))
    for old in _steps(directory)[:-keep]:
        shutil.rmtree(old)
    return path


def resume_state(directory: Path, trainer: DraftTrainer) -> dict[str, Any] | None:
    """Load the newest checkpoint whose checksums hold; its meta, or None if there is none."""
    for path in reversed(_steps(directory)):
        if not verify_directory(path):
            continue
        meta = json.loads((path / _META).read_text())
        trainer.load_state_dict(_unflatten(load_file(path / _TENSORS), trainer) | {"steps_done": meta["steps_done"]})
        return meta
    return None


def _steps(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-[0-9]*"))


def _flatten(state: dict[str, Any]) -> dict[str, Tensor]:
    tensors = {f"{part}.{n}": t for part in ("draft", "average") for n, t in state[part].items()}
    for index, moments in state["optimizer"]["state"].items():
        tensors |= {f"optimizer.{index}.{n}": t for n, t in moments.items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _unflatten(tensors: dict[str, Tensor], trainer: DraftTrainer) -> dict[str, Any]:
    def part(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in part("optimizer.").items():
        index, _, key = name.partition(".")
        moments.setdefault(int(index), {})[key] = tensor
    groups = trainer.optimizer.state_dict()["param_groups"]
    return {
        "draft": part("draft."),
        "average": part("average."),
        "optimizer": {"state": moments, "param_groups": groups},
    }
