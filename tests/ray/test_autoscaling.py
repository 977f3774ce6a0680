"""Node types that stages bring up and give back: the real autoscaler, whose nodes are raylets on this machine."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster_tools import ROOT, Head, fake_cluster
from tests.ray.scaling_driver import GONE_S, UP_S

pytestmark = pytest.mark.slow

logger = logging.getLogger(__name__)

NEVER = "no node and no node type of the autoscaler has that"
ROLES = ("generate", "train", "serve-target", "serve-draft")
NODE_TYPES = {
    role: {
        "resources": {"CPU": 4, "GPU": 1},
        "labels": {"role": role},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 2,
    }
    for role in ROLES
}


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with fake_cluster(NODE_TYPES, idle_s=6) as head:
        yield head


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of two actors that take 20 seconds for four rows: half of the rows are left to the later one."""
    write_recipe(tmp_path, rows=8, min_actors=2, seconds=20, max_num_seqs=1)
    return tmp_path


def write_recipe(folder: Path, *, rows: int, min_actors: int, seconds: int, max_num_seqs: int) -> None:
    """A recipe that asks for generation nodes: equal nodes of three other types are there to be taken wrongly."""
    source = folder / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"Count to {n}."}) + "\n" for n in range(rows)))
    recipe = {
        "run_dir": str(folder / "run"),
        "target": {"engine": {"max_num_seqs": max_num_seqs}},
        "prompts": {"source": str(source)},
        "generate": {
            "max_new_tokens": seconds,
            "rows_per_shard": 1,
            "min_actors": min_actors,
            "max_actors": 2,
            "gpus_per_actor": 1,
            "labels": {"role": "generate"},
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def run(head: Head, *command: str, seconds: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        env=head.environment | {"RAY_ADDRESS": head.address},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def drive(head: Head, stage: str, folder: Path) -> dict[str, Any]:
    ended = run(head, "tests.ray.scaling_driver", stage, str(folder), seconds=280)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    logger.info("%s: %s", stage, ended.stdout.splitlines()[-1])
    return json.loads(ended.stdout.splitlines()[-1])


def test_pending_generation_actors_bring_up_generation_nodes_alone(head: Head, folder: Path) -> None:
    seen = drive(head, "generation", folder)
    assert seen["rows"] == 8
    assert seen["engines"] == 2
    assert seen["most"] == {"generate": 2}
    assert seen["up_s"] < UP_S
    assert seen["gone_s"] < GONE_S


def test_more_work_than_one_actor_does_brings_up_a_second_node(head: Head, tmp_path: Path) -> None:
    write_recipe(tmp_path, rows=60, min_actors=1, seconds=6, max_num_seqs=1)
    seen = drive(head, "generation", tmp_path)
    assert seen["rows"] == 60
    assert seen["engines"] == 2
    assert seen["most"] == {"generate": 2}
    assert seen["up_s"] < UP_S
    assert seen["gone_s"] < GONE_S


def test_target_and_draft_bring_up_their_own_nodes_and_scale_apart(head: Head, folder: Path) -> None:
    seen = drive(head, "service", folder)
    assert seen["most"] == {"serve-target": 2, "serve-draft": 2}
    # Further replicas come and go within the same bounds, or the driver fails.
    assert seen["up_s"] < UP_S
    assert seen["gone_s"] < GONE_S


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("generate", "generate.labels={role: genrate}", f"generate: needs 1 CPU, 1 GPU on role=genrate; {NEVER}"),
        ("generate", "generate.gpus_per_actor=3", f"generate: needs 1 CPU, 3 GPU on role=generate; {NEVER}"),
        ("serve", "serve.target_labels={role: tagret}", f"serve.target: needs 1 CPU on role=tagret; {NEVER}"),
        (
            "serve",
            "serve.ingress_labels={role: haed}",
            "serve.ingress: no node is labelled role=haed, "
            "and no node type is brought up for a process that takes no CPU",
        ),
    ],
)
def test_what_no_node_type_offers_ends_the_job_by_name(
    head: Head, folder: Path, stage: str, override: str, message: str
) -> None:
    ended = run(head, f"pipelines.{stage}", str(folder / "recipe.yaml"), override, seconds=GONE_S)
    assert ended.returncode == 3, ended.stderr
    assert ended.stderr.splitlines()[-1] == f"error: {message}"
