"""How often the work on a shard was begun: what tells, after a process died, which shard or row killed it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from unmask.files import write_json


@dataclass(slots=True)
class Attempts:
    """Beginnings of one shard, and of its rows when they run one by one, that were not followed by an end.

    The counts live in a small file beside the shards, written before the risk is taken, so that they survive
    the death of the process that took it.
    """

    path: Path
    shard: int = 0
    rows: dict[str, int] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path, shard: int) -> Attempts:
        """Counts of a shard so far; zero if it was never begun."""
        path = directory / "attempts" / f"shard-{shard:07d}.json"
        return cls(path, **json.loads(path.read_text())) if path.is_file() else cls(path)

    def begin(self) -> None:
        """Count one beginning of the whole shard."""
        self.shard += 1
        self._save()

    def begin_row(self, row: int) -> None:
        """Count one beginning of a row that runs alone."""
        self.rows[str(row)] = self.of_row(row) + 1
        self._save()

    def end_row(self, row: int) -> None:
        """The row ended well. Kept with the next beginning: a row that ended well is harmless to count."""
        self.rows.pop(str(row))

    def of_row(self, row: int) -> int:
        """Beginnings of a row that never ended."""
        return self.rows.get(str(row), 0)

    def clear(self) -> None:
        """The shard is finished: forget it."""
        self.path.unlink(missing_ok=True)

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        counts = asdict(self)
        del counts["path"]
        write_json(self.path, counts)
