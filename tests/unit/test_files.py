"""Files and directories are whole or absent, and damage shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from unmask.files import atomic_directory, atomic_path, verify_directory, write_json, write_text


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "model"

    def fail() -> None:
        with atomic_directory(path) as building:
            (building / "weights").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not list(tmp_path.iterdir())
    for content in ("one", "two"):
        with atomic_directory(path) as building:
            (building / "weights").write_text(content)
        assert (path / "weights").read_text() == content
        assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("damage", ["change", "remove", "add", "checksums"])
def test_damage_of_a_directory_is_found(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model"
    with atomic_directory(path) as building:
        (building / "sub").mkdir()
        write_json(building / "sub" / "weights", [1])
    assert verify_directory(path)
    weights = path / "sub" / "weights"
    match damage:
        case "change":
            weights.write_text("[2]")
        case "remove":
            weights.unlink()
        case "add":
            weights.with_name("more").write_text("")
        case "checksums":
            (path / "checksums.json").write_text("{")
    assert not verify_directory(path)


def test_of_two_publishers_either_may_win(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with atomic_directory(path) as first:
        (first / "weights").write_text("same")
        with atomic_directory(path) as second:
            (second / "weights").write_text("same")
    assert verify_directory(path)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
