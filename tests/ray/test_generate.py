"""Generation on a real cluster with a real engine: poisoned rows, dying engines, a killed driver."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.cloudpickle
import yaml

from actors.cluster import FaultError, connect
from engines.offline_engine import Completion, OfflineEngine
from pipelines.generate import GenerateReport, generate
from unmask.config import Recipe
from unmask.errors import UserError
from unmask.manifest import shard_path, shard_sizes
from unmask.recipe import parse_recipe
from unmask.trajectories import read_quarantine, read_trajectories
from unmask.types import SamplingOptions, Trajectory

ROOT = Path(__file__).parents[2]
GOOD = [f"Name {n} animals." for n in range(20)]
POISONED: list[Any] = ["", 7, "a <|im_start|> b"]
KILLER = "End the engine."
KILLER_TOKENS = 10_000


class MortalEngine(OfflineEngine):
    """A real engine whose process ends without a word when it meets a certain prompt."""

    def submit(self, prompt_ids: tuple[int, ...], options: SamplingOptions) -> Future[Completion]:
        if KILLER_TOKENS in prompt_ids:
            os._exit(9)
        return super().submit(prompt_ids, options)


class SlowEngine:
    """Takes five seconds a row; `silent` never answers."""

    silent = False

    def __init__(self, arguments: dict[str, Any], *, on_gpu: bool = False) -> None:
        self._pool = ThreadPoolExecutor(1)

    def submit(self, prompt_ids: tuple[int, ...], options: SamplingOptions) -> Future[Completion]:
        return Future() if self.silent else self._pool.submit(self._answer)

    def _answer(self) -> Completion:
        time.sleep(5)
        return Completion([5, 2], "stop")


class SilentEngine(SlowEngine):
    silent = True


def _write(path: Path, prompts: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def _tree(source: Path) -> dict[str, Any]:
    return {
        "target": {"max_model_len": 128, "engine": {"max_num_seqs": 4}},
        "prompts": {"source": str(source)},
        "generate": {
            "max_new_tokens": 8,
            "temperature": 0.8,
            "top_k": 20,
            "dtype": "float32",
            "rows_per_shard": 2,
            "max_attempts": 1,
        },
    }


def _run(recipe: Recipe, run_dir: Path, **options: Any) -> tuple[GenerateReport, dict[int, Trajectory]]:
    """Generate, and give the trajectories by the number of their source row, each exactly once."""
    report = generate(recipe, run_dir, **options)
    rows = list(read_trajectories(run_dir))
    by_row = {row.meta["index"]: row for row in rows}
    assert len(by_row) == len(rows) == len({row.sample_id for row in rows}) == report.rows
    return report, by_row


@pytest.fixture(scope="module", autouse=True)
def cluster() -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    connect(num_cpus=4)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="u"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def survived(folder: Path) -> dict[int, Trajectory]:
    """Trajectories of a run that met poisoned rows and a row that ends its engine."""
    from transformers import AutoTokenizer

    from unmask.targets import resolve_target

    word = AutoTokenizer.from_pretrained(resolve_target(Recipe().target.model)).decode([KILLER_TOKENS])
    source = _write(folder / "poisoned.jsonl", [*GOOD, *POISONED, f"{KILLER}{word}"])
    report, rows = _run(parse_recipe(_tree(source)), folder / "poisoned", engine_factory=MortalEngine)
    assert (report.rows, report.quarantined, report.resumed_shards) == (20, 4, 0)
    assert report.tokens == sum(len(row.response_ids) for row in rows.values())
    assert report.tokens_per_second > 0
    return rows


def test_bad_rows_are_quarantined_and_the_rest_goes_on(survived: dict[int, Trajectory], folder: Path) -> None:
    assert sorted(survived) == list(range(20))
    assert all(row.response_ids and row.finish_reason in ("stop", "length") for row in survived.values())
    errors = {row.meta["index"]: row.error for row in read_quarantine(folder / "poisoned")}
    assert errors == {
        20: "prompt: must not be empty",
        21: "prompt: must be text or a list of chat messages, not int",
        22: "prompt: holds the control token '<|im_start|>'; remove it",
        23: "the engine died 1 times on this row",
    }
    assert not list((folder / "poisoned" / "trajectories" / "attempts").iterdir())


@pytest.mark.slow
def test_killed_driver_is_resumed_without_loss_or_change(survived: dict[int, Trajectory], folder: Path) -> None:
    tree = _tree(_write(folder / "good.jsonl", GOOD)) | {"run_dir": str(folder / "killed")}
    recipe_path = folder / "recipe.yaml"
    recipe_path.write_text(yaml.safe_dump(tree))
    directory = folder / "killed" / "trajectories"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"TMPDIR": str(folder)}
    driver = subprocess.Popen([sys.executable, "-m", "pipelines.generate", str(recipe_path)], cwd=ROOT, env=environment)
    try:
        _wait(lambda: len(shard_sizes(directory)) >= 3, 120)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    _wait(lambda: not _actors_in(folder), 120)
    finished = {shard: shard_path(directory, shard).read_bytes() for shard in shard_sizes(directory)}
    assert 3 <= len(finished) < 10

    report, rows = _run(parse_recipe(tree), folder / "killed")
    assert report.resumed_shards == len(finished)
    assert {shard: shard_path(directory, shard).read_bytes() for shard in finished} == finished
    assert rows.keys() == survived.keys()
    # Seeds are per row and the engine computes in float32, so rows are the same in every run.
    assert [rows[n].response_ids for n in rows] == [survived[n].response_ids for n in rows]
    assert [rows[n].sample_id for n in rows] == [survived[n].sample_id for n in rows]


def test_finished_run_has_nothing_to_do_and_refuses_other_settings(
    survived: dict[int, Trajectory], folder: Path
) -> None:
    tree = _tree(folder / "poisoned.jsonl")
    report, rows = _run(parse_recipe(tree | {"generate": tree["generate"] | {"max_actors": 3}}), folder / "poisoned")
    assert (report.resumed_shards, report.rows) == (12, 20)
    assert rows == survived
    tree["generate"]["seed"] = 1
    with pytest.raises(UserError, match=r"^generate\.seed: is 1, but .* was started with 0"):
        generate(parse_recipe(tree), folder / "poisoned")


@pytest.mark.slow
@pytest.mark.parametrize("engine", [SlowEngine, SilentEngine])
def test_only_a_run_that_hangs_is_ended(folder: Path, monkeypatch: pytest.MonkeyPatch, engine: type[Any]) -> None:
    monkeypatch.setattr(ray.data.DataContext.get_current(), "execution_no_progress_timeout_s", 28)
    tree = _tree(_write(folder / "slow.jsonl", GOOD[:8]))
    tree["generate"] |= {"rows_per_shard": 8, "max_new_tokens": 2}
    recipe = parse_recipe(tree)
    if engine is SilentEngine:
        with pytest.raises(FaultError, match=r"^no actor has finished a row for 30 s"):
            generate(recipe, folder / "silent", engine_factory=engine)
    else:
        # Its one task takes longer than the limit.
        report, _ = _run(recipe, folder / "slow", engine_factory=engine)
        assert report.seconds > 40


def test_options_that_the_engine_refuses_are_the_users_error(folder: Path) -> None:
    tree = _tree(_write(folder / "one.jsonl", GOOD[:1]))
    tree["target"]["engine"] = {"max_num_seqs": -1}
    with pytest.raises(UserError, match=r"^target\.engine: vLLM refuses the engine options"):
        generate(parse_recipe(tree), folder / "refused")


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited for {seconds} s"
        time.sleep(0.02)


def _actors_in(folder: Path) -> list[Path]:
    """Generation actors of the private cluster with this temporary folder; they outlive a killed driver briefly."""
    setting = f"TMPDIR={folder}".encode()
    processes = [path.parent for path in Path("/proc").glob("[0-9]*/environ") if setting in _read(path)]
    return [path for path in processes if b"MapWorker" in _read(path / "cmdline")]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
