"""How shards are grouped into tasks: few enough for the driver, small enough to be retried."""

from __future__ import annotations

import pytest

from actors.generation_pool import _TASK_ROWS, _WAVE_TASKS, shards_of_a_task


@pytest.mark.parametrize("rows_per_shard", [1, 64, 1024, 100_000])
@pytest.mark.parametrize("num_shards", [1, 7, 2_500, 2_501, 15_625, 1_000_000])
def test_tasks_are_few_and_small(num_shards: int, rows_per_shard: int) -> None:
    together = shards_of_a_task(num_shards, rows_per_shard)
    assert 1 <= together <= num_shards
    assert together == 1 or together * rows_per_shard <= _TASK_ROWS
    # No more than are needed for one wave.
    assert together == 1 or (together - 1) * _WAVE_TASKS < num_shards


def test_a_million_rows_are_one_wave() -> None:
    assert shards_of_a_task(1_000_000 // 64, 64) * _WAVE_TASKS * 64 >= 1_000_000
