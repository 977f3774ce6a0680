"""What a served pairing did, kept for the next round of distillation: token ids alone, opt-in, bounded.

A request is one trajectory row; its `meta` names the columns of the response behind which a draft was rejected. Each
writer has a folder of its own, laid out like a run's `trajectories`, and `collect` makes a run of them. The oldest
shards give way when the bound is reached, so a service never fills a disk.
"""

from __future__ import annotations

import fcntl
import logging
import queue
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import pyarrow as pa

from unmask.errors import UserError
from unmask.manifest import MANIFEST, Manifest, ShardEntry, shard_path
from unmask.trajectories import inspect_shard, read_tables, read_trajectories, sample_id, write_shard
from unmask.types import ServedRequest, TargetRecord, Trajectory

logger = logging.getLogger(__name__)

REJECTED = "rejected_after"
"""Key of `meta`: indices into the response of the anchors whose blocks were not accepted whole."""
ACCEPTED = "accepted"
"""Key of `meta`: accepted drafts of each verification, in order."""
CACHED = "cached_tokens"
"""Key of `meta`: prompt tokens that the engine took from its prefix cache."""
ROWS_PER_SHARD = 512
_SERVED = "served"
_LOCK = "writer.lock"
_WAITING = 1024
_POLL_S = 0.2


class CaptureFolder:
    """Shards of finished requests. Only one writer may use a folder.

    Args:
        directory: a folder like a run's `trajectories`.
        target: whose text it is.
        max_bytes: bound of all shards together; the newest is kept whatever its size.
    """

    def __init__(self, directory: Path, target: TargetRecord, *, max_bytes: int = 2**30) -> None:
        self.directory, self.target, self.max_bytes = directory, target, max_bytes
        self._manifest = Manifest.load(directory)
        self._manifest.reconcile(directory, inspect_shard)
        self._next = max(self._manifest.entries, default=-1) + 1

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(entry.size for entry in self._manifest.entries.values())

    def write(self, requests: Sequence[ServedRequest]) -> None:
        """Write a shard. Raises OSError or pyarrow's own errors; the folder stays sound."""
        rows = [self._row(request) for request in requests]
        self._manifest.entries[self._next] = write_shard(self.directory, self._next, rows, [])
        self._next += 1
        while self.size > self.max_bytes and len(self._manifest.entries) > 1:
            oldest = min(self._manifest.entries)
            del self._manifest.entries[oldest]
            # The manifest goes first: a reader never finds a shard listed that is gone.
            self._manifest.save(self.directory)
            shard_path(self.directory, oldest).unlink()
        self._manifest.save(self.directory)

    def _row(self, request: ServedRequest) -> Trajectory:
        return Trajectory(
            sample_id=sample_id(request.prompt_ids, self.target.revision, _SERVED, hash(tuple(request.response_ids))),
            prompt_ids=list(request.prompt_ids),
            response_ids=list(request.response_ids),
            finish_reason=request.finish_reason,
            num_forwards=request.num_forwards,
            teacher=_SERVED,
            teacher_revision=self.target.revision,
            decode_config=_SERVED,
            meta={
                REJECTED: rejected_anchors(request),
                ACCEPTED: list(request.accepted),
                CACHED: request.cached_tokens,
            },
        )


def rejected_anchors(request: ServedRequest) -> list[int]:
    """Indices into the response of the anchors whose blocks were not accepted whole.

    None are known where steps went without a draft in between, for verifications do not say where they began: tokens
    are missing then. Where a last block that was cut short makes up for them nothing is noticed, and anchors behind
    such a step are named a little early.
    """
    if 1 + sum(request.accepted) + len(request.accepted) < len(request.response_ids):
        return []
    anchor, rejected = 0, []
    for accepted, drafted in zip(request.accepted, request.drafted, strict=True):
        if accepted < drafted and anchor < len(request.response_ids) - 1:
            rejected.append(anchor)
        anchor += accepted + 1
    return rejected


@dataclass(slots=True)
class CaptureStats:
    """Requests since the start, and bytes on disk."""

    written: int = 0
    dropped: int = 0
    """Came faster than the disk took them."""
    failed: int = 0
    """Could not be written."""
    size: int = 0


class Capture:
    """Captures beside the service, on a thread of its own: `add` never waits and never raises.

    Args:
        root: holds a folder for each writer at work; a restarted writer takes over one that is free.
        max_bytes: bound of each writer's folder.
        flush_s: the longest that a request waits in memory for others to share its shard.
    """

    def __init__(self, root: Path, target: TargetRecord, *, max_bytes: int, flush_s: float) -> None:
        self.stats = CaptureStats()
        self._root, self._target, self._max_bytes, self._flush_s = root, target, max_bytes, flush_s
        self._waiting: queue.Queue[ServedRequest] = queue.Queue(_WAITING)
        self._ending = threading.Event()
        self._folder: CaptureFolder | None = None
        self._directory, self._lock = root, cast("IO[str] | None", None)
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
        self._thread.start()

    def add(self, request: ServedRequest) -> None:
        """Keep a finished request, unless too many wait already."""
        try:
            self._waiting.put_nowait(request)
        except queue.Full:
            self.stats.dropped += 1

    def stop(self, within_s: float = 5.0) -> None:
        """Write what waits and give up the folder; a disk that takes longer is left alone."""
        self._ending.set()
        self._thread.join(within_s)

    def _run(self) -> None:
        rows: list[ServedRequest] = []
        due = 0.0
        while not (self._ending.is_set() and self._waiting.empty()):
            due = due if rows else time.monotonic() + self._flush_s
            with suppress(queue.Empty):
                rows.append(self._waiting.get(timeout=_POLL_S))
                while len(rows) < ROWS_PER_SHARD:
                    rows.append(self._waiting.get_nowait())
            if rows and (len(rows) >= ROWS_PER_SHARD or time.monotonic() >= due):
                self._write(rows)
                rows = []
        if rows:
            self._write(rows)
        if self._lock is not None:
            self._lock.close()

    def _write(self, rows: Sequence[ServedRequest]) -> None:
        try:
            folder = self._folder = self._folder or self._open()
            folder.write(rows)
        except (OSError, UserError, pa.ArrowException) as error:
            self.stats.failed += len(rows)
            logger.warning("%d requests were not captured in '%s': %s", len(rows), self._root, error)
        else:
            self.stats.written += len(rows)
            self.stats.size = folder.size

    def _open(self) -> CaptureFolder:
        if self._lock is None:
            self._directory, self._lock = _claim(self._root)
        return CaptureFolder(self._directory, self._target, max_bytes=self._max_bytes)


def _claim(root: Path) -> tuple[Path, IO[str]]:
    """The first folder that no living writer holds, and the lock that holds it now."""
    _make_private(root)
    number = 0
    while True:
        directory = root / f"writer-{number}"
        _make_private(directory)
        lock = (directory / _LOCK).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return directory, lock
        except BlockingIOError:
            lock.close()
            number += 1


def read_captured(root: Path, *, without: frozenset[Path] = frozenset()) -> Iterator[Trajectory]:
    """What writers have finished, each writer's oldest first.

    Args:
        without: shards to leave out, as `captured` named them.

    Raises:
        UserError: a damaged shard.
    """
    for folder in _folders(root):
        yield from read_trajectories(folder, without=without)


def captured(root: Path) -> set[Path]:
    """All shards that writers have finished."""
    return {shard for folder in _folders(root) for shard in _shards(folder)}


def is_captured(run_dir: Path) -> bool:
    """Whether the trajectories of a run are requests that `collect` put there. Raises UserError, see `read_tables`."""
    configs = (table["decode_config"][0].as_py() for table in read_tables(run_dir, ["decode_config"]) if table.num_rows)
    return next(configs, None) == _SERVED


def collect(root: Path, run_dir: Path, *, without: frozenset[Path] = frozenset()) -> int:
    """Make `<run_dir>/trajectories` of captured shards, for `distil`; how many requests there are.

    Args:
        root: see `Capture`.
        without: shards to leave out, as `captured` named them.

    Raises:
        UserError: there is none, or other users could read them in `run_dir`.
    """
    directory, manifest = run_dir / "trajectories", Manifest()
    shutil.rmtree(directory, ignore_errors=True)
    _make_private(directory)
    (directory / "shards").mkdir()
    for folder in _folders(root):
        for source, entry in _shards(folder).items():
            # A running service may have dropped it by now.
            with suppress(FileNotFoundError):
                if source not in without:
                    number = len(manifest.entries)
                    shutil.copyfile(source, shard_path(directory, number))
                    manifest.entries[number] = entry
    if not manifest.entries:
        raise UserError(f"nothing new was captured in '{root}'; ask the service for something first")
    manifest.save(directory)
    return sum(entry.rows for entry in manifest.entries.values())


def _make_private(directory: Path) -> None:
    """Keep a folder, made if it is missing, from other users. Raises UserError where that cannot be done."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        directory.chmod(0o700)
    except OSError as error:
        raise UserError(f"'{directory}' cannot be kept from other users: {error}") from None
    # Some file systems take a mode and forget it.
    if directory.stat().st_mode & 0o077:
        raise UserError(f"'{directory}' cannot be kept from other users: its file system knows no modes")


def _folders(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob(f"*/{MANIFEST}"))


def _shards(folder: Path) -> dict[Path, ShardEntry]:
    return {shard_path(folder, number): entry for number, entry in sorted(Manifest.load(folder).entries.items())}
