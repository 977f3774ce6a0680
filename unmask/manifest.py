"""The manifest of a run: which shards are finished, and what each must look like."""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from unmask.errors import UserError
from unmask.files import atomic_path

MANIFEST = "manifest.json"
RUN_ID = "run_id"
"""File with the id of the run whose shards are in a folder; it is another one each time a run is started over."""
_VERSION = 1
_STRAGGLERS_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """One finished shard: rows with and without a response, response tokens, and the file's size and SHA-256."""

    rows: int
    quarantined: int
    tokens: int
    size: int
    sha256: str


@dataclass(slots=True)
class Manifest:
    """Finished shards of a run by number. Only the driver of the run writes it."""

    entries: dict[int, ShardEntry] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read `manifest.json`; an empty manifest if there is none. Raises UserError if it is damaged."""
        path = directory / MANIFEST
        try:
            tree = json.loads(path.read_text())
        except FileNotFoundError:
            return cls()
        except ValueError as error:
            raise UserError(f"'{path}' is damaged: {error}; delete it to rebuild it from the shards") from None
        if tree.get("version") != _VERSION:
            raise UserError(f"'{path}' is of version {tree.get('version')}; this version reads {_VERSION}")
        names = tree["columns"]
        return cls({int(row[0]): ShardEntry(**dict(zip(names, row[1:], strict=True))) for row in tree["shards"]})

    def save(self, directory: Path) -> None:
        """Write `manifest.json` atomically: one line a shard, in order."""
        names = ["rows", "quarantined", "tokens", "size", "sha256"]
        with atomic_path(directory / MANIFEST) as temporary, temporary.open("w") as file:
            file.write(f'{{"version": {_VERSION}, "columns": {json.dumps(names)}, "shards": [\n')
            lines = (
                json.dumps([shard, *(getattr(entry, name) for name in names)])
                for shard, entry in sorted(self.entries.items())
            )
            file.write(",\n".join(lines) + "\n]}\n")

    def reconcile(self, directory: Path, inspect: Callable[[Path, int], ShardEntry | None]) -> None:
        """Make the manifest agree with the files, after a driver was killed or files were deleted.

        Entries whose file is gone or of another size are dropped, to be redone; files that are not recorded are
        adopted if `inspect` finds them whole, and removed otherwise. Unfinished writes are removed too.
        """
        for leftover in directory.rglob(".*.tmp"):
            # An actor that has outlived its driver may finish one at this moment.
            leftover.unlink(missing_ok=True)
        sizes = shard_sizes(directory)
        for shard in [s for s, entry in self.entries.items() if sizes.get(s) != entry.size]:
            del self.entries[shard]
        for shard in sizes.keys() - self.entries.keys():
            entry = inspect(directory, shard)
            if entry is None:
                shard_path(directory, shard).unlink()
            else:
                self.entries[shard] = entry

    def pending(self, shards: Iterable[int]) -> list[int]:
        """Those of the given shards that are not finished."""
        return [shard for shard in shards if shard not in self.entries]


def shard_path(directory: Path, shard: int, *, quarantine: bool = False) -> Path:
    """File of a shard, or of its quarantined rows."""
    return directory / ("quarantine" if quarantine else "shards") / f"shard-{shard:07d}.parquet"


def shard_sizes(directory: Path) -> dict[int, int]:
    """Sizes in bytes of the shard files that are there, by shard number."""
    return {
        int(path.stem.removeprefix("shard-")): path.stat().st_size
        for path in (directory / "shards").glob("shard-*.parquet")
    }


def read_run_id(directory: Path) -> str:
    """The id of the run in a folder; empty if nobody gave it one, as with captured shards."""
    try:
        return (directory / RUN_ID).read_text().strip()
    except FileNotFoundError:
        return ""


def delete_run(directory: Path) -> None:
    """Empty a run's folder, though actors that have outlived their driver still write there.

    The manifest and the id go first: what a kill leaves of the rest belongs to no run, and a shard that is being
    written meanwhile is given up by its writer, or is there to be deleted (see `trajectories.write_shard`).

    Raises:
        OSError: something in it cannot be deleted.
    """
    for name in (MANIFEST, RUN_ID):
        (directory / name).unlink(missing_ok=True)
    deadline = time.monotonic() + _STRAGGLERS_S
    while directory.is_dir() and (left := list(directory.iterdir())):
        try:
            for path in left:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError as error:
            # Of a folder that was read a file has gone, or another has come.
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY) or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


class ManifestSaver:
    """Saves a manifest now and then, spending at most a twentieth of the time on it however large it grows.

    Args:
        every_s: least seconds between two saves.
    """

    def __init__(self, manifest: Manifest, directory: Path, *, every_s: float) -> None:
        self._manifest, self._directory, self._every_s = manifest, directory, every_s
        self._due = time.monotonic() + every_s

    def save_if_due(self) -> None:
        """Save if the last save is long enough ago."""
        start = time.monotonic()
        if start < self._due:
            return
        self._manifest.save(self._directory)
        self._due = start + max(self._every_s, 20 * (time.monotonic() - start))
