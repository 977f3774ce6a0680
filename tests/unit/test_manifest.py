"""The manifest: whole after any kill, and quick when it is large."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from unmask.errors import UserError
from unmask.manifest import (
    MANIFEST,
    RUN_ID,
    Manifest,
    ManifestSaver,
    ShardEntry,
    delete_run,
    read_run_id,
    shard_path,
    shard_sizes,
)

ENTRY = ShardEntry(rows=64, quarantined=1, tokens=4000, size=3, sha256="ab" * 32)


def _file(directory: Path, shard: int, content: str = "abc") -> None:
    path = shard_path(directory, shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_round_trip(tmp_path: Path) -> None:
    manifest = Manifest({3: ENTRY, 1: ENTRY})
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert manifest.pending(range(5)) == [0, 2, 4]
    assert Manifest.load(tmp_path / "nowhere").entries == {}
    Manifest().save(tmp_path)
    assert Manifest.load(tmp_path).entries == {}


@pytest.mark.parametrize(("content", "message"), [("{", "is damaged"), ('{"version": 9}', "version 9")])
def test_damage_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(UserError, match=message):
        Manifest.load(tmp_path)


def test_reconcile_makes_files_and_entries_agree(tmp_path: Path) -> None:
    for shard in (0, 2, 3, 4):
        _file(tmp_path, shard)
    _file(tmp_path, 1, "longer than recorded")
    leftover = tmp_path / "shards" / ".shard-0000009.parquet.1a2b3c4d.tmp"
    leftover.write_text("half")
    manifest = Manifest({0: ENTRY, 1: ENTRY, 5: ENTRY})
    whole = {2: ENTRY, 3: ENTRY}
    manifest.reconcile(tmp_path, lambda directory, shard: whole.get(shard))
    assert set(manifest.entries) == {0, 2, 3}
    assert set(shard_sizes(tmp_path)) == {0, 2, 3}
    assert not leftover.exists()


def test_saver_waits_between_saves(tmp_path: Path) -> None:
    manifest = Manifest({0: ENTRY})
    ManifestSaver(manifest, tmp_path, every_s=60).save_if_due()
    assert not (tmp_path / MANIFEST).exists()
    ManifestSaver(manifest, tmp_path, every_s=0).save_if_due()
    assert Manifest.load(tmp_path) == manifest


def test_a_run_is_deleted_though_a_straggler_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "trajectories"
    _file(directory, 0)
    (directory / RUN_ID).write_text("old")
    (directory / MANIFEST).write_text("{}")
    (directory / "run.yaml").write_text("")
    seen, rmtree = [], shutil.rmtree

    def interrupted(path: Path) -> None:
        """Of the first attempt the folder that was read is not empty any more."""
        seen.append((read_run_id(directory), (directory / MANIFEST).exists()))
        if len(seen) == 1:
            _file(directory, 7)
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    delete_run(directory)
    assert seen == [("", False)] * 2, "the id and the manifest are the first to go"
    assert list(directory.iterdir()) == []
    delete_run(tmp_path / "nowhere")


def test_what_cannot_be_deleted_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _file(tmp_path, 0)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(PermissionError):
        delete_run(tmp_path)
