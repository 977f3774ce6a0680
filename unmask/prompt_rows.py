"""Rows of prompts from a file, a hub data set or the demo, one at a time."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from unmask.config import PromptsConfig
from unmask.copying import Split as CopyingSplit
from unmask.copying import copying_rows
from unmask.demo_prompts import Split as DemoSplit
from unmask.demo_prompts import demo_rows
from unmask.errors import UserError, nearest
from unmask.word_problems import Split as ProblemSplit
from unmask.word_problems import word_problem_rows

_FORMATS = (".jsonl", ".json", ".parquet")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_PEEKED_ROWS = 20
_BUILT_IN: dict[str, tuple[tuple[str, ...], Callable[[Any], Iterable[dict[str, Any]]]]] = {
    "demo": (get_args(DemoSplit), demo_rows),
    "copying": (get_args(CopyingSplit), lambda split: itertools.islice(copying_rows(split), 50_000)),
    "word_problems": (get_args(ProblemSplit), lambda split: itertools.islice(word_problem_rows(split), 50_000)),
}
"""The project's own sources: splits, and rows by split."""

_Row = dict[str, Any] | str
"""A row's values, or what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRow:
    """One row of a source: its values, or the error that made it unreadable."""

    index: int
    values: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def check_source(config: PromptsConfig) -> None:
    """Refuse a source that cannot give prompts, before anything is loaded.

    Only files are looked into: the first rows must hold the configured field.

    Raises:
        UserError: missing file, unknown format or split, empty source, or no such field in it.
    """
    if config.source in _BUILT_IN:
        splits, _ = _BUILT_IN[config.source]
        if config.split not in splits:
            raise UserError(
                f"'{config.source}' has no split '{config.split}'{nearest(config.split, splits)}; "
                f"use {', '.join(splits)}",
                field="prompts.split",
            )
        return
    if _file(config.source) is None:
        return
    first = list(itertools.islice(prompt_rows(config), _PEEKED_ROWS))
    if not first:
        raise UserError(f"'{config.source}' holds no rows", field="prompts.source")
    known = {key for row in first for key in row.values}
    if known and config.field not in known:
        raise UserError(
            f"'{config.source}' has no field '{config.field}'{nearest(config.field, known)}; "
            f"it has {', '.join(sorted(known))}",
            field="prompts.field",
        )


def prompt_rows(config: PromptsConfig) -> Iterator[PromptRow]:
    """Rows of a source in order, numbered from 0, streamed; an unreadable line becomes a row with an error.

    Raises:
        UserError: see `check_source`; also a damaged file, or a hub data set that cannot be read.
    """
    if config.source in _BUILT_IN:
        rows: Iterator[_Row] = iter(_BUILT_IN[config.source][1](config.split))
    else:
        file = _file(config.source)
        rows = _hub_rows(config) if file is None else _file_rows(file)
    for index, row in enumerate(itertools.islice(rows, config.limit)):
        yield PromptRow(index=index, error=row) if isinstance(row, str) else PromptRow(index=index, values=row)


def source_fingerprint(config: PromptsConfig) -> str:
    """What tells that a source file changed between two runs: its size and time; empty for other sources."""
    file = None if config.source in _BUILT_IN else _file(config.source)
    return "" if file is None else f"{file.stat().st_size}-{file.stat().st_mtime_ns}"


def _file(source: str) -> Path | None:
    """The source as an existing file of a known format; None if it is a hub id."""
    path = Path(source).expanduser()
    looks_like_file = path.suffix in (*_FORMATS, ".gz") or source.startswith((".", "/", "~"))
    if not path.exists() and not looks_like_file and _HUB_ID.fullmatch(source):
        return None
    if not path.is_file():
        raise UserError(
            f"no file at '{source}'; give a .jsonl, .json or .parquet file, a hub data set id, "
            f"or one of {', '.join(_BUILT_IN)}",
            field="prompts.source",
        )
    if _format(path) not in _FORMATS:
        raise UserError(f"'{source}' is not a .jsonl, .json or .parquet file (or .gz of one)", field="prompts.source")
    return path


def _format(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _file_rows(path: Path) -> Iterator[_Row]:
    try:
        with _open(path) as file:
            yield from _parquet_rows(file) if _format(path) == ".parquet" else _json_rows(file)
    except (pa.ArrowInvalid, EOFError, OSError, zlib.error) as error:
        raise UserError(f"'{path}' is damaged: {error}", field="prompts.source") from None


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """The file's plain bytes. A compressed Parquet file is unpacked to disk, as it is read out of order."""
    if path.suffix != ".gz":
        with path.open("rb") as file:
            yield file
    elif _format(path) != ".parquet":
        with gzip.open(path) as file:
            yield cast(IO[bytes], file)
    else:
        with gzip.open(path) as packed, tempfile.TemporaryFile() as file:
            shutil.copyfileobj(packed, file)
            yield file


def _parquet_rows(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    for batch in pq.ParquetFile(file).iter_batches(batch_size=256):
        yield from batch.to_pylist()


def _json_rows(file: IO[bytes]) -> Iterator[_Row]:
    """One object a line, or one array of objects (the only form that is read whole)."""
    lines = (line for line in file if line.strip())
    first = next(lines, b"")
    if first.lstrip().startswith(b"["):
        try:
            rows = json.loads(first + b"".join(lines))
        except (ValueError, RecursionError) as error:
            raise UserError(f"the array is not valid JSON: {error}", field="prompts.source") from None
        yield from (_object(row) for row in rows)
        return
    for line in itertools.chain([first] if first else [], lines):
        try:
            yield _object(json.loads(line))
        except (ValueError, RecursionError) as error:
            yield f"the line is not valid JSON: {error}"


def _object(value: Any) -> _Row:
    return value if isinstance(value, dict) else f"the row is a {type(value).__name__}, not an object"


def _hub_rows(config: PromptsConfig) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        yield from load_dataset(config.source, split=config.split, streaming=True)
    except (DatasetsError, OSError, ValueError) as error:
        raise UserError(
            f"'{config.source}' is no file and could not be read from the hub: {error}", field="prompts.source"
        ) from None
