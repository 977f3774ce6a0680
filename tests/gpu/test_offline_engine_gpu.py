"""On a GPU the engine of generation is a process of its own, which goes with the one that started it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

GENERATE = """
from engines.engine_options import engine_arguments
from engines.offline_engine import OfflineEngine
from unmask.config import TargetConfig
from unmask.targets import resolve_target
from unmask.types import SamplingOptions

if __name__ == "__main__":
    target = TargetConfig(max_model_len=128, engine={"gpu_memory_utilization": 0.2, "enforce_eager": True})
    path = resolve_target(target.model)
    engine = OfflineEngine(engine_arguments(target, path, dtype="float32", on_gpu=True), on_gpu=True)
    futures = [engine.submit([1, 2, n], SamplingOptions(max_tokens=n, ignore_eos=True)) for n in (3, 5)]
    print([len(future.result().token_ids) for future in futures])
"""


def test_a_process_that_does_not_close_its_engine_ends(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    script = tmp_path / "generate.py"
    script.write_text(GENERATE)
    ended = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, timeout=240, check=True)
    # vLLM may log its own end after it.
    assert "[3, 5]" in ended.stdout.splitlines()
