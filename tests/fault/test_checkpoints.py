"""F11: a training checkpoint cut at every file operation and byte class, and on a full disk."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.fault.record import conclude, equal
from unmask.training.training_state import resume_state, save_state

FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "shutil.rmtree"}
"""Python's audit events of operations on files; the process is killed before the operation."""


class SmallTrainer:
    """A trainer whose weights tell how many steps it has taken."""

    def __init__(self, size: int = 8) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(size, size)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.steps_done = 0

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.full((1, self.model.in_features), float(self.steps_done + 1))).square().sum().backward()
        self.optimizer.step()
        self.steps_done += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps_done": self.steps_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps_done = state["steps_done"]


@pytest.fixture
def trainers(tmp_path: Path) -> dict[int, SmallTrainer]:
    """The trainer after each of three steps; step 1 is saved in `saved`."""
    torch.set_num_threads(1)
    states = {}
    for steps in (1, 2, 3):
        states[steps] = SmallTrainer()
        for _ in range(steps):
            states[steps].step()
    save_state(tmp_path / "saved", states[1], {})
    return states


def resumed(directory: Path, trainers: dict[int, SmallTrainer]) -> int:
    """The step that is resumed from; its state is what was saved, to the last bit."""
    trainer = SmallTrainer(trainers[1].model.in_features)
    meta = resume_state(directory, trainer)
    assert meta is not None
    expected = trainers[trainer.steps_done]
    assert meta["steps_done"] == trainer.steps_done
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name])
    for index, moments in expected.optimizer.state_dict()["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, trainer.optimizer.state_dict()["state"][index][name])
    return trainer.steps_done


def save_and_die(directory: Path, trainer: SmallTrainer, operation: int) -> bool:
    """Save in a child that is killed before the given file operation; whether it was, or had ended before."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in FILE_EVENTS and str(directory) in str(arguments[0]):
                seen += 1
                if seen == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        save_state(directory, trainer, {})
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("again", [False, True], ids=["first", "over-itself"])
def test_killed_at_every_file_operation(tmp_path: Path, trainers: dict[int, SmallTrainer], again: bool) -> None:
    if again:
        save_state(tmp_path / "saved", trainers[2], {})
    operation, found = 1, set()
    while True:
        directory = tmp_path / f"cut-{operation}"
        shutil.copytree(tmp_path / "saved", directory)
        killed = save_and_die(directory, trainers[2], operation)
        found.add(resumed(directory, trainers))
        save_state(directory, trainers[3], {})
        assert resumed(directory, trainers) == 3
        assert not [path.name for path in directory.iterdir() if path.name.startswith(".")], "a cut write is left"
        shutil.rmtree(directory)
        if not killed:
            break
        operation += 1
    assert operation > 10
    findings = [equal("checkpoints resumed from", sorted(found), [1, 2])]
    event = "SIGKILL while a checkpoint is saved" + (" over itself" if again else "")
    conclude("F11", event, f"before each of {operation - 1} file operations", findings)


def test_cut_and_changed_files_are_passed_over(tmp_path: Path, trainers: dict[int, SmallTrainer]) -> None:
    whole = save_state(tmp_path / "saved", trainers[2], {})
    damages, chosen = 0, 0
    for file in sorted(path.name for path in whole.iterdir()):
        content = (whole / file).read_bytes()
        damaged = [content[:length] for length in (0, 4, 9, len(content) // 2, len(content) - 1)]
        damaged += [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in (9, len(content) // 2)]
        for bad in damaged:
            (whole / file).write_bytes(bad)
            # A harmless cut, such as that of the last line end of the checksums, may leave the checkpoint sound.
            chosen += resumed(tmp_path / "saved", trainers) == 2 and file != "checksums.json"
            damages += 1
        (whole / file).unlink()
        assert resumed(tmp_path / "saved", trainers) == 1
        (whole / file).write_bytes(content)
    assert resumed(tmp_path / "saved", trainers) == 2
    conclude(
        "F11", "a saved checkpoint is cut or changed", f"{damages} damages", [equal("damaged ones chosen", chosen, 0)]
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system takes root")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_full_disk_costs_one_checkpoint_only(small_disk: Path) -> None:
    torch.set_num_threads(1)
    trainer = SmallTrainer(180)  # 0.4 MB a checkpoint: two fit, a third does not
    states = {}
    refused = 0
    for steps in (1, 2, 3):
        trainer.step()
        states[steps] = copy.deepcopy(trainer)
        try:
            save_state(small_disk, trainer, {})
        except OSError:
            refused += 1
            assert resumed(small_disk, states) == steps - 1
            assert not [path for path in small_disk.iterdir() if path.name.startswith(".")]
    conclude("F11", "the disk is full", "1 MB", [equal("saves refused, the one before loads", refused, 1)])
