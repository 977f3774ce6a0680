"""The folder with a target replica's link file and secret, in this node's temporary directory."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

_PREFIX = "unmask-link-"
_SETTLED_S = 60.0
"""A younger folder may belong to a replica that has not locked it yet."""


def create_link_folder() -> Path:
    """A new folder that only this user can read, locked while this process and those forked from it live.

    Folders whose replica was killed are removed first; they hold a secret.
    """
    _sweep(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    _lock(folder)
    return folder


def _sweep(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            if time.time() - folder.stat().st_mtime < _SETTLED_S:
                continue
            descriptor = _lock(folder)
        except OSError:  # It is another user's, in use, or gone by now.
            continue
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _lock(folder: Path) -> int:
    """Lock a folder until the descriptor is closed in every process that has it. Raises OSError if it is locked."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
