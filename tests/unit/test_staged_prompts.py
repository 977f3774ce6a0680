"""Staged prompts: every row in exactly one shard, any shard readable alone, a changed source refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unmask import staged_prompts
from unmask.config import PromptsConfig
from unmask.errors import UserError
from unmask.prompt_rows import prompt_rows
from unmask.staged_prompts import read_staged, stage_prompts


@pytest.fixture
def config(tmp_path: Path) -> PromptsConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{n}"}) + "\n" for n in range(23)) + "{bad\n")
    return PromptsConfig(source=str(path))


@pytest.mark.parametrize("rows_per_shard", [1, 5, 24, 100])
def test_shards_hold_the_rows_in_order(
    config: PromptsConfig, tmp_path: Path, rows_per_shard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged_prompts, "_SHARDS_PER_FILE", 3)
    staged = stage_prompts(config, tmp_path / "prompts", rows_per_shard)
    shards = [read_staged(tmp_path / "prompts", shard) for shard in range(staged.num_shards)]
    assert [len(shard) for shard in shards[:-1]] == [rows_per_shard] * (staged.num_shards - 1)
    assert [row for shard in shards for row in shard] == list(prompt_rows(config))
    assert staged.num_rows == 24


def test_staging_is_done_once(config: PromptsConfig, tmp_path: Path) -> None:
    first = stage_prompts(config, tmp_path / "prompts", 5)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "prompts").iterdir()}
    assert stage_prompts(config, tmp_path / "prompts", 5) == first
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "prompts").iterdir()}


def test_unfinished_staging_is_done_again(config: PromptsConfig, tmp_path: Path) -> None:
    stage_prompts(config, tmp_path / "prompts", 5)
    (tmp_path / "prompts" / "staged.json").unlink()
    (tmp_path / "prompts" / "part-00007.parquet").write_text("left by a killed driver")
    staged = stage_prompts(config, tmp_path / "prompts", 6)
    assert staged.num_shards == 4
    assert not (tmp_path / "prompts" / "part-00007.parquet").exists()


def test_changed_source_is_refused(config: PromptsConfig, tmp_path: Path) -> None:
    stage_prompts(config, tmp_path / "prompts", 5)
    Path(config.source).write_text('{"prompt": "other"}\n')
    with pytest.raises(UserError, match=r"^prompts\.source: .*changed since this run began"):
        stage_prompts(config, tmp_path / "prompts", 5)


def test_empty_source_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    with pytest.raises(UserError, match="holds no rows"):
        stage_prompts(PromptsConfig(source=str(path)), tmp_path / "prompts", 5)
