"""F9: SIGTERM to a service under load drains it and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from tests.fault.load import Load, percentile, start
from tests.fault.record import at_most, conclude, equal
from tests.fault.scenario import wait_until
from tests.private_ray import MARK

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
BUSY = "Presumed, not measured apart: proxy and ingress share two cores with the engine of eight streams."


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def descendants(mark: str) -> list[psutil.Process]:
    """Processes that carry a mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def leavings(begun: float, temporary: Path) -> list[Path]:
    """Shared memory segments of no running process made since, and our folders in the service's own `TMPDIR`."""
    folders = temporary.glob("unmask-*")
    segments = (path for path in Path("/dev/shm").rglob("*") if path.is_file() and not _is_mapped(path))
    return [path for path in (*segments, *folders) if path.stat().st_mtime >= begun]


def refusals(port: int, service: subprocess.Popen[str]) -> list[tuple[float, httpx.Response]]:
    """Answers to new requests, from the signal until nothing listens any more.

    One that comes before the service has noticed the signal waits for the eight streams; the next ones do not wait for
    it.
    """
    answers: list[tuple[float, httpx.Response]] = []
    gone = threading.Event()

    def ask() -> None:
        begun = time.monotonic()
        try:
            response = httpx.post(
                f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "x", "max_tokens": 1}, timeout=30
            )
        except httpx.TransportError:
            gone.set()
        else:
            answers.append((time.monotonic() - begun, response))

    with ThreadPoolExecutor(8) as pool:
        while service.poll() is None and not gone.is_set():
            pool.submit(ask)
            time.sleep(0.1)
    return answers


def test_sigterm_drains(target_dir: Path, tmp_path: Path) -> None:
    port, mark = free_port(), f"shutdown-{os.getpid()}"
    recipe = tmp_path / "recipe.yaml"
    engine = {"kv_cache_memory_bytes": 1 << 26, "enforce_eager": True}
    recipe.write_text(
        yaml.safe_dump(
            {
                "target": {"model": str(target_dir), "max_model_len": 1024, "engine": engine},
                "serve": {"port": port, "dtype": "float32", "max_num_seqs": 8},
            }
        )
    )
    begun, own = time.time(), tempfile.mkdtemp(prefix="u")
    environment = os.environ | {MARK: mark, "HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "token", "TMPDIR": own}
    service = subprocess.Popen(
        [sys.executable, "-m", "serve_app", str(recipe)],
        env={name: value for name, value in environment.items() if name != "RAY_ADDRESS"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )
    assert service.stdout
    assert service.stdout.readline().startswith("serving"), "it did not start"
    # Some seconds of text: after 20 s of grace streams are cut, and slow machines make 15 tokens a second of each.
    load = Load(clients=8, requests=1, stream=True, fields={"max_tokens": 120})
    running = start(f"http://127.0.0.1:{port}", load)
    wait_until(lambda: httpx.get(f"http://127.0.0.1:{port}/metrics").text.count("unmask_requests_running 8.0"), 60)
    signalled = time.monotonic()
    service.send_signal(signal.SIGTERM)
    answers = refusals(port, service)
    replies = running.wait()
    drained = max(reply.begun + reply.total_s for reply in replies) - signalled
    code = service.wait(timeout=120)
    wait_until(lambda: not descendants(mark), 60)
    statuses = [response.status_code for _, response in answers]
    refused = [(seconds, response) for seconds, response in answers if response.status_code == 503]
    assert refused, statuses
    findings = [
        equal("streams under way that finished", sum(not reply.failed for reply in replies), 8),
        equal("answers to new requests", sorted({*statuses} - {200}), [503]),
        equal("503 without Retry-After", sum("retry-after" not in response.headers for _, response in refused), 0),
        at_most("503 within (p99)", percentile([seconds for seconds, _ in refused], 0.99), 0.2, reason=BUSY),
        at_most("all finished after", drained, 20),
        equal("exit code", code, 0),
        equal("processes left", len(descendants(mark)), 0),
        equal("port free", _is_free(port), True),
        equal("shared memory segments and folders left", [path.name for path in leavings(begun, Path(own))], []),
    ]
    conclude("F9", "SIGTERM under load", "8 streams under way", findings)


def _is_free(port: int) -> bool:
    try:
        with socket.create_server(("127.0.0.1", port)):
            return True
    except OSError:
        return False


def _is_mapped(path: Path) -> bool:
    """Whether a running process has the segment; others may work on this machine meanwhile."""
    return any(str(path) in _maps(pid) for pid in psutil.pids())


def _maps(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""
