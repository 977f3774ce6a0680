"""Trajectory files: what is written is read back, whole shards or none, damage is named."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.errors import UserError
from unmask.manifest import RUN_ID, Manifest, shard_path
from unmask.trajectories import (
    SCHEMA,
    inspect_shard,
    read_quarantine,
    read_tables,
    read_trajectories,
    row_seed,
    sample_id,
    write_shard,
)
from unmask.types import Trajectory


def trajectory(n: int, error: str | None = None) -> Trajectory:
    return Trajectory(
        sample_id=f"id{n}",
        prompt_ids=[1, n],
        response_ids=[] if error else [n, n + 1, 2],
        finish_reason="error" if error else "stop",
        num_forwards=0 if error else 3,
        teacher="a/b",
        teacher_revision="sha256:0",
        decode_config="d",
        commit_step=[0, 0, 1] if n % 2 else None,
        verdict=None if n % 3 else True,
        error=error,
        meta={"index": n, "source": {"prompt": "h\u00e9"}},
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three shards of two rows; the middle one has a quarantined row besides."""
    directory = tmp_path / "trajectories"
    manifest = Manifest()
    for shard in range(3):
        bad = [trajectory(90, "empty")] if shard == 1 else []
        manifest.entries[shard] = write_shard(directory, shard, [trajectory(2 * shard), trajectory(2 * shard + 1)], bad)
    manifest.save(directory)
    return tmp_path


def test_what_is_written_is_read_back(run: Path) -> None:
    assert list(read_trajectories(run)) == [trajectory(n) for n in range(6)]
    assert list(read_trajectories(run / "trajectories")) == [trajectory(n) for n in range(6)]
    assert list(read_quarantine(run)) == [trajectory(90, "empty")]


def test_columns_match_the_record_and_carry_the_schema_version(run: Path) -> None:
    assert set(SCHEMA.names) == {field.name for field in dataclasses.fields(Trajectory)}
    metadata = pq.read_schema(shard_path(run / "trajectories", 0)).metadata
    assert metadata[b"unmask.trajectories"] == b"1"


def test_columns_can_be_selected(run: Path) -> None:
    tables = list(read_tables(run, ["response_ids", "sample_id"]))
    assert len(tables) == 3
    assert tables[1].to_pydict() == {"response_ids": [[2, 3, 2], [3, 4, 2]], "sample_id": ["id2", "id3"]}


def test_reading_is_lazy(run: Path) -> None:
    rows = read_trajectories(run)
    shard_path(run / "trajectories", 2).unlink()
    assert next(rows).sample_id == "id0"


def test_entry_counts_rows_and_tokens(run: Path) -> None:
    entry = Manifest.load(run / "trajectories").entries[1]
    assert (entry.rows, entry.quarantined, entry.tokens) == (2, 1, 6)
    assert inspect_shard(run / "trajectories", 1) == entry


@pytest.mark.parametrize("position", [0, 4, 100, -1])
def test_damaged_shard_is_named(run: Path, position: int) -> None:
    path = shard_path(run / "trajectories", 1)
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    rows = read_trajectories(run)
    assert [next(rows).sample_id, next(rows).sample_id] == ["id0", "id1"]
    with pytest.raises(UserError, match=r"shard-0000001\.parquet' is missing or damaged"):
        next(rows)


def test_missing_shard_and_missing_run_are_named(run: Path, tmp_path: Path) -> None:
    shard_path(run / "trajectories", 0).unlink()
    with pytest.raises(UserError, match=r"shard-0000000\.parquet"):
        list(read_trajectories(run))
    with pytest.raises(UserError, match=r"^run_dir: .*holds no trajectories"):
        list(read_trajectories(tmp_path / "elsewhere"))


def test_other_schema_versions_are_refused(run: Path) -> None:
    directory = run / "trajectories"
    path = shard_path(directory, 0)
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({b"unmask.trajectories": b"99"}), path)
    assert inspect_shard(directory, 0) is None
    manifest = Manifest.load(directory)
    manifest.reconcile(directory, inspect_shard)
    assert 0 not in manifest.entries


def test_failed_write_leaves_nothing(run: Path) -> None:
    directory = run / "trajectories"
    broken = dataclasses.replace(trajectory(0), response_ids=[2**40])
    with pytest.raises(pa.ArrowInvalid):
        write_shard(directory, 8, [broken], [])
    assert not shard_path(directory, 8).exists()
    assert not list(directory.rglob("*.tmp"))


def test_first_writer_of_a_shard_wins(run: Path) -> None:
    directory = run / "trajectories"
    entry = Manifest.load(directory).entries[2]
    assert write_shard(directory, 2, [trajectory(7)], []) == entry
    assert [row.sample_id for row in read_trajectories(run)][4:] == ["id4", "id5"]


def test_damaged_shard_is_replaced_by_the_same_bytes(run: Path) -> None:
    directory = run / "trajectories"
    path = shard_path(directory, 1)
    before = path.read_bytes()
    path.write_bytes(before[:-9])
    write_shard(directory, 1, [trajectory(2), trajectory(3)], [])
    assert not shard_path(directory, 1, quarantine=True).exists()
    write_shard(directory, 5, [trajectory(2), trajectory(3)], [trajectory(90, "empty")])
    assert shard_path(directory, 5).read_bytes() == before


def test_a_stragglers_shard_is_not_taken(tmp_path: Path) -> None:
    """An actor of the run before writes after its run was started over, before the new id or after it."""
    old, new = [trajectory(7)], [trajectory(2)]
    (tmp_path / RUN_ID).write_text("old")
    write_shard(tmp_path, 7, old, [], "old")
    (tmp_path / RUN_ID).write_text("new")
    assert inspect_shard(tmp_path, 7, "old")
    assert inspect_shard(tmp_path, 7, "new") is None
    manifest = Manifest()
    manifest.reconcile(tmp_path, functools.partial(inspect_shard, run_id="new"))
    assert not manifest.entries
    assert not shard_path(tmp_path, 7).exists()

    with pytest.raises(UserError, match="was started over by another run"):
        write_shard(tmp_path, 7, old, [trajectory(9, "bad")], "old")
    assert not list(tmp_path.rglob("*.parquet"))
    assert not list(tmp_path.rglob("*.tmp"))
    entry = write_shard(tmp_path, 7, new, [], "new")
    with pytest.raises(UserError, match="was started over by another run"):
        write_shard(tmp_path, 7, old, [], "old")
    (tmp_path / RUN_ID).unlink()
    with pytest.raises(UserError, match="was started over by another run"):
        write_shard(tmp_path, 8, old, [], "old")
    assert inspect_shard(tmp_path, 7, "new") == entry
    Manifest({7: entry}).save(tmp_path)
    assert list(read_trajectories(tmp_path)) == new


def test_shard_of_quarantined_rows_only(tmp_path: Path) -> None:
    entry = write_shard(tmp_path, 7, [], [trajectory(1, "bad")])
    manifest = Manifest({7: entry})
    manifest.save(tmp_path)
    assert list(read_trajectories(tmp_path)) == []
    assert [row.error for row in read_quarantine(tmp_path)] == ["bad"]


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 1000))
def test_row_seeds_are_engine_seeds_and_differ(base: int, index: int, sample: int) -> None:
    seed = row_seed(base, index, sample)
    assert 0 <= seed < 2**63
    assert seed == row_seed(base, index, sample)
    assert len({seed, row_seed(base + 1, index, sample), row_seed(base, index + 1, sample)}) == 3
    assert seed != row_seed(base, index, sample + 1)


def test_seeds_and_ids_are_stable_across_versions() -> None:
    assert row_seed(0, 1, 2) == 603432347784401458
    assert sample_id([1, 2], "r", "d", 3) == "2d435c36b4a61fc10bc14d3beaa19444"


@given(st.lists(st.integers(0, 100), max_size=4), st.lists(st.integers(0, 100), max_size=4))
def test_sample_ids_tell_prompts_apart(first: list[int], second: list[int]) -> None:
    same = sample_id(first, "r", "d", 3) == sample_id(second, "r", "d", 3)
    assert same == (first == second)
    assert sample_id(first, "r", "d", 3) == sample_id(tuple(first), "r", "d", 3)
    assert len({sample_id(first, "r", "d", 3), sample_id(first, "x", "d", 3), sample_id(first, "r", "x", 3)}) == 3
