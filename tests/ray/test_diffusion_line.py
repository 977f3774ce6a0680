"""A toy through the diffusion line: adapted, answering, distilled, measured, published; SIGKILL in two stages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.cluster import connect
from pipelines.adapt import adapt
from pipelines.distill import distill
from pipelines.evaluate import evaluate
from pipelines.generate import generate
from pipelines.publish import publish
from pipelines.student_evaluation import StudentReport
from unmask.config import Recipe
from unmask.diffusion_checkpoints import read_lineage
from unmask.manifest import shard_path, shard_sizes
from unmask.models import families
from unmask.recipe import load_recipe
from unmask.training.training_log import read_log
from unmask.trajectories import read_quarantine, read_trajectories
from unmask.verification.numbers import final_number

ROOT = Path(__file__).parents[2]
ROWS, LENGTH, STEPS = 150, 8, 200
TRAINING = {
    "response_length": LENGTH, "max_seconds": None, "sequences_per_step": 4, "precision": "float32",
    "log_every_steps": 1, "checkpoint_every_s": 0.2, "threads_per_worker": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine answers to learn by heart; of the prompts, two cannot be used."""
    folder = tmp_path_factory.mktemp("line")
    texts = [{"prompt": f"copy {n % 9 + 1}", "response": f"{n % 9 + 1}"} for n in range(90)]
    prompts: list[dict[str, Any]] = [{"prompt": f"copy {n % 9 + 1}", "answer": n % 9 + 1} for n in range(ROWS)]
    prompts += [{"prompt": "copy 1"}, {"prompt": "a <|mask|> b", "answer": 1}]
    for name, rows in (("texts", texts), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"source": str(folder / "prompts.jsonl")}
    tree = {
        "run_dir": str(folder / "run"),
        "target": {"model": "embedded:toy", "max_model_len": 32, "engine": {"max_rows": 1}},
        "prompts": source,
        "adapt": {
            **TRAINING,
            "data": {"source": str(folder / "texts.jsonl")},
            "sequences_per_step": 18,
            "learning_rate": 3e-3,
            "max_steps": 100,
            "checkpoint_every_s": 60,
        },
        "generate": {
            "decoder": {"name": "one_token", "block_size": LENGTH},
            "max_new_tokens": LENGTH,
            "temperature": 0.9,
            "rows_per_shard": 1,
            "dtype": "float32",
            "verifier": "number",
        },
        "student": {**TRAINING, "block_size": LENGTH, "max_steps": STEPS, "lora": {"rank": 2}},
        "evaluate": {"new_items": source, "prompts": 9, "prompts_new_templates": 0},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def recipe(recipe_path: Path) -> Recipe:
    return load_recipe(recipe_path)


@pytest.fixture(scope="module")
def run_dir(recipe: Recipe) -> Path:
    """With its teacher."""
    connect(num_cpus=4)
    report = adapt(recipe, Path(recipe.run_dir))
    assert report.steps == 100
    assert report.loss_last < report.loss_first / 2
    return Path(recipe.run_dir)


def kill_when(stage: str, recipe_path: Path, condition: Callable[[], bool]) -> None:
    """Start a stage as a user does, in a session of its own, and kill all of it as soon as a condition holds."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", f"pipelines.{stage}", str(recipe_path)]
    victim = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    deadline = time.monotonic() + 180
    while not condition() and time.monotonic() < deadline:
        assert victim.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    assert condition()


@pytest.fixture(scope="module")
def trajectories(recipe: Recipe, recipe_path: Path, run_dir: Path) -> Path:
    """After a kill and a resume."""
    directory = run_dir / "trajectories"
    kill_when("generate", recipe_path, lambda: directory.is_dir() and len(shard_sizes(directory)) >= 3)
    finished = {shard: shard_path(directory, shard).read_bytes() for shard in shard_sizes(directory)}
    assert 3 <= len(finished) < ROWS
    report = generate(recipe, run_dir)
    assert (report.rows, report.quarantined) == (ROWS, 2)
    assert report.resumed_shards >= len(finished)
    assert {shard: shard_path(directory, shard).read_bytes() for shard in finished} == finished
    return directory


def test_a_killed_generation_loses_and_repeats_nothing(trajectories: Path, run_dir: Path) -> None:
    rows = list(read_trajectories(run_dir))
    assert [row.meta["index"] for row in rows] == list(range(ROWS))
    assert len({row.sample_id for row in rows}) == ROWS
    errors = {row.meta["index"]: row.error for row in read_quarantine(run_dir)}
    assert errors == {
        ROWS: "generate.reference: the row lacks the reference 'answer'",
        ROWS + 1: "prompt: holds the control token '<|mask|>'; remove it",
    }


def test_rows_say_how_they_were_decoded_and_whether_they_are_right(trajectories: Path, run_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run_dir / "teacher" / "final")
    rows = list(read_trajectories(run_dir))
    for row in rows:
        text = tokenizer.decode(row.response_ids, skip_special_tokens=True)
        assert row.verdict == (final_number(text) == row.meta["source"]["answer"])
        assert row.num_forwards == LENGTH
        assert row.commit_step is not None
        assert len(set(row.commit_step)) == len(row.commit_step) == len(row.response_ids)
    assert sum(bool(row.verdict) for row in rows) >= 4


def test_the_same_rows_come_again(trajectories: Path, recipe: Recipe, run_dir: Path, tmp_path: Path) -> None:
    """In another run, with rows side by side in the engine."""
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "final").symlink_to(run_dir / "teacher" / "final")
    together = load_recipe(run_dir.parent / "recipe.yaml", ["target.engine.max_rows=16", "generate.rows_per_shard=20"])
    generate(together, tmp_path)
    first, second = list(read_trajectories(run_dir)), list(read_trajectories(tmp_path))
    assert [(r.sample_id, r.response_ids, r.commit_step) for r in second] == [
        (r.sample_id, r.response_ids, r.commit_step) for r in first
    ]


@pytest.mark.slow
def test_a_killed_distillation_goes_on_and_its_result_is_published(
    trajectories: Path, recipe: Recipe, recipe_path: Path, run_dir: Path
) -> None:
    student = run_dir / "student"
    kill_when("distill", recipe_path, lambda: bool(list((student / "checkpoints").glob("step-*"))))
    before = {record["step"]: record["loss"] for record in read_log(student)}
    assert 0 < max(before) < STEPS
    report = distill(recipe, run_dir)
    assert report.steps == STEPS
    log = read_log(student)
    assert [record["step"] for record in log][-1] == STEPS
    # Steps that were taken twice came out the same to the last bit.
    assert all(record["loss"] == before[record["step"]] for record in log[len(before) :] if record["step"] in before)
    assert report.sequences == sum(bool(row.verdict) for row in read_trajectories(run_dir))

    teacher = families.load(run_dir / "teacher" / "final").state_dict()
    merged = families.load(student / "final").state_dict()
    assert merged.keys() == teacher.keys()
    changed = {name for name in teacher if not merged[name].equal(teacher[name])}
    assert changed
    assert all(".self_attn." in name or ".mlp." in name for name in changed)
    lineage = read_lineage(student / "final")
    assert lineage["made_by"] == "dparallel"
    assert lineage["source"] == str(run_dir / "teacher" / "final")

    measured = evaluate(recipe, run_dir)
    assert isinstance(measured, StudentReport)
    assert [(row["checkpoint"], row["decoder"]["name"], row["n"]) for row in measured.rows] == [
        ("teacher", "one_token", 9),
        ("teacher", "threshold", 9),
        ("student", "dparallel", 9),
    ]
    assert measured.rows[0]["nfe"] == LENGTH
    assert all(Path(plot).stat().st_size for plot in measured.plots)
    path = Path(publish(recipe, run_dir).path)
    assert families.load(path).mask_id == families.load(student / "final").mask_id
    assert "| new_items (9) | student | dparallel |" in (path / "README.md").read_text()


def test_another_setting_is_refused_by_name(recipe_path: Path, run_dir: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "pipelines.adapt", str(recipe_path), "adapt.seed=9"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1].startswith("error: adapt.seed: is 9, but")
