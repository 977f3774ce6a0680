"""Ranks of a training go on from the same checkpoint or not at all, whatever each sees of the shared storage."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unmask.training.training_state import resume_same_state, save_state


class SmallTrainer:
    """A trainer whose weight is the number of steps, or what it is said to be."""

    def __init__(self, steps: int = 0, weight: float | None = None) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.model.weight, steps if weight is None else weight)
        self.optimizer = torch.optim.SGD(self.model.parameters())
        self.steps_done = steps

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": {"state": {}}, "steps_done": self.steps_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.steps_done = state["steps_done"]


def view(folder: Path, steps: Sequence[int]) -> Path:
    """What a host sees of the storage: the checkpoints of those steps."""
    folder.mkdir()
    for step in steps:
        save_state(folder, SmallTrainer(step), {"seconds_used": float(step)})
    return folder


def cut(folder: Path) -> None:
    """The newest one's content has not arrived."""
    (folder / "step-00000050" / "state.safetensors").write_bytes(b"")


def replace(folder: Path) -> None:
    """The newest one is another of the same step."""
    save_state(folder, SmallTrainer(50, weight=1.0), {"seconds_used": 1.0})


NOT_FOUND = "rank 1 does not find in 'step-00000050' what the first rank goes on from"

CASES: dict[str, tuple[list[int], list[int], Callable[[Path], None] | None, list[Any]]] = {
    "both see the same": ([40, 50], [40, 50], None, [50, 50]),
    "the first is behind": ([40], [40, 50], None, [40, 40]),
    "the first sees none": ([], [40], None, [None, None]),
    "the other is behind": ([40, 50], [40], None, [50, NOT_FOUND]),
    "the other's is cut": ([40, 50], [40, 50], cut, [50, NOT_FOUND]),
    "the other's is another": ([40, 50], [40, 50], replace, [50, NOT_FOUND]),
}
"""What the first and the other rank see, what is done to the other's, and which step each goes on from, or why not."""


def resume(rank: int, folders: Sequence[Path], meeting: Path, told: Any) -> None:
    """One rank, in a process of its own, in one case after another."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for folder in folders:
        trainer = SmallTrainer()
        try:
            meta = resume_same_state(folder, trainer, rank, dist.group.WORLD)
        except OSError as error:
            told.put((rank, str(error).replace(f"{folder}/", "")))
        else:
            assert trainer.model.weight.item() == trainer.steps_done == (meta["seconds_used"] if meta else 0)
            told.put((rank, trainer.steps_done if meta else None))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """By case, what each rank went on from."""
    root = tmp_path_factory.mktemp("storage")
    folders = []
    for number, (first, other, change, _) in enumerate(CASES.values()):
        folders.append((view(root / f"{number}-first", first), view(root / f"{number}-other", other)))
        if change is not None:
            change(folders[-1][1])
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    ranks = [
        context.Process(target=resume, args=(rank, seen, root / "meeting", told))
        for rank, seen in enumerate(zip(*folders, strict=True))
    ]
    for process in ranks:
        process.start()
    answers: tuple[list[Any], list[Any]] = ([], [])
    for _ in range(2 * len(CASES)):
        rank, answer = told.get(timeout=120)
        answers[rank].append(answer)
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    return {case: [first, other] for case, first, other in zip(CASES, *answers, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_every_rank_goes_on_from_the_first_ones_or_not_at_all(case: str, resumed: dict[str, list[Any]]) -> None:
    assert resumed[case] == CASES[case][-1]
