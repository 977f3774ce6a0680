"""Staged prompts: the rows of a source, cut into shards once, so that any shard can be read on its own.

Rows stay as they are in the source; they are tokenised where they are used, in parallel.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from unmask.config import PromptsConfig
from unmask.errors import UserError
from unmask.files import atomic_path, write_json
from unmask.prompt_rows import PromptRow, prompt_rows, source_fingerprint

_RECORD = "staged.json"
_SHARDS_PER_FILE = 1024
"""Keeps the footer of a file, which every reader parses, small."""

_SCHEMA = pa.schema([("index", pa.int64()), ("values", pa.string()), ("error", pa.string())])


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedPrompts:
    """What was staged: `num_rows` source rows, `rows_per_shard` of them in each of `num_shards` shards but the last."""

    num_rows: int
    num_shards: int
    rows_per_shard: int
    source_fingerprint: str


def stage_prompts(config: PromptsConfig, directory: Path, rows_per_shard: int) -> StagedPrompts:
    """Write the rows of a source into `directory`, one Parquet row group a shard; reuse what is staged already.

    Raises:
        UserError: an unreadable or empty source, or one that changed since it was staged.
    """
    record = directory / _RECORD
    if record.is_file():
        staged = StagedPrompts(**json.loads(record.read_text()))
        if staged.source_fingerprint != source_fingerprint(config):
            raise UserError(
                f"'{config.source}' changed since this run began; use another run_dir, or --fresh to start over",
                field="prompts.source",
            )
        return staged
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    shards = _chunks(prompt_rows(config), rows_per_shard)
    num_rows = num_shards = 0
    while first := next(shards, None):
        file_shards = itertools.chain([first], itertools.islice(shards, _SHARDS_PER_FILE - 1))
        with atomic_path(_file(directory, num_shards)) as temporary, pq.ParquetWriter(temporary, _SCHEMA) as writer:
            for rows in file_shards:
                writer.write_table(_table(rows), row_group_size=rows_per_shard)
                num_rows, num_shards = num_rows + len(rows), num_shards + 1
    if not num_rows:
        raise UserError(f"'{config.source}' holds no rows", field="prompts.source")
    staged = StagedPrompts(
        num_rows=num_rows,
        num_shards=num_shards,
        rows_per_shard=rows_per_shard,
        source_fingerprint=source_fingerprint(config),
    )
    write_json(record, asdict(staged))
    return staged


def read_staged(directory: Path, shard: int) -> list[PromptRow]:
    """The rows of one shard."""
    with pq.ParquetFile(_file(directory, shard)) as file:
        table = file.read_row_group(shard % _SHARDS_PER_FILE)
    return [
        PromptRow(index=row["index"], values=json.loads(row["values"]), error=row["error"]) for row in table.to_pylist()
    ]


def _file(directory: Path, shard: int) -> Path:
    return directory / f"part-{shard // _SHARDS_PER_FILE:05d}.parquet"


def _chunks(rows: Iterator[PromptRow], size: int) -> Iterator[list[PromptRow]]:
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


def _table(rows: list[PromptRow]) -> pa.Table:
    columns = {
        "index": [row.index for row in rows],
        "values": [json.dumps(row.values, default=str) for row in rows],
        "error": [row.error for row in rows],
    }
    return pa.Table.from_pydict(columns, schema=_SCHEMA)
