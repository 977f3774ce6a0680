"""What the pods of `deploy/kuberay` promise: nothing is written but shared memory, `/tmp` and the home folder."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVED = "tests/serve/test_service.py::test_a_client_that_goes_away_frees_the_engine"
TRAINED = "tests/ray/test_distill.py::test_another_setting_is_refused_by_name"


def in_a_namespace(*commands: str) -> subprocess.CompletedProcess[str]:
    """Run shell commands where everything else is mounted read-only; mounts end with them."""
    mounts = ["mount --make-rprivate /"]
    for folder in ("/", *{str(ROOT), sys.prefix, str(Path.home())}):
        path = shlex.quote(folder)
        mounts += [f"mount --bind {path} {path}"] * (folder != "/") + [f"mount -o remount,bind,ro {path}"]
    # Last, for what is mounted after it would hide it.
    mounts += ["mount -t tmpfs scratch /tmp", "mkdir /tmp/home", "export HOME=/tmp/home"]
    script = " && ".join([*mounts, f"cd {shlex.quote(str(ROOT))}", *commands])
    return subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, timeout=500)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("test", [SERVED, TRAINED])
def test_a_read_only_root_is_enough(test: str) -> None:
    if in_a_namespace("true").returncode:
        pytest.skip("mounts need privileges, and a checkout that is not below /tmp")
    assert in_a_namespace("touch written").returncode
    ended = in_a_namespace(f"{sys.executable} -m pytest -q -p no:cacheprovider {test}")
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert "1 passed" in ended.stdout
