"""Pipelines as jobs of a real cluster with token authentication: exit codes, logs, a stop, and what is sent along."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.cluster_tools import BIN, ROOT, Head, ray_head, wait_until
from unmask.manifest import shard_sizes
from unmask.trajectories import read_trajectories

TINY = {
    "target": {"max_model_len": 256},
    "prompts": {"source": "demo", "limit": 48},
    "generate": {"max_new_tokens": 48, "rows_per_shard": 2, "dtype": "float32"},
    "draft": {"num_layers": 1, "block_size": 4, "num_target_features": 2},
    "distill": {"max_steps": 4, "sequences_per_step": 1, "anchors_per_sequence": 4, "head_negatives": 64},
    "evaluate": {"prompts": 2, "prompts_new_templates": 1, "max_new_tokens": 16},
    "serve": {"dtype": "float32", "port": 0, "max_num_seqs": 4},
}


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head("--num-cpus=4", "--dashboard-host=127.0.0.1") as head:
        yield head


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe outside the working directory, as on storage that all nodes share."""
    folder = tmp_path_factory.mktemp("shared")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(folder / "run")} | TINY))
    return path


def job(head: Head, *arguments: str, timeout: float = 560) -> subprocess.CompletedProcess[str]:
    """`ray job ...` as a user types it."""
    command = [str(BIN / "ray"), "job", arguments[0], "--address", head.dashboard, *arguments[1:]]
    return subprocess.run(
        command, env=head.environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )


def submit(head: Head, *command: str, name: str, wait: bool = True) -> subprocess.CompletedProcess[str]:
    options = ["--submission-id", name, "--working-dir", ".", *([] if wait else ["--no-wait"])]
    return job(head, "submit", *options, "--", "python", "-m", *command)


def info(head: Head, name: str) -> dict[str, object]:
    token = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    answer = httpx.get(f"{head.dashboard}/api/jobs/{name}", headers={"Authorization": f"Bearer {token}"}, timeout=30)
    return answer.raise_for_status().json()


def test_nobody_without_the_token_is_answered(head: Head) -> None:
    for path in ("/api/jobs/", "/api/cluster_status", "/nodes?view=summary"):
        assert httpx.get(f"{head.dashboard}{path}", timeout=30).status_code == 401
    sent = {"entrypoint": "true"}
    assert httpx.post(f"{head.dashboard}/api/jobs/", json=sent, timeout=30).status_code == 401
    wrong = {"Authorization": f"Bearer {'0' * 64}"}
    assert httpx.post(f"{head.dashboard}/api/jobs/", json=sent, headers=wrong, timeout=30).status_code in (401, 403)


def test_a_wrong_recipe_ends_the_job_with_2_and_one_line(head: Head, recipe: Path) -> None:
    ended = submit(head, "pipelines.generate", str(recipe), "generate.max_actor=2", name="wrong")
    assert ended.returncode == 1
    assert info(head, "wrong")["driver_exit_code"] == 2
    logs = job(head, "logs", "wrong").stdout
    assert [line for line in logs.splitlines() if "error" in line] == [
        "error: generate.max_actor: unknown key (did you mean 'max_actors'?)"
    ]
    assert "Traceback" not in logs


def test_the_plan_is_printed_and_nothing_is_done(head: Head, recipe: Path) -> None:
    ended = submit(head, "pipelines.run", str(recipe), "--plan", name="plan")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "# generate: 1 x (" in ended.stdout
    assert not (recipe.parent / "run").exists()


def test_the_working_directory_is_small(head: Head, recipe: Path) -> None:
    ended = submit(head, "pipelines.generate", str(recipe), "--plan", name="size")
    assert ended.returncode == 0
    package = max(head.folder.glob("session_*/runtime_resources/working_dir_files/_ray_pkg_*/"), key=_modified)
    assert (package / "pipelines" / "generate.py").is_file()
    assert (package / "recipes" / "demo.yaml").is_file()
    assert not (package / "tests").exists()
    assert sum(file.stat().st_size for file in package.rglob("*") if file.is_file()) < 5e6


@pytest.mark.slow
def test_a_stopped_job_is_gone_on_with(head: Head, recipe: Path) -> None:
    directory = recipe.parent / "run" / "trajectories"
    # One row after another, so that there is time to stop it.
    submit(head, "pipelines.generate", str(recipe), "target.engine.max_num_seqs=1", name="stopped", wait=False)
    wait_until(lambda: len(shard_sizes(directory)) >= 2, 200)
    assert job(head, "stop", "stopped").returncode == 0
    wait_until(lambda: info(head, "stopped")["status"] == "STOPPED", 60)
    logs = job(head, "logs", "stopped").stdout
    assert re.search(r"generate: \d+/48 rows, .* rows/s, .* tokens/s", logs)
    finished = shard_sizes(directory)
    assert 2 <= len(finished) < 24

    ended = submit(head, "pipelines.generate", str(recipe), name="resumed")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    resumed = re.search(r"48 trajectories, 0 quarantined, \d+ tokens \(.*, (\d+) shards resumed\)", ended.stdout)
    assert resumed is not None
    assert int(resumed[1]) >= len(finished)
    rows = list(read_trajectories(recipe.parent / "run"))
    assert sorted(row.meta["index"] for row in rows) == list(range(48))


@pytest.mark.slow
def test_a_demand_that_no_node_meets_ends_the_job_with_3(head: Head, recipe: Path) -> None:
    source = [str(recipe), f"run_dir={recipe.parent / 'nowhere'}", "generate.labels={role: generate}"]
    ended = submit(head, "pipelines.generate", *source, name="nowhere")
    assert info(head, "nowhere")["driver_exit_code"] == 3
    assert "error: generate: no node is labelled role=generate\n" in ended.stdout


def test_without_a_cluster_what_this_machine_lacks_is_the_recipes_mistake(recipe: Path) -> None:
    asked = [str(recipe), f"run_dir={recipe.parent / 'alone'}", "generate.labels={role: generate}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ended = subprocess.run(
        [sys.executable, "-m", "pipelines.generate", *asked],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert "error: generate: no node is labelled role=generate; this machine is all there is" in ended.stderr


WAITS = """
import sys, time
from actors.cluster import connect
from pipelines.cli import run_pipeline

def wait(invocation):
    connect()
    print("connected", flush=True)
    time.sleep(300)

sys.exit(run_pipeline(wait, sys.argv[1:]))
"""


def test_sigterm_is_ctrl_c_without_a_cluster_too(recipe: Path) -> None:
    """Ray's own handler would end the private cluster first, and the work would fail for want of it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", WAITS, str(recipe)]
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout.readline() == "connected\n"
        driver.terminate()
        _, errors = driver.communicate(timeout=120)
    assert driver.returncode == 130, errors
    assert [line for line in errors.splitlines() if "SIGTERM" in line] == []
    assert errors.splitlines()[-1].endswith("stopped; run the same command again to go on from here")


@pytest.mark.slow
def test_the_whole_line_is_one_job(head: Head, recipe: Path) -> None:
    ended = submit(head, "pipelines.run", str(recipe), name="line")
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]
    assert info(head, "line")["driver_exit_code"] == 0
    report = json.loads((recipe.parent / "run" / "report.json").read_text())
    assert report["serve"]["identical"] == report["serve"]["requests"] == 3
    assert report["serve"]["draft_returned"]


def _modified(path: Path) -> float:
    return path.stat().st_mtime
