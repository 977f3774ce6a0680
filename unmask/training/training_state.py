"""Training checkpoints: safetensors and JSON only, whole or absent, the newest sound one is resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from unmask.files import CHECKSUMS, atomic_directory, sha256_file, verify_directory
from unmask.tensor_files import save_tensors

_TENSORS = "state.safetensors"
_META = "state.json"


class Trainer(Protocol):
    """What can be saved and resumed."""

    steps_done: int

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser whose moments are part of the state."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Groups of tensors by name, `optimizer` (its own state), and `steps_done`."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`; groups that held no tensor may be missing."""
        ...


def save_state(directory: Path, trainer: Trainer, meta: dict[str, Any], keep: int = 2) -> Path:
    """Write `step-NNNNNNNN` under a directory atomically, then remove all others but the `keep` - 1 before it.

    One process at a time may save into a directory.

    Args:
        meta: JSON values that come back with the state (seconds used, first loss ...).
    """
    for leftover in directory.glob(".step-*"):  # of a process that was killed while it saved
        shutil.rmtree(leftover)
    path = directory / f"step-{trainer.steps_done:08d}"
    state = trainer.state_dict()
    with atomic_directory(path) as partial:
        save_tensors(_flatten(state), partial / _TENSORS)
        (partial / _META).write_text(json.dumps(meta | {"steps_done": trainer.steps_done}))
    # Later ones than this can only be those that a resume has refused as damaged; they would take its place.
    kept = [step for step in _steps(directory) if step <= path][-keep:]
    for old in _steps(directory):
        if old not in kept:
            shutil.rmtree(old)
    return path


def resume_state(directory: Path, trainer: Trainer) -> dict[str, Any] | None:
    """Load the newest checkpoint whose checksums hold; its meta, or None if there is none."""
    path = _newest(directory)
    return None if path is None else _load(path, trainer)


def resume_same_state(
    directory: Path, trainer: Trainer, rank: int, group: dist.ProcessGroup | None
) -> dict[str, Any] | None:
    """`resume_state` of the first rank's newest checkpoint, on every rank; each must call it.

    Ranks on several hosts may see shared storage at different times: each one's own newest need not be the same one,
    and ranks of different states would go on without an error.

    Args:
        group: all ranks, on a backend that takes CPU tensors; None where there is only one.

    Raises:
        OSError: this rank does not find the first rank's checkpoint, or not the same content in it.
    """
    if group is None:
        return resume_state(directory, trainer)
    path = _newest(directory) if rank == 0 else None
    # The checksums stand for all of the content.
    chosen: list[Any] = [None if path is None else (path.name, sha256_file(path / CHECKSUMS))]
    dist.broadcast_object_list(chosen, src=0, group=group)
    if chosen[0] is None:
        return None
    name, checksum = chosen[0]
    path = directory / name
    if rank and not (verify_directory(path) and sha256_file(path / CHECKSUMS) == checksum):
        raise OSError(f"rank {rank} does not find in '{path}' what the first rank goes on from")
    return _load(path, trainer)


def _newest(directory: Path) -> Path | None:
    return next((path for path in reversed(_steps(directory)) if verify_directory(path)), None)


def _load(path: Path, trainer: Trainer) -> dict[str, Any]:
    meta = json.loads((path / _META).read_text())
    trainer.load_state_dict(_unflatten(load_file(path / _TENSORS), trainer) | {"steps_done": meta["steps_done"]})
    return meta


def _steps(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-[0-9]*"))


def _flatten(state: dict[str, Any]) -> dict[str, Tensor]:
    groups = {part: tensors for part, tensors in state.items() if part not in ("optimizer", "steps_done")}
    groups |= {f"optimizer.{index}": moments for index, moments in state["optimizer"]["state"].items()}
    tensors = {f"{part}.{name}": tensor for part, group in groups.items() for name, tensor in group.items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _unflatten(tensors: dict[str, Tensor], trainer: Trainer) -> dict[str, Any]:
    state: dict[str, Any] = {}
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part == "optimizer":
            index, _, key = rest.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
        else:
            state.setdefault(part, {})[rest] = tensor
    groups = trainer.optimizer.state_dict()["param_groups"]
    return state | {"optimizer": {"state": moments, "param_groups": groups}}
