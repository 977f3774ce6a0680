"""A file system of one megabyte that can fail."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

SAID = {
    "full": "No space left on device",
    "read-only": "Read-only file system",
    "unreachable": "No such file or directory",
}
"""What the system says of each fault."""


class SmallDisk:
    """A tmpfs in a folder, bound to `path`, so that what it holds outlives its being unreachable."""

    def __init__(self, folder: Path) -> None:
        self._store, self.path = folder / "store", folder / "disk"
        self._store.mkdir()
        self.path.mkdir()
        _run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(self._store))
        self._bind()

    def _bind(self) -> None:
        _run("mount", "--bind", str(self._store), str(self.path))

    def fail(self, fault: str) -> None:
        """Nothing can be written any more, or nothing of it is there."""
        if fault == "full":
            self._fill()
        elif fault == "read-only":
            _run("mount", "-o", "remount,ro", str(self.path))
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

    def remove(self) -> None:
        """Unmount it; its content is gone."""
        for mount in (self.path, self._store):
            _run("umount", "--lazy", str(mount))


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
