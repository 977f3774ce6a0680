"""What a served pairing did, kept for the next round of distillation: token ids alone, opt-in, bounded.

A request is one trajectory row; its `meta` names the columns of the response behind which a draft was rejected. The
folder is a run's `trajectories`, so that `distill` reads it as it reads generated ones. The oldest shards give way when
the bound is reached, so a service never fills a disk.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from unmask.manifest import Manifest, shard_path
from unmask.trajectories import inspect_shard, sample_id, write_shard
from unmask.types import TargetRecord, Trajectory

REJECTED = "rejected_after"
"""Key of `meta`: indices into the response of the anchors whose blocks were not accepted whole."""
_DECODE = "served"


class CaptureWriter:
    """Collects finished requests and writes them in shards. Thread-safe; only one writer may use a folder.

    Args:
        directory: a run's `trajectories` folder.
        target: whose text it is.
        max_bytes: bound of all shards together.
        rows_per_shard: requests in one file; fewer are lost if the process dies.
    """

    def __init__(
        self, directory: Path, target: TargetRecord, *, max_bytes: int = 2**30, rows_per_shard: int = 512
    ) -> None:
        self.directory, self.target = directory, target
        self.max_bytes, self.rows_per_shard = max_bytes, rows_per_shard
        self._rows: list[Trajectory] = []
        self._lock = threading.Lock()
        self._manifest = Manifest.load(directory)
        self._manifest.reconcile(directory, inspect_shard)
        self._next = max(self._manifest.entries, default=-1) + 1

    def add(self, prompt_ids: Sequence[int], response_ids: Sequence[int], accepted: Sequence[int], k: int) -> None:
        """Keep one finished request.

        Args:
            accepted: accepted drafts of each verification, in order.
            k: drafted tokens of each.
        """
        anchor, rejected = 0, []
        for count in accepted:
            if count < k and anchor < len(response_ids) - 1:
                rejected.append(anchor)
            anchor += count + 1
        row = Trajectory(
            sample_id=sample_id(prompt_ids, self.target.revision, _DECODE, hash(tuple(response_ids))),
            prompt_ids=list(prompt_ids),
            response_ids=list(response_ids),
            finish_reason="stop",
            num_forwards=len(accepted) + 1,
            teacher="served",
            teacher_revision=self.target.revision,
            decode_config=_DECODE,
            meta={REJECTED: rejected},
        )
        with self._lock:
            self._rows.append(row)
            if len(self._rows) >= self.rows_per_shard:
                self._write()

    def flush(self) -> None:
        """Write what is collected."""
        with self._lock:
            if self._rows:
                self._write()

    def _write(self) -> None:
        self._manifest.entries[self._next] = write_shard(self.directory, self._next, self._rows, [])
        self._rows, self._next = [], self._next + 1
        while sum(e.size for e in self._manifest.entries.values()) > self.max_bytes and len(self._manifest.entries) > 1:
            oldest = min(self._manifest.entries)
            del self._manifest.entries[oldest]
            # The manifest goes first: a reader never finds a shard listed that is gone.
            self._manifest.save(self.directory)
            shard_path(self.directory, oldest).unlink()
        self._manifest.save(self.directory)
