"""Trajectory files: the Parquet schema, ids and seeds of samples, and the writer and readers of shards.

A run keeps them in `<run_dir>/trajectories`: `shards/` (one Parquet file a shard), `quarantine/` (rows that
gave no response, with the error), `manifest.json` (see `unmask.manifest`) and `run.yaml`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unmask.errors import UserError
from unmask.files import atomic_path, sha256_file
from unmask.manifest import MANIFEST, Manifest, ShardEntry, read_run_id, shard_path
from unmask.types import Trajectory

SCHEMA_VERSION = "1"
_VERSION_KEY = b"unmask.trajectories"
_SHARD_KEY = b"unmask.shard"
_RUN_KEY = b"unmask.run"

SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("num_forwards", pa.int32(), nullable=False),
        pa.field("commit_step", pa.list_(pa.int32())),
        pa.field("teacher", pa.string(), nullable=False),
        pa.field("teacher_revision", pa.string(), nullable=False),
        pa.field("decode_config", pa.string(), nullable=False),
        pa.field("verdict", pa.bool_()),
        pa.field("error", pa.string()),
        pa.field("meta", pa.string(), nullable=False),
    ],
    metadata={_VERSION_KEY: SCHEMA_VERSION},
)
"""`meta` is the source row as JSON; token ids are int32; `commit_step` has one step a response token."""


def row_seed(base_seed: int, index: int, sample: int) -> int:
    """Seed (63 bits) of one sample of one prompt: it depends on nothing else, so a retried row is the same row."""
    digest = hashlib.blake2b(f"{base_seed}/{index}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sample_id(prompt_ids: Sequence[int], teacher_revision: str, decode_config: str, seed: int) -> str:
    """Stable id of a sample (32 hex digits): equal in every run that would draw the same response."""
    key = json.dumps([list(prompt_ids), teacher_revision, decode_config, seed], separators=(",", ":"))
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def write_shard(
    directory: Path, shard: int, rows: Sequence[Trajectory], quarantined: Sequence[Trajectory], run_id: str = ""
) -> ShardEntry:
    """Write one shard and its quarantined rows atomically; the shard's own file, written last, commits both.

    A shard of this run that is there already stays: an actor outlives its killed driver for a while, and must not
    change what the next driver has recorded.

    Args:
        directory: the run's `trajectories` folder.
        run_id: whose shard it is; empty in a folder without an id.

    Raises:
        UserError: the folder belongs to another run by now.
    """
    if entry := inspect_shard(directory, shard, run_id):
        return entry
    path, beside = shard_path(directory, shard), shard_path(directory, shard, quarantine=True)
    if quarantined:
        _write(directory, beside, quarantined, {_RUN_KEY: run_id})
    counts = {"rows": len(rows), "quarantined": len(quarantined), "tokens": sum(len(r.response_ids) for r in rows)}
    _write(directory, path, rows, {_SHARD_KEY: json.dumps(counts), _RUN_KEY: run_id})
    if not quarantined:
        beside.unlink(missing_ok=True)
    return ShardEntry(**counts, size=path.stat().st_size, sha256=sha256_file(path))


def inspect_shard(directory: Path, shard: int, run_id: str = "") -> ShardEntry | None:
    """The entry of this run's file of a shard, whole and readable, to adopt it into a manifest; None without one."""
    path = shard_path(directory, shard)
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, FileNotFoundError):
        # Other errors are the store's: what cannot be read now may be whole, and None would have it deleted.
        return None
    metadata = table.schema.metadata or {}
    if metadata.get(_VERSION_KEY) != SCHEMA_VERSION.encode() or _SHARD_KEY not in metadata:
        return None
    if metadata.get(_RUN_KEY, b"").decode() != run_id:
        return None
    return ShardEntry(**json.loads(metadata[_SHARD_KEY]), size=path.stat().st_size, sha256=sha256_file(path))


def read_tables(
    run_dir: Path, columns: Sequence[str] | None = None, *, without: frozenset[Path] = frozenset()
) -> Iterator[pa.Table]:
    """Finished shards of a run in order, one table each, checksums verified.

    Args:
        run_dir: the run, or its `trajectories` folder.
        columns: only these columns; None reads all.
        without: shards to leave out, by the paths of their files.

    Raises:
        UserError: no trajectories there, of another schema version, or a damaged shard (named).
    """
    directory = trajectories_directory(run_dir)
    for shard, entry in sorted(Manifest.load(directory).entries.items()):
        path = shard_path(directory, shard)
        if path in without:
            continue
        if not path.is_file() or sha256_file(path) != entry.sha256:
            raise UserError(
                f"shard '{path}' is missing or damaged; delete it and run `python -m pipelines.generate` again, "
                "which redoes only what is missing",
                field="run_dir",
            )
        yield _read(path, columns)


def read_trajectories(run_dir: Path, *, without: frozenset[Path] = frozenset()) -> Iterator[Trajectory]:
    """Trajectories of a run in order, streamed shard by shard. For the arguments and errors see `read_tables`."""
    for table in read_tables(run_dir, without=without):
        yield from _trajectories(table)


def read_quarantine(run_dir: Path) -> Iterator[Trajectory]:
    """Rows of a run that gave no response, with their `error`. Raises UserError if one of the files is damaged."""
    directory = trajectories_directory(run_dir)
    for shard, entry in sorted(Manifest.load(directory).entries.items()):
        if entry.quarantined:
            yield from _trajectories(_read(shard_path(directory, shard, quarantine=True), None))


def trajectories_directory(run_dir: Path) -> Path:
    """The folder that holds a run's trajectories. Raises UserError if there are none."""
    for directory in (run_dir, run_dir / "trajectories"):
        if (directory / MANIFEST).is_file():
            return directory
    raise UserError(
        f"'{run_dir}' holds no trajectories; run `python -m pipelines.generate` with this run_dir first",
        field="run_dir",
    )


def trajectories_digest(run_dir: Path) -> str:
    """SHA-256 over the checksums of a run's finished shards, in order. Raises UserError if there are none."""
    entries = Manifest.load(trajectories_directory(run_dir)).entries
    sums = (entries[shard].sha256 for shard in sorted(entries))
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()


def _write(directory: Path, path: Path, rows: Sequence[Trajectory], metadata: dict[bytes, str]) -> None:
    columns = {field.name: [getattr(row, field.name) for row in rows] for field in SCHEMA}
    columns["meta"] = [json.dumps(row.meta, default=str) for row in rows]
    schema = SCHEMA.with_metadata(SCHEMA.metadata | metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pydict(columns, schema=schema), temporary, compression="zstd")
        # After the file is there: who starts over takes the id away before looking for files to delete, so that this
        # one is found then, or given up here.
        if read_run_id(directory) != metadata[_RUN_KEY]:
            raise UserError(f"'{directory}' was started over by another run, and this one ends", field="run_dir")


def _read(path: Path, columns: Sequence[str] | None) -> pa.Table:
    try:
        table = pq.read_table(path, columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"'{path}' cannot be read: {error}", field="run_dir") from None
    version = (table.schema.metadata or {}).get(_VERSION_KEY, b"none").decode()
    if version != SCHEMA_VERSION:
        raise UserError(
            f"'{path}' has trajectory schema {version}; this version reads {SCHEMA_VERSION}", field="run_dir"
        )
    return table


def _trajectories(table: pa.Table) -> Iterator[Trajectory]:
    names = [field.name for field in dataclasses.fields(Trajectory)]
    for row in table.to_pylist():
        values: dict[str, Any] = {name: row[name] for name in names} | {"meta": json.loads(row["meta"])}
        yield Trajectory(**values)
