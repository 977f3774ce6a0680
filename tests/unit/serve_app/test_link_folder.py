"""Folders of killed replicas go; those of living ones stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from serve_app.link_folder import create_link_folder

HOLDER = "from serve_app.link_folder import create_link_folder as c; print(c(), flush=True); input()"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def aged(folder: Path) -> Path:
    (folder / "secret").write_text("x")
    os.utime(folder, (0, 0))
    return folder


def test_a_killed_owners_folder_is_removed_and_a_living_ones_kept(temporary: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout
        folder = aged(Path(owner.stdout.readline().strip()))
        first = aged(create_link_folder())
        assert folder.is_dir()
        assert folder.stat().st_mode & 0o077 == 0
        owner.send_signal(signal.SIGKILL)
    second = create_link_folder()
    assert sorted(temporary.iterdir()) == sorted([first, second])


def test_a_young_folder_without_a_lock_is_left_alone(temporary: Path) -> None:
    young = temporary / "unmask-link-young"
    young.mkdir()
    create_link_folder()
    assert young.is_dir()
