"""F11: a training checkpoint cut at every file operation and byte class, and on a full disk."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.fault.record import Finding, conclude, equal
from tests.fault.small_disk import SmallDisk
from tests.fault.trial import Trial
from unmask.training.training_state import resume_state, save_state

FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "shutil.rmtree"}
"""Python's audit events of operations on files; the process is killed before the operation."""

REMOVALS = {"os.remove", "os.rmdir"}
"""Those of a directory that is removed with all in it name its files alone, without the directory."""


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


@dataclass(slots=True, kw_only=True)
class Checkpoints:
    """A trainer's checkpoints in a folder, and what came of what was done to them."""

    directory: Path
    trainers: dict[int, SmallTrainer]
    """The trainer after each number of steps."""
    struck: int = 0
    """How often something was done to them."""
    resumed: list[int] = field(default_factory=list)
    """The step that was resumed from after each of those."""
    left: list[str] = field(default_factory=list)
    """What a cut write left behind once another had ended."""
    refused: int = 0
    """Saves that were refused."""

    def resume(self, directory: Path | None = None) -> int:
        """The step that is resumed from; its state is what was saved, to the last bit."""
        trainer = SmallTrainer(self.trainers[1].model.in_features)
        meta = resume_state(directory or self.directory, trainer)
        assert meta is not None
        expected = self.trainers[trainer.steps_done]
        assert meta["steps_done"] == trainer.steps_done
        for name, tensor in expected.model.state_dict().items():
            assert torch.equal(tensor, trainer.model.state_dict()[name])
        for index, moments in expected.optimizer.state_dict()["state"].items():
            for name, tensor in moments.items():
                assert torch.equal(tensor, trainer.optimizer.state_dict()["state"][index][name])
        return trainer.steps_done


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    """Three steps of a trainer; step 1 is saved."""
    torch.set_num_threads(1)
    states = {}
    for steps in (1, 2, 3):
        states[steps] = SmallTrainer()
        for _ in range(steps):
            states[steps].step()
    save_state(tmp_path / "saved", states[1], {})
    return Checkpoints(directory=tmp_path / "saved", trainers=states)


def save(steps: int) -> Callable[[Checkpoints], None]:
    """Event: a step is saved."""
    return lambda saved: save_state(saved.directory, saved.trainers[steps], {}) and None


def kill_before_each_file_operation(steps: int) -> Callable[[Checkpoints], None]:
    """Event: SIGKILL before each file operation of saving a step, each time on a copy; then the third step is saved."""

    def strike(saved: Checkpoints) -> None:
        killed = True
        while killed:
            directory = saved.directory.with_name(f"cut-{saved.struck + 1}")
            shutil.copytree(saved.directory, directory)
            killed = save_and_die(directory, saved.trainers[steps], saved.struck + 1)
            saved.resumed.append(saved.resume(directory))
            save_state(directory, saved.trainers[3], {})
            assert saved.resume(directory) == 3
            saved.left += [path.name for path in directory.iterdir() if path.name.startswith(".")]
            shutil.rmtree(directory)
            saved.struck += killed

    return strike


def save_and_die(directory: Path, trainer: SmallTrainer, operation: int) -> bool:
    """Save in a child that is killed before the given file operation; whether it was, or had ended before."""
    child = os.fork()
    if child == 0:
        try:
            sys.addaudithook(killing(directory, operation))
            save_state(directory, trainer, {})
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            raise
        finally:  # Whatever is raised, the child must not go on with the parent's tests.
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), "the save has failed"
    return code != 0


def killing(directory: Path, operation: int) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that ends the process before the given operation on files of a directory."""
    seen, removes = 0, False

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen, removes
        if event not in FILE_EVENTS:
            return
        named = str(directory) in str(arguments[0])
        if named or (removes and event in REMOVALS):
            seen += 1
            removes = removes or event == "shutil.rmtree"
            if seen == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    return count


def damage_each_file(steps: int) -> Callable[[Checkpoints], None]:
    """Event: each file of a step's checkpoint is cut at several places, changed in a bit, and removed."""

    def strike(saved: Checkpoints) -> None:
        whole = save_state(saved.directory, saved.trainers[steps], {})
        for file in sorted(path.name for path in whole.iterdir()):
            content = (whole / file).read_bytes()
            damaged = [content[:length] for length in (0, 4, 9, len(content) // 2, len(content) - 1)]
            damaged += [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in (9, len(content) // 2)]
            for bad in damaged:
                (whole / file).write_bytes(bad)
                found = saved.resume()
                # A harmless cut, such as that of the last line end of the checksums, may leave the checkpoint sound.
                saved.resumed += [found] if file != "checksums.json" else []
                saved.struck += 1
            (whole / file).unlink()
            saved.resumed.append(saved.resume())
            (whole / file).write_bytes(content)
        assert saved.resume() == steps

    return strike


def save_until_the_disk_is_full(saved: Checkpoints) -> None:
    """Event: one step after another is saved; after a save that is refused the one before it loads."""
    trainer = saved.trainers[1]
    for steps in (1, 2, 3):
        trainer.step()
        saved.trainers[steps] = copy.deepcopy(trainer)
        try:
            save_state(saved.directory, trainer, {})
        except OSError:
            saved.refused += 1
            assert saved.resume() == steps - 1
            saved.left += [path.name for path in saved.directory.iterdir() if path.name.startswith(".")]


def resumed_from(steps: list[int]) -> Callable[[Checkpoints], list[Finding]]:
    """Check: which whole checkpoints were chosen."""
    return lambda saved: [equal("checkpoints resumed from", sorted(set(saved.resumed)), steps)]


def nothing_is_left(saved: Checkpoints) -> list[Finding]:
    """Check: the next save clears away what a cut write has left."""
    return [equal("cut writes left", saved.left, [])]


def refusals(count: int) -> Callable[[Checkpoints], list[Finding]]:
    """Check: how many saves were refused."""
    return lambda saved: [equal("saves refused, the one before loads", saved.refused, count)]


@pytest.mark.parametrize(
    ("before", "struck", "resumed", "how"),
    [
        ([], 2, [1, 2], ""),
        ([save(2)], 2, [1, 2], " over itself"),
        ([save(2)], 3, [2, 3], " and an old one removed"),
    ],
    ids=["first", "over-itself", "with-an-old-one-removed"],
)
def test_killed_at_every_file_operation(
    checkpoints: Checkpoints, before: list[Callable[[Checkpoints], None]], struck: int, resumed: list[int], how: str
) -> None:
    trial = Trial(
        events=[*before, kill_before_each_file_operation(struck)],
        checks=[resumed_from(resumed), nothing_is_left],
    )
    findings = trial.play(checkpoints)
    assert checkpoints.struck > 9
    event = f"SIGKILL while a checkpoint is saved{how}"
    conclude("F11", event, f"before each of {checkpoints.struck} file operations", findings)


def test_cut_and_changed_files_are_passed_over(checkpoints: Checkpoints) -> None:
    findings = Trial(events=[damage_each_file(2)], checks=[resumed_from([1])]).play(checkpoints)
    conclude("F11", "a saved checkpoint is cut or changed", f"{checkpoints.struck} damages", findings)


def test_a_full_disk_costs_one_checkpoint_only(small_disk: SmallDisk) -> None:
    torch.set_num_threads(1)
    trainer = SmallTrainer(180)  # 0.4 MB a checkpoint: two fit, a third does not
    checkpoints = Checkpoints(directory=small_disk.path, trainers={1: trainer})
    findings = Trial(events=[save_until_the_disk_is_full], checks=[refusals(1), nothing_is_left]).play(checkpoints)
    conclude("F11", "the disk is full", "1 MB", findings)
