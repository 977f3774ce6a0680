"""The folder of a target's link: those of killed replicas go, and which drafts its file names."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from engines.draft_arguments import RemoteDraftOptions
from serve_app.directory import DraftEndpoint
from serve_app.link_folder import create_link_folder
from serve_app.target import _Link
from unmask.pairing.link_file import read_link_file

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


def test_a_draft_that_serves_mailboxes_on_the_node_is_asked_alone(tmp_path: Path) -> None:
    options = RemoteDraftOptions(link_file=tmp_path / "link.json", layer_ids=(1,), num_speculative_tokens=3)
    link = _Link(folder=tmp_path, draft=options, target_digest="", timeout_ms=100.0, retry_s=1.0, adaptive_k=False)
    near = DraftEndpoint(address="a:1", version=1, pid=1, node="here", mailbox_folder="/dev/shm/boxes")
    far = DraftEndpoint(address="b:1", version=1, pid=2, node="there", mailbox_folder="/dev/shm/others")
    for endpoints, addresses, folder in (
        ([near, far], ("a:1",), near.mailbox_folder),
        ([far, near], ("b:1", "a:1"), None),
        ([far], ("b:1",), None),
    ):
        link.follow(endpoints, "here")
        config = read_link_file(options.link_file)
        assert (config.addresses, config.mailbox_folder) == (addresses, folder)
