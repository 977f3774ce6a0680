"""One row that ends its engine: found by halving, blamed alone, and forgotten when its shard is finished."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import multiprocessing
import os
import re
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from actors.generator import Generator
from actors.suspects import Suspects, forget_finished
from engines.engine_thread import Completion, EngineDiedError
from unmask.attempts import Attempts
from unmask.config import EMBEDDED_TARGET, Recipe
from unmask.manifest import RUN_ID as RUN_ID_FILE
from unmask.manifest import Manifest
from unmask.recipe import parse_recipe
from unmask.staged_prompts import stage_prompts
from unmask.targets import describe_target, resolve_target
from unmask.trajectories import inspect_shard, read_quarantine, read_trajectories
from unmask.types import SamplingOptions, TargetRecord

DEADLY = 37
RUN_ID = "this-run"


@pytest.fixture(scope="module")
def record() -> TargetRecord:
    return describe_target(resolve_target(EMBEDDED_TARGET))


@functools.cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_target(EMBEDDED_TARGET))


def stage(recipe: Recipe, directory: Path) -> None:
    """What a driver does before there are actors."""
    stage_prompts(recipe.prompts, directory / "prompts", 32)
    (directory / RUN_ID_FILE).write_text(RUN_ID)


class MortalEngine:
    """Dies of a prompt as vLLM's does, all that it has in hand failing; what it is asked stands in a file."""

    asked: ClassVar[Path]

    def __init__(self, arguments: dict[str, Any], *, on_gpu: bool) -> None:
        self.in_hand: list[Future[Completion]] = []

    def submit(self, prompt_ids: tuple[int, ...], options: SamplingOptions) -> Future[Completion]:
        [number] = re.findall(r"p(\d+)", tokenizer().decode(prompt_ids))
        with self.asked.open("a") as file:
            file.write(f"{os.getpid()} {number}\n")
        future: Future[Completion] = Future()
        self.in_hand.append(future)
        if int(number) == DEADLY:
            asyncio.get_running_loop().call_later(0.1, self._die)
        elif int(number) % 2:
            # The others are not done before it dies.
            asyncio.get_running_loop().call_later(0.3, self._end, future, int(number))
        else:
            future.set_result(Completion([int(number), 2], "stop"))
        return future

    def _die(self) -> None:
        for future in self.in_hand:
            if not future.done():
                future.set_exception(EngineDiedError("the engine stopped"))

    def _end(self, future: Future[Completion], number: int) -> None:
        if not future.done():
            future.set_result(Completion([number, 2], "stop"))


@pytest.fixture
def deadly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Two shards of 32 rows, one of which, in the second, is deadly."""
    monkeypatch.setattr(MortalEngine, "asked", tmp_path / "asked", raising=False)
    MortalEngine.asked.touch()
    tokenizer()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{n}"}) + "\n" for n in range(64)))
    return parse_recipe({"prompts": {"source": str(path)}, "generate": {"max_new_tokens": 4, "max_attempts": 2}})


def run_actor(recipe: Recipe, record: TargetRecord, directory: Path, shards: list[int]) -> bool:
    """Whether an actor, in a process of its own that ends with its engine, finished its shards."""

    def work() -> None:
        actor = Generator(recipe, str(directory), record, RUN_ID, 0.0, MortalEngine)
        asyncio.run(actor({"shard": np.array(shards)}))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode in (0, 1)
    return process.exitcode == 0


def asked() -> list[list[int]]:
    """Rows that engines were asked for, by engine in order."""
    engines: dict[str, list[int]] = {}
    for line in MortalEngine.asked.read_text().splitlines():
        process, number = line.split()
        engines.setdefault(process, []).append(int(number))
    return list(engines.values())


def test_a_deadly_row_is_found_by_halving(deadly: Recipe, record: TargetRecord, tmp_path: Path) -> None:
    directory = tmp_path / "a"
    stage(deadly, directory)
    ends = list(
        itertools.takewhile(
            lambda finished: not finished, (run_actor(deadly, record, directory, [0, 1]) for _ in range(12))
        )
    )
    assert len(ends) == 2 + 4 + 2, "with its shard; with 32 rows of which half are done by then, with 8, 4, 2; alone"
    manifest = Manifest()
    manifest.reconcile(directory, functools.partial(inspect_shard, run_id=RUN_ID))
    manifest.save(directory)
    rows = {row.meta["index"]: row for row in read_trajectories(directory)}
    assert sorted(rows) == [n for n in range(64) if n != DEADLY]
    assert all(row.response_ids == [n, 2] and row.finish_reason == "stop" for n, row in rows.items())
    [killed] = read_quarantine(directory)
    assert (killed.meta["index"], killed.error) == (DEADLY, "the engine died 2 times on this row")
    assert not list((directory / "attempts").iterdir())
    assert [engine for engine in asked() if engine == [DEADLY]] == [[DEADLY]] * 2
    assert sum(0 in engine for engine in asked()) == 3, "a shard that was only there runs once more, in one piece"


def test_shards_that_wait_are_not_blamed(deadly: Recipe, record: TargetRecord, tmp_path: Path) -> None:
    directory = tmp_path / "a"
    stage(deadly, directory)
    for shard in (0, 1):
        for _ in range(2):
            Attempts.load(directory, shard).begin()
    assert not run_actor(deadly, record, directory, [1, 0])
    assert sorted(asked()[0]) == list(range(32, 64))
    assert [path.name for path in (directory / "attempts").glob("*.jsonl")] == [f"shard-0000001-{RUN_ID}.jsonl"]


def test_what_is_finished_is_not_asked_for_again(deadly: Recipe, record: TargetRecord, tmp_path: Path) -> None:
    directory = tmp_path / "a"
    stage(deadly, directory)
    assert not any(run_actor(deadly, record, directory, [0, 1]) for _ in range(4))
    known = Suspects(directory, RUN_ID, Attempts.load(directory, 1), 32)
    assert 16 <= len(known.done) < 32
    assert all(row.response_ids == [32 + position, 2] for position, row in known.done.items())
    before = len(asked())
    assert not run_actor(deadly, record, directory, [0, 1])
    [again] = asked()[before:]
    assert DEADLY in again
    assert not {n - 32 for n in again} & known.done.keys()


def test_suspects_survive_a_line_cut_short(tmp_path: Path) -> None:
    attempts = Attempts.load(tmp_path, 3)
    suspects = Suspects(tmp_path, RUN_ID, attempts, 8)
    assert suspects.next_group() == list(range(8))
    suspects.begin(list(range(8)))
    path = tmp_path / "attempts" / f"shard-0000003-{RUN_ID}.jsonl"
    path.write_bytes(path.read_bytes() + b'{"row": 3, "traj')
    again = Suspects(tmp_path, RUN_ID, attempts, 8)
    assert again.next_group() == [0, 1, 2, 3]
    again.begin([0, 1, 2, 3])
    assert Suspects(tmp_path, RUN_ID, attempts, 8).next_group() == [0, 1]
    assert Suspects(tmp_path, "another-run", attempts, 8).next_group() == list(range(8))


def test_what_is_known_goes_with_its_shard_only(tmp_path: Path) -> None:
    for shard in (3, 12_345_678):
        attempts = Attempts.load(tmp_path, shard)
        attempts.begin()
        Suspects(tmp_path, RUN_ID, attempts, 8).begin([0, 1])
    forget_finished(tmp_path, {3, 4})
    left = sorted(path.name for path in (tmp_path / "attempts").iterdir())
    assert left == [f"shard-12345678-{RUN_ID}.jsonl", "shard-12345678.json"]
