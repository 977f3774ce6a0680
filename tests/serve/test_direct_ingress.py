"""Past Serve's proxy: the service's own tests, asked through the port of its ingress replica."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.conftest import DIRECT

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_service_is_the_same_past_the_proxy() -> None:
    # In a process of its own: Serve reads what it is told when it is imported.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu and not slow"]
    ended = subprocess.run(
        [*command, "tests/serve/test_service.py"],
        cwd=ROOT,
        env=os.environ | {DIRECT: "1"},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert ended.returncode == 0, ended.stdout[-3000:]
