"""Metrics of a training run: one JSON line a record for machines, TensorBoard for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class TrainingLog:
    """Appends records to `log.jsonl` and `tensorboard/` in a directory. A resumed run goes on appending."""

    def __init__(self, directory: Path) -> None:
        from tensorboardX import SummaryWriter

        directory.mkdir(parents=True, exist_ok=True)
        self._file = (directory / "log.jsonl").open("a")
        self._board = SummaryWriter(str(directory / "tensorboard"))

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Write one record; values are plain numbers."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._board.close()


def read_log(directory: Path) -> list[dict[str, Any]]:
    """Records of a run in the order written; after a resume, a step may stand there twice."""
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
