"""The whole line on one GPU: what is served, by vLLM's V2 runner and a draft beside it, is what was evaluated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unmask.capture import ACCEPTED, CACHED, read_captured

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(700)]

ROOT = Path(__file__).parents[2]
OVERRIDES = (
    "target.engine={gpu_memory_utilization: 0.2, kv_cache_memory_bytes: 4294967296, enable_prefix_caching: true}",
    "generate.gpus_per_actor=1",
    "distill.use_gpu=true",
    "distill.max_seconds=30",
    "evaluate.use_gpu=true",
    "evaluate.num_workers=1",
    "serve.target_gpus=0.5",
    "serve.draft_gpus=0.5",
)


def test_the_gate_lets_through_what_was_evaluated(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines.run", "recipes/demo.yaml", f"run_dir={tmp_path}", *OVERRIDES]
    # Products in full float32: text is compared token for token with the plain loop's.
    exact = {"NVIDIA_TF32_OVERRIDE": "0", "TRITON_F32_DEFAULT": "ieee"}
    said = tmp_path / "said.log"
    with said.open("w") as log:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=os.environ | exact, stdout=log, stderr=log, timeout=640, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    assert code == 0, said.read_text()[-8000:]
    served = json.loads((tmp_path / "report.json").read_text())["serve"]
    assert served["requests"] == served["identical"] == 2 * served["draft_killed_identical"]
    assert served["draft_returned"]
    rows = list(read_captured(tmp_path / "gate"))
    assert all(row.meta[ACCEPTED] for row in rows)
    assert any(row.meta[CACHED] for row in rows)
