"""vLLM's engine core, a process of its own, ends with the process that started it.

vLLM's front end tells its core to end. One that is killed tells nobody: the core would keep the GPU's memory, and the
next engine would not fit (vllm-project/vllm#55510). Ray ends what a killed worker has started only while the raylet of
its node lives (`actors.cluster.RAY_ENVIRONMENT`), and a driver that is killed takes its private cluster along.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.process import BaseProcess
from typing import Any, cast

from vllm.v1.engine.core import EngineCoreProc

from engines.verification_counts import count_verifications, told_by_vllm

POLL_S = 1.0
"""How soon a core notices that it is alone."""

_run_engine_core = EngineCoreProc.run_engine_core


def tie_engine_cores() -> None:
    """Let every engine core that this process starts from now on end with it, while it loads or runs."""
    # A core is handed this function by name and so imports this module, which holds vLLM's own.
    EngineCoreProc.run_engine_core = staticmethod(_run_tied)  # pyrefly: ignore[bad-assignment] - vLLM's never returns


def _run_tied(*args: Any, **kwargs: Any) -> None:
    # As `multiprocessing` knows it: the parent may have ended before this is reached.
    parent = cast(BaseProcess, multiprocessing.parent_process())
    if not told_by_vllm():
        count_verifications()
    threading.Thread(target=_end_without, args=(parent.pid,), name="parent-watch", daemon=True).start()
    _run_engine_core(*args, **kwargs)


def _end_without(parent: int | None) -> None:
    # No signal from the kernel (PR_SET_PDEATHSIG): it comes when the *thread* that started the process ends.
    while os.getppid() == parent:
        time.sleep(POLL_S)
    # Nobody is left to be answered, and workers of a parallel engine watch their core themselves.
    os.kill(os.getpid(), signal.SIGKILL)
