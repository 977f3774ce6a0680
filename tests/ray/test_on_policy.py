"""Generate, distil, publish, hot swap, capture, distil: one recipe, really served; and the gate on what came of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fault.tiny import save_tiny_target
from unmask.capture import ACCEPTED, REJECTED
from unmask.checkpoints import check_pairing
from unmask.targets import describe_target
from unmask.trajectories import read_trajectories

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

REQUESTS = 12
RECIPE: dict[str, Any] = {
    "prompts": {"source": "demo", "limit": 8},
    "generate": {"max_new_tokens": 20, "temperature": 0.0, "rows_per_shard": 8, "dtype": "float32"},
    "draft": {"num_layers": 1, "block_size": 4, "num_target_features": 1},
    "distill": {
        "max_seconds": None, "max_steps": 40, "sequences_per_step": 8, "anchors_per_sequence": 20,
        "precision": "float32", "head_negatives": None, "learning_rate": 5e-3, "threads_per_worker": 1,
        "confidence_weight": 0.5,
    },
    # The draft knows these prompts by heart: on others a random target cannot be foreseen.
    "evaluate": {"prompts": 4, "prompts_new_templates": 0, "max_new_tokens": 20, "new_items": {"split": "train"}},
    "serve": {"dtype": "float32", "port": 0, "max_num_seqs": 4, "draft_retry_s": 0.2, "adaptive_k": False},
    "on_policy": {"rounds": 1, "requests": REQUESTS, "clients": 4},
}  # fmt: skip


def run(stage: str, recipe: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"pipelines.{stage}", str(recipe), *overrides],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_target(tmp_path_factory.mktemp("t") / "target")


@pytest.fixture(scope="module")
def recipe(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    engine = {"kv_cache_memory_bytes": 1 << 26, "enforce_eager": True}
    tree = RECIPE | {"target": {"model": str(target), "max_model_len": 256, "engine": engine}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree | {"run_dir": str(folder / "run")}))
    return path


@pytest.fixture(scope="module")
def drafts(recipe: Path) -> list[dict[str, Any]]:
    """The report of a whole run."""
    finished = run("on_policy", recipe)
    assert finished.returncode == 0, finished.stderr
    sys.stdout.write(finished.stdout)
    assert finished.stderr.count(" is live") == 1
    return json.loads((recipe.parent / "run" / "on_policy.json").read_text())


def test_the_loop_is_closed(recipe: Path, target: Path, drafts: list[dict[str, Any]]) -> None:
    run_dir, record = recipe.parent / "run", describe_target(target)
    assert len(drafts) == 2
    assert drafts[0]["version"] != drafts[1]["version"]
    for draft in drafts:
        check_pairing(draft["path"], record)
        assert draft["served"]["requests"] == REQUESTS
    rows = list(read_trajectories(run_dir / "round-1"))
    assert drafts[1]["sequences"] == len(rows) == REQUESTS
    generated = {tuple(row.prompt_ids): row.response_ids for row in read_trajectories(run_dir)}
    # Greedy text is the target's own, whatever was drafted; what was rejected is known.
    assert all(row.response_ids == generated[tuple(row.prompt_ids)] for row in rows)
    assert sum(len(row.meta[REJECTED]) for row in rows) == drafts[0]["served"]["rejections"] > 0
    assert all(row.meta[ACCEPTED] for row in rows)
    tau = [draft["served"]["acceptance_length"] for draft in drafts]
    assert min(tau) > 1
    # The prompts that drafts are compared with are the evaluated ones, and drawn greedily here: as in the evaluation.
    for draft in drafts:
        held_out = draft["served"]["acceptance_length_held_out"]
        assert held_out == pytest.approx(draft["evaluated"]["new_items"], rel=0.03)
    assert drafts[1]["evaluated"]["new_items"] > drafts[0]["evaluated"]["new_items"]
    # The head was trained on greedy text, as is decoded: it is heard, and knows more than a coin.
    for folder in (run_dir, run_dir / "round-1"):
        report = json.loads((folder / "evaluation" / "evaluation.json").read_text())["sets"]["new_items"]
        assert 0 < report["confidence_error"] < 0.25
    again = run("on_policy", recipe)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("complete and unchanged, skipped") == 9


def test_the_gate_lets_a_sound_pairing_through_and_names_shifted_layers(
    recipe: Path, drafts: list[dict[str, Any]], tmp_path: Path
) -> None:
    run_dir = f"run_dir={recipe.parent / 'run' / 'round-1'}"
    passed = run("gate", recipe, run_dir, f"serve.draft={drafts[1]['path']}")
    assert passed.returncode == 0, passed.stderr
    assert "passed: 4/4 identical" in passed.stdout
    wrong = tmp_path / "wrong"
    shutil.copytree(drafts[1]["path"], wrong)
    tree = json.loads((wrong / "config.json").read_text())
    shifted = [layer + 1 for layer in tree["dflash_config"]["target_layer_ids"]]
    tree["dflash_config"]["target_layer_ids"] = tree["unmask_target"]["trained_layer_ids"] = shifted
    (wrong / "config.json").write_text(json.dumps(tree))
    refused = run("gate", recipe, run_dir, f"serve.draft={wrong}")
    assert refused.returncode == 2, refused.stderr
    message = refused.stderr.splitlines()[-1]
    assert message.startswith("error: gate.acceptance_length: served ")
    assert "likely cause: layer ids: the draft names layers +1 from those that were evaluated" in message
