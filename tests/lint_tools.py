"""What the tests of `unmask lint` share: a file of the project with one edit, checked."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.lint.__main__ import check
from unmask.errors import UserError

ROOT = Path(__file__).parents[1]

Edits = dict[str, Any]
"""By dotted path, in which numbers are positions in lists: the new value, or `...` to delete the field."""


def objects(name: str) -> list[dict[str, Any]]:
    """The documents of a file in `deploy/kuberay`."""
    return list(yaml.safe_load_all((ROOT / "deploy" / "kuberay" / name).read_text()))


def lint(folder: Path, source: str, edits: Edits) -> str:
    """What lint says of a file of the project after some edits."""
    tree = json.loads(_as_json(source))
    for path, value in edits.items():
        _change(tree, path, value)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    changed = folder / "changed.yaml"
    changed.write_text(json.dumps(tree))  # which is YAML, too
    return check(changed, {})


def refused(folder: Path, source: str, path: str, value: Any) -> str:
    """The one line by which lint refuses an edit."""
    with pytest.raises(UserError) as mistake:
        lint(folder, source, {path: value})
    line = str(mistake.value)
    assert "\n" not in line
    return line


@functools.cache
def _as_json(source: str) -> str:
    """A file as JSON, in which nothing is shared: an edit changes one place, not all that an anchor stands for."""
    return json.dumps(yaml.safe_load((ROOT / source).read_text()))


def _change(tree: Any, path: str, value: Any) -> None:
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        tree = tree[part]
    if value is ...:
        del tree[last]
    else:
        tree[last] = value
