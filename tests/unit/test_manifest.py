"""The manifest: whole after any kill, and quick when it is large."""

from __future__ import annotations

from pathlib import Path

import pytest

from unmask.errors import UserError
from unmask.manifest import MANIFEST, Manifest, ManifestSaver, ShardEntry, shard_path, shard_sizes

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
