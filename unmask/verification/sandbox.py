"""A process that runs untrusted Python and cannot do anything else.

Every run gets an interpreter of its own (`confined.py`) with no environment, an empty working directory, nothing but
the standard library, resource limits, and a system-call filter. Two layers:

1. seccomp (always; without it nothing runs): only the calls that computing takes are let through. No process or thread
   can be started, no signal sent, no socket made, no file created, changed or opened for writing, no limit raised.
   It takes no privilege and holds for root.
2. Namespaces (where the kernel permits): no network interface exists, and root's capabilities are gone.

What is left: files that this user may read can be read, though the one thing that leaves the process is a verdict; and
its share of CPU and memory is used, up to the limits.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, cast

_RUNNER = Path(__file__).with_name("confined.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one run may use."""

    cpu_s: int = 5
    wall_s: float = 15.0
    """From the start of the interpreter; on expiry the run is killed."""
    memory_mb: int = 512
    """Of address space, the interpreter's own included (about 30)."""
    open_files: int = 32


def run_confined(code: str, tests: str, limits: Limits) -> bool:
    """Whether `code` and then `tests`, in the same namespace, run to their ends within the limits."""
    token = secrets.token_hex(16).encode()
    with tempfile.TemporaryDirectory(prefix="unmask-") as folder, tempfile.TemporaryFile() as program:
        payload = {"code": code, "tests": tests, "token": token.decode(), "limits": asdict(limits)}
        program.write(json.dumps(payload).encode())
        program.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-X", "utf8", str(_RUNNER)],
            stdin=program,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        with process:
            try:
                return _said(process, len(token), limits.wall_s) == token
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def _said(process: subprocess.Popen[bytes], most: int, wall_s: float) -> bytes:
    """What the process writes until it ends or time is up; a flood is cut after a little more than `most` bytes."""
    output = cast(IO[bytes], process.stdout)
    deadline, said = time.monotonic() + wall_s, b""
    while len(said) <= most:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([output], [], [], left)[0]:
            break
        chunk = os.read(output.fileno(), most + 1)
        if not chunk:
            break
        said += chunk
    return said
