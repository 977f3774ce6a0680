"""An engine core does not outlive the process that started it, whenever that is killed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.timeout(300)

LIMIT_S = 60
SERVE = """
import asyncio
from engines.target_engine import TargetEngine
from unmask.config import TargetConfig

async def serve() -> None:
    config = TargetConfig(max_model_len=64, engine={"kv_cache_memory_bytes": 1 << 26})
    engine = TargetEngine(config, max_num_seqs=1)
    await engine.start()
    print("ready", flush=True)
    await asyncio.Event().wait()
    await engine.stop()

if __name__ == "__main__":
    asyncio.run(serve())
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen]:
    script = tmp_path / "serve.py"
    script.write_text(SERVE)
    command = [sys.executable, str(script)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        yield process
        process.kill()


def cores(server: subprocess.Popen) -> list[psutil.Process]:
    """Its engine core, under the name that `multiprocessing` or, later, vLLM gives it."""
    found = []
    for child in psutil.Process(server.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            name = " ".join(child.cmdline())
            found += [child] if "spawn_main" in name or "EngineCore" in name else []
    return found


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["loading", "running"])
def test_a_killed_server_leaves_no_engine_core(server: subprocess.Popen, moment: str) -> None:
    if moment == "running":
        assert any(line == "ready\n" for line in server.stdout)
    ending = time.monotonic() + LIMIT_S
    while not (found := cores(server)):
        assert time.monotonic() < ending
        time.sleep(0.05)
    server.kill()
    server.wait()
    _, left = psutil.wait_procs(found, timeout=LIMIT_S)
    for core in left:
        core.kill()
    assert not left
