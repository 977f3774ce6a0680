"""On a GPU the engine of generation is a process of its own, which goes with the one that started it."""

from __future__ import annotations

import subprocess
import sys
import time
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
    print([len(future.result().token_ids) for future in futures], flush=True)
"""
ENDED = "[3, 5]\n"
LIMIT_S = 30


def test_a_process_that_does_not_close_its_engine_ends(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    script = tmp_path / "generate.py"
    script.write_text(GENERATE)
    ended = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, timeout=240, check=True)
    # vLLM may log its own end after it.
    assert ENDED in ended.stdout.splitlines(keepends=True)


def test_a_killed_process_gives_its_memory_back(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    script = tmp_path / "generate.py"
    script.write_text(GENERATE + "    input()\n")
    before = free_bytes()
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert any(line == ENDED for line in process.stdout)
        held = before - free_bytes()
        assert held > 1 << 30
        process.kill()
    ending = time.monotonic() + LIMIT_S
    while before - free_bytes() > held / 10:
        assert time.monotonic() < ending
        time.sleep(0.2)


def free_bytes() -> int:
    return torch.cuda.mem_get_info()[0]
