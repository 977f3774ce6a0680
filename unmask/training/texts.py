"""The texts that training visits: verified trajectories, or a source's own prompts and responses, tokenised once."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unmask.capture import REJECTED
from unmask.config import AdaptConfig
from unmask.errors import PromptError, UserError
from unmask.files import atomic_path, write_json
from unmask.prompt_rows import PromptRow, prompt_rows
from unmask.prompts import PromptBuilder
from unmask.training.sequences import TokenSequence
from unmask.trajectories import read_tables

logger = logging.getLogger(__name__)

_SCHEMA = pa.schema([("prompt_ids", pa.list_(pa.int32())), ("response_ids", pa.list_(pa.int32()))])
_REPORTED = 100
_ROWS_A_GROUP = 4096
"""Rows that are held at a time: a source may be larger than memory."""


def read_trajectory_texts(run_dir: Path, *, verified: bool, response_length: int | None = None) -> list[TokenSequence]:
    """Prompts and responses of a run's trajectories, in order.

    Args:
        verified: only those with a verdict of true; else all but those with a verdict of false.
        response_length: leave out responses that were cut before they had this many tokens: their end would be
            learned as an end. None keeps them.

    Raises:
        UserError: see `unmask.trajectories.read_tables`; no row is left.
    """
    wanted = (True,) if verified else (True, None)
    columns = ["prompt_ids", "response_ids", "verdict", "finish_reason", "meta"]
    rows = [row for table in read_tables(run_dir, columns) for row in table.to_pylist()]
    kept = [
        TokenSequence(
            tuple(row["prompt_ids"] + row["response_ids"]),
            len(row["prompt_ids"]),
            tuple(len(row["prompt_ids"]) + anchor for anchor in json.loads(row["meta"]).get(REJECTED, ())),
        )
        for row in rows
        if row["verdict"] in wanted
        and (response_length is None or row["finish_reason"] == "stop" or len(row["response_ids"]) == response_length)
    ]
    if not kept:
        raise UserError(
            f"none of {len(rows)} trajectories is right and whole; train the teacher for longer, or generate more",
            field="generate.verifier" if verified else "run_dir",
        )
    return kept


def stage_texts(config: AdaptConfig, builder: PromptBuilder, tokenizer: Any, path: Path) -> int:
    """Tokenise a source's prompts and responses into the Parquet file `path`, unless it is there; the rows in it.

    Rows that cannot be used are left out; `rejected.json` beside the file says how many, and why the first ones.

    Raises:
        UserError: an unreadable source, or one with no usable row.
    """
    if path.is_file():
        return pq.read_metadata(path).num_rows
    path.parent.mkdir(parents=True, exist_ok=True)
    rejected, reported = 0, []
    with atomic_path(path) as temporary:
        with pq.ParquetWriter(temporary, _SCHEMA, compression="zstd") as writer:
            kept, source = 0, prompt_rows(config.data)
            while rows := list(itertools.islice(source, _ROWS_A_GROUP)):
                texts, errors = _tokenised(rows, config, builder, tokenizer)
                writer.write_table(pa.Table.from_pylist(texts, schema=_SCHEMA))
                kept, rejected = kept + len(texts), rejected + len(errors)
                reported += errors[: _REPORTED - len(reported)]
        write_json(path.with_name("rejected.json"), {"count": rejected, "rows": reported})
        if not kept:
            first = f", the first because {reported[0]['error']}" if reported else ""
            raise UserError(f"none of {rejected} rows can be used{first}", field="adapt.data.source")
    if rejected:
        logger.warning("%d rows cannot be used, the first because %s", rejected, reported[0]["error"])
    return kept


def _tokenised(
    rows: Sequence[PromptRow], config: AdaptConfig, builder: PromptBuilder, tokenizer: Any
) -> tuple[list[dict[str, list[int]]], list[dict[str, Any]]]:
    """The texts of those rows that can be used, and why the others cannot."""
    texts, errors = [], []
    for row in rows:
        try:
            prompt_ids = list(builder.build(row).ids)
            texts.append({"prompt_ids": prompt_ids, "response_ids": _response_ids(row, config, builder, tokenizer)})
        except PromptError as error:
            errors.append({"index": row.index, "error": str(error)})
    return texts, errors


def read_texts(path: Path) -> Iterator[TokenSequence]:
    """What `stage_texts` wrote."""
    for batch in pq.ParquetFile(path).iter_batches(_ROWS_A_GROUP):
        for row in batch.to_pylist():
            yield TokenSequence(tuple(row["prompt_ids"] + row["response_ids"]), len(row["prompt_ids"]))


def _response_ids(row: PromptRow, config: AdaptConfig, builder: PromptBuilder, tokenizer: Any) -> list[int]:
    text = row.values.get(config.response_field)
    if not isinstance(text, str):
        raise PromptError("the row lacks a response text", field=f"adapt.data.{config.response_field}")
    builder.check_text(text)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) > config.response_length:
        raise PromptError(f"the response has {len(ids)} tokens", field="adapt.response_length")
    return ids
