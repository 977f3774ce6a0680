"""How shards are grouped into tasks: few enough for the driver, small enough to be retried."""

from __future__ import annotations

import random
from collections import deque

import pytest

from actors.generation_pool import _TASK_ROWS, _WAVE_TASKS, _tasks_in_flight, shards_of_a_task
from unmask.config import GenerateConfig, Recipe, TargetConfig


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


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("rows_per_shard", [16, 128, 512])
def test_the_engine_is_full_though_shards_wait_for_their_longest_response(rows_per_shard: int, samples: int) -> None:
    """A shard is taken when another has ended, as Ray Data does it; responses have between 40 and 256 tokens."""
    recipe = Recipe(
        target=TargetConfig(engine={"max_num_seqs": 256}),
        generate=GenerateConfig(rows_per_shard=rows_per_shard, samples_per_prompt=samples, temperature=1.0),
    )
    chance, tasks = random.Random(0), _tasks_in_flight(recipe, 1)
    shards: list[list[int]] = []
    waiting: deque[tuple[list[int], int]] = deque()
    running: list[tuple[list[int], int]] = []
    seen = []
    for step in range(2000):
        shards = [shard for shard in shards if shard[0]]
        while len(shards) < tasks:
            left = [rows_per_shard * samples]
            shards.append(left)
            waiting += [(left, chance.randint(40, 256)) for _ in range(left[0])]
        while waiting and len(running) < 256:
            left, length = waiting.popleft()
            running.append((left, step + length))
        seen.append(len(running))
        for left, end in running:
            left[0] -= end == step + 1
        running = [(left, end) for left, end in running if end > step + 1]
    assert sum(seen) > 0.97 * 256 * len(seen)


@pytest.mark.parametrize("rows_per_shard", [1, 3, 16, 100, 4096])
@pytest.mark.parametrize("sequences", [1, 2, 7, 33, 256, 1000, 200_000])
def test_tasks_divide_an_actor_evenly(sequences: int, rows_per_shard: int) -> None:
    """Ray Data's arithmetic of five decimals would else ask for one actor too few."""
    recipe = Recipe(
        target=TargetConfig(engine={"max_num_seqs": sequences}), generate=GenerateConfig(rows_per_shard=rows_per_shard)
    )
    tasks = _tasks_in_flight(recipe, 1)
    wanted = 3 * sequences / rows_per_shard
    assert wanted <= tasks <= max(2, 2 * wanted + 1)
    assert tasks > 10**5 or round(1 / tasks, 5) * tasks == pytest.approx(1, abs=1e-9)
