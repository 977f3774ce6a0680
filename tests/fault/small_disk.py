"""A file system of one megabyte that can fail."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SAID = {
    "full": "No space left on device",
    "read-only": "Read-only file system",
    "unreachable": "No such file or directory",
}
"""What the system says of each fault."""

_BUSY_S = 20.0
"""While a file is open for writing, its file system cannot be made read-only."""


class SmallDisk:
    """A tmpfs in a folder, bound to `path`, so that what it holds outlives its being unreachable."""

    def __init__(self, folder: Path) -> None:
        self._store, self.path = folder / "store", folder / "disk"
        self._store.mkdir()
        self.path.mkdir()
        _run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(self._store))
        try:
            self._bind()
        except subprocess.CalledProcessError:
            self.remove()
            raise

    def _bind(self) -> None:
        _run("mount", "--bind", str(self._store), str(self.path))

    def fail(self, fault: str) -> None:
        """Nothing can be written any more, or nothing of it is there."""
        if fault == "full":
            self._fill()
        elif fault == "read-only":
            self._forbid_writing()
        else:
            _run("umount", "--lazy", str(self.path))

    def mend(self, fault: str) -> None:
        """It is as before."""
        if fault == "full":
            (self.path / "ballast").unlink()
        elif fault == "read-only":
            _run("mount", "-o", "remount,rw", str(self.path))
        else:
            self._bind()

    def _fill(self) -> None:
        with (self.path / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(512)):
                pass
        assert os.statvfs(self.path).f_bfree == 0

    def _forbid_writing(self) -> None:
        deadline = time.monotonic() + _BUSY_S
        while True:
            try:
                return _run("mount", "-o", "remount,ro", str(self.path))
            except subprocess.CalledProcessError as error:
                if b"busy" not in error.stderr or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def remove(self) -> None:
        """Unmount what is mounted of it; its content is gone."""
        for mount in (self.path, self._store):
            subprocess.run(["umount", "--lazy", str(mount)], check=False, capture_output=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    try:
        disk = SmallDisk(tmp_path)
    except subprocess.CalledProcessError:
        pytest.skip("mounting a file system takes root")
    yield disk
    disk.remove()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
