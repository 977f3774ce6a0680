"""The rows of a shard that keeps ending its engine: which have a response, and which to try together next."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unmask.attempts import Attempts
from unmask.types import Trajectory


class Suspects:
    """Finds the rows that end their engine by halving, and keeps what the others gave as they give it.

    All rows are tried together. Those that have no response when the engine dies are halved, and each half is tried by
    itself, down to single rows: one deadly row among n costs about log2(n) engines until it is alone. What is known
    lies in a file beside the shard's count of attempts, a line for each group that is begun and for each row that is
    finished, so that it outlives actors and drivers.

    Args:
        directory: the run's `trajectories` folder.
        run_id: of the run; responses of another one are not taken.
        attempts: of this shard; it counts the deaths of single rows.
        count: rows of the shard.
    """

    def __init__(self, directory: Path, run_id: str, attempts: Attempts, count: int) -> None:
        self.done: dict[int, Trajectory] = {}
        """What finished rows gave, by position in the shard."""
        self._attempts = attempts
        self._path = _path(attempts, run_id)
        self._groups = [list(range(count))]
        if self._path.is_file():
            self._load()

    def next_group(self) -> list[int]:
        """Positions of the rows to try together now; none when all are finished."""
        groups = ([position for position in group if position not in self.done] for group in self._groups)
        return next((group for group in groups if group), [])

    def begin(self, group: list[int]) -> None:
        """Count that a group is about to be tried. Raises OSError if the store fails, as `keep` does."""
        if len(group) == 1:
            self._attempts.begin_row(group[0])
        else:
            self._write({"begun": group})

    def deaths_alone(self, position: int) -> int:
        """How often the engine died while it had this row and no other."""
        return self._attempts.of_row(position)

    def keep(self, position: int, trajectory: Trajectory) -> None:
        """A row is finished."""
        self._write({"row": position, "trajectory": asdict(trajectory)})
        self.done[position] = trajectory
        if self._attempts.of_row(position):
            self._attempts.end_row(position)

    def _write(self, record: dict[str, Any]) -> None:
        """Append a line. It need not be durable: what a lost node takes with it is tried once more."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab", buffering=0) as file:
            file.write(json.dumps(record, default=str).encode() + b"\n")

    def _load(self) -> None:
        lines = self._path.read_bytes().split(b"\n")
        if lines[-1]:
            # The process died within a line; the next one must not be joined to it.
            with self._path.open("ab") as file:
                file.write(b"\n")
        begun: list[int] = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                # Cut off, or empty: that row or group is tried again.
                continue
            if "begun" in record:
                self._halve(begun)
                begun = record["begun"]
            else:
                self.done[record["row"]] = Trajectory(**record["trajectory"])
        self._halve(begun)

    def _halve(self, begun: Collection[int]) -> None:
        """What a group that was begun has left, when nothing more is heard of it, ended its engine."""
        left = [position for position in begun if position not in self.done]
        middle, tried = (len(left) + 1) // 2, set(begun)
        others = ([position for position in group if position not in tried] for group in self._groups)
        self._groups = [group for group in (left[:middle], left[middle:], *others) if group]


def forget(attempts: Attempts, run_id: str) -> None:
    """Remove what is known of the rows of a shard that is finished."""
    _path(attempts, run_id).unlink(missing_ok=True)


def forget_finished(directory: Path, finished: Collection[int]) -> None:
    """Remove what is known of finished shards whose actors ended before they could do it themselves."""
    for path in (directory / "attempts").glob("shard-*"):
        if int(path.stem.split("-")[1]) in finished:
            path.unlink(missing_ok=True)


def _path(attempts: Attempts, run_id: str) -> Path:
    """Named for the run: an actor of the run before may still write into the same folder."""
    return attempts.path.with_name(f"{attempts.path.stem}-{run_id}.jsonl")
