"""The generation actor without Ray or vLLM: shards, seeds, refusals, and the blame for dead engines."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.gate import Gate
from actors.generator import Generator
from engines.offline_engine import Completion
from unmask.attempts import Attempts
from unmask.config import EMBEDDED_TARGET, Recipe
from unmask.errors import CheckpointError, PromptError, UserError
from unmask.manifest import RUN_ID as RUN_ID_FILE
from unmask.manifest import Manifest, ShardEntry, shard_path
from unmask.recipe import parse_recipe
from unmask.staged_prompts import stage_prompts
from unmask.targets import describe_target, resolve_target
from unmask.trajectories import read_quarantine, read_trajectories
from unmask.types import SamplingOptions, TargetRecord

RUN_ID = "this-run"


class EchoEngine:
    """Answers with the request's seed, and remembers how many requests waited at once."""

    def __init__(self, arguments: dict[str, Any], *, on_gpu: bool) -> None:
        self.waiting = 0
        self.most_waiting = 0

    def submit(self, prompt_ids: tuple[int, ...], options: SamplingOptions) -> Future[Completion]:
        future: Future[Completion] = Future()
        self.waiting += 1
        self.most_waiting = max(self.waiting, self.most_waiting)
        asyncio.get_running_loop().call_later(0.01, self._answer, future, options)
        return future

    def _answer(self, future: Future[Completion], options: SamplingOptions) -> None:
        self.waiting -= 1
        if options.seed is not None and options.seed % 5 == 0:
            future.set_exception(PromptError("the engine refuses the prompt: too odd"))
        elif options.seed is not None and options.seed % 7 == 0:
            future.set_result(Completion([5], "abort"))
        else:
            future.set_result(Completion([(options.seed or 0) % 40_000, 2], "stop"))


@pytest.fixture(scope="module")
def record() -> TargetRecord:
    return describe_target(resolve_target(EMBEDDED_TARGET))


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{n}" if n != 3 else ""}) + "\n" for n in range(8)))
    return parse_recipe(
        {
            "prompts": {"source": str(path)},
            "generate": {"samples_per_prompt": 2, "temperature": 1.0, "max_new_tokens": 4, "max_attempts": 2},
        }
    )


def stage(recipe: Recipe, directory: Path, rows_per_shard: int) -> None:
    """What a driver does before there are actors."""
    stage_prompts(recipe.prompts, directory / "prompts", rows_per_shard)
    (directory / RUN_ID_FILE).write_text(RUN_ID)


def _run(recipe: Recipe, record: TargetRecord, directory: Path, shards: list[int]) -> tuple[Generator, dict[str, Any]]:
    stage(recipe, directory, 4)
    generator = Generator(recipe, str(directory), record, RUN_ID, 0.0, EchoEngine)
    summary = asyncio.run(generator({"shard": np.array(shards)}))
    manifest = Manifest()
    for row in range(len(shards)):
        values = {name: column[row].item() for name, column in summary.items()}
        assert values.pop("seconds") >= 0
        shard = values.pop("shard")
        manifest.entries[shard] = ShardEntry(**values)
    manifest.save(directory)
    return generator, summary


def test_every_sample_is_written_once_in_order(recipe: Recipe, record: TargetRecord, tmp_path: Path) -> None:
    generator, _ = _run(recipe, record, tmp_path / "a", [0, 1])
    rows = [*read_trajectories(tmp_path / "a"), *read_quarantine(tmp_path / "a")]
    assert sorted((row.meta["index"], row.meta["sample"]) for row in rows) == [(i, n) for i in range(8) for n in (0, 1)]
    assert len({row.sample_id for row in rows}) == 16
    assert {row.error for row in rows if row.meta["index"] == 3} == {"prompt: must not be empty"}
    assert all(row.response_ids[1:] == [2] and row.num_forwards == 2 for row in rows if row.error is None)
    cut = [row for row in rows if row.finish_reason == "abort"]
    assert cut
    assert {row.error for row in cut} == {"the engine ended it with 'abort'"}
    assert generator._engine.most_waiting > 8, "samples of both shards were in flight together"


def test_samples_do_not_depend_on_how_shards_are_grouped(recipe: Recipe, record: TargetRecord, tmp_path: Path) -> None:
    _run(recipe, record, tmp_path / "together", [0, 1])
    for shard in (1, 0):
        _run(recipe, record, tmp_path / "apart", [shard])
        (tmp_path / "apart" / "manifest.json").unlink()
    _run(recipe, record, tmp_path / "apart", [0, 1])
    assert list(read_trajectories(tmp_path / "together")) == list(read_trajectories(tmp_path / "apart"))


def test_a_finished_shard_is_not_done_again(recipe: Recipe, record: TargetRecord, tmp_path: Path) -> None:
    _, first = _run(recipe, record, tmp_path / "a", [0, 1])
    generator, second = _run(recipe, record, tmp_path / "a", [0, 1])
    assert generator._engine.most_waiting == 0
    assert first["sha256"].tolist() == second["sha256"].tolist()


def test_a_shard_of_the_run_before_is_done_anew(recipe: Recipe, record: TargetRecord, tmp_path: Path) -> None:
    directory = tmp_path / "a"
    _, first = _run(recipe, record, directory, [0, 1])
    (directory / RUN_ID_FILE).write_text("another-run")
    later = Generator(recipe, str(directory), record, "another-run", 0.0, EchoEngine)
    summary = asyncio.run(later({"shard": np.array([0, 1])}))
    assert later._engine.most_waiting > 8
    assert summary["sha256"].tolist() != first["sha256"].tolist()
    now = {shard: shard_path(directory, shard).read_bytes() for shard in (0, 1)}
    straggler = Generator(recipe, str(directory), record, RUN_ID, 0.0, EchoEngine)
    with pytest.raises(UserError, match="was started over by another run"):
        asyncio.run(straggler({"shard": np.array([0, 1])}))
    assert {shard: shard_path(directory, shard).read_bytes() for shard in (0, 1)} == now


def test_attempts_survive_the_process_that_made_them(tmp_path: Path) -> None:
    attempts = Attempts.load(tmp_path, 3)
    attempts.begin()
    attempts.begin_row(0)
    attempts.end_row(0)
    attempts.begin_row(1)
    again = Attempts.load(tmp_path, 3)
    assert (again.shard, again.of_row(0), again.of_row(1)) == (1, 0, 1)
    again.clear()
    assert Attempts.load(tmp_path, 3).shard == 0


def test_another_target_on_the_node_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    other = TargetRecord(
        revision="x", tokenizer_hash="x", chat_template_hash="x", vocab_size=1, hidden_size=1, num_layers=1
    )
    with pytest.raises(CheckpointError, match="another model on this node"):
        Generator(recipe, str(tmp_path), other, RUN_ID, 0.0, EchoEngine)


async def test_gate_keeps_one_alone_and_does_not_starve_it() -> None:
    gate, log = Gate(), []

    async def together(name: str) -> None:
        async with gate.together():
            log.append(f"+{name}")
            await asyncio.sleep(0.02)
            log.append(f"-{name}")

    async def alone() -> None:
        await asyncio.sleep(0.01)
        async with gate.alone():
            log.append("+alone")
            await asyncio.sleep(0.02)
            log.append("-alone")

    async def late() -> None:
        await asyncio.sleep(0.015)
        await together("late")

    await asyncio.gather(together("a"), together("b"), alone(), late())
    assert log == ["+a", "+b", "-a", "-b", "+alone", "-alone", "+late", "-late"]
