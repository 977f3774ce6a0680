"""Processes that belong to another one: started again when they end, ended when it ends."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Sequence

logger = logging.getLogger(__name__)

_LOOK_S = 0.1


class Attendants:
    """Keeps modules of this library running beside this process.

    They end with their standard input, which this process holds: however it ends, they do.

    Args:
        commands: module name and arguments of each.
    """

    def __init__(self, commands: Sequence[Sequence[str]]) -> None:
        self._commands = [[sys.executable, "-m", *command] for command in commands]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._failed: set[int] = set()
        """Those whose last start has failed."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._attend, name="attendants", daemon=True)

    def start(self) -> None:
        """Start them."""
        self._processes = [_start(command) for command in self._commands]
        self._thread.start()

    def close(self) -> None:
        """End them."""
        self._closing.set()
        self._thread.join()
        for process in self._processes:
            _end(process)

    def _attend(self) -> None:
        while not self._closing.wait(_LOOK_S):
            for i in range(len(self._processes)):
                self._look_after(i)

    def _look_after(self, i: int) -> None:
        command, process = self._commands[i], self._processes[i]
        if process.poll() is None:
            if not _is_stopped(process):
                return
            # It may stay stopped for long, and does nothing of what it is there for meanwhile.
            logger.warning("%s is stopped; starting another", command[2])
            process.kill()
        elif i not in self._failed:
            logger.warning("%s ended with code %s; starting another", command[2], process.returncode)
        _end(process)
        try:
            self._processes[i] = _start(command)
            self._failed.discard(i)
        except OSError as error:
            # Such as no memory for another process: it is tried again.
            if i not in self._failed:
                logger.warning("%s cannot be started for now: %s", command[2], error)
            self._failed.add(i)


def _is_stopped(process: subprocess.Popen[bytes]) -> bool:
    """Whether a child that has not ended has been stopped, as by SIGSTOP."""
    try:
        return os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    # A worker may have found this library on a path of its own. A session of its own keeps a terminal's interrupt away.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
