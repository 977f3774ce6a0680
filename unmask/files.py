"""Files that are either whole or absent: checksums, atomic writes, atomic directories."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unmask.errors import ConfigError

CHECKSUMS = "checksums.json"


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit its file is synced and takes the name `path`."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """Write a small JSON file atomically, with sorted keys."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def sync_directory(path: Path) -> None:
    """Make renames inside a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory that takes the name `path`, replacing what is there, on a clean exit.

    A checksum of every file is recorded in it, for `verify_directory`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        write_json(temporary / CHECKSUMS, _checksums(temporary))
        _replace_directory(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def verify_directory(path: Path) -> bool:
    """Whether a directory of `atomic_directory` still holds exactly the files it was published with."""
    try:
        recorded = json.loads((path / CHECKSUMS).read_text())
    except (OSError, ValueError):
        return False
    return recorded == _checksums(path)


def _checksums(directory: Path) -> dict[str, str]:
    files = (file for file in sorted(directory.rglob("*")) if file.is_file() and file.name != CHECKSUMS)
    return {file.relative_to(directory).as_posix(): sha256_file(file) for file in files}


def _replace_directory(new: Path, path: Path) -> None:
    """Rename `new` to `path`. Of two processes that publish the same content, either may win."""
    for file in (file for file in new.rglob("*") if file.is_file()):
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
    old = new.with_suffix(".old")
    try:
        path.rename(old)
    except FileNotFoundError:
        old = None
    try:
        new.rename(path)
    except OSError:
        if not verify_directory(path):
            raise
    sync_directory(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def private_folder(path: Path) -> Path:
    """The folder, made for this user alone if it is missing. Raises ConfigError if others can write there."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(f"other users can write to '{path}'; make it this user's own, mode 700", field="folder")
    return path
