"""Check files before anything is started: `unmask lint cluster.yaml deploy/kuberay/*.yaml recipes/*.yaml`.

Recipes, Serve configs, files of Ray's launcher and KubeRay objects, each valid in itself; and every stage and
deployment must find a node type with its resources and labels, and nodes enough for all of its replicas. Needs no
network.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from actors.exit_codes import DONE, USER_ERROR
from pipelines.lint.commands import asked_by
from pipelines.lint.document import Cluster, Command, Document, require_mapping
from unmask.config import Recipe
from unmask.errors import ConfigError, UserError
from unmask.placement import Demand, shortage, stage_demands
from unmask.recipe import load_recipe, parse_recipe
from unmask.strict_yaml import parse_yaml

IMAGE_ROOT = "/opt/unmask"
"""Where `deploy/Dockerfile` puts the recipes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check every file, a line each; the exit code: 0 all are good, 2 one is not."""
    parser = argparse.ArgumentParser(prog="unmask lint", description=__doc__, allow_abbrev=False)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.yaml")
    files = parser.parse_args(argv).files
    asked = _recipes_among(files)
    failed = False
    for path in files:
        try:
            sys.stdout.write(f"{path}: {check(path, asked)}\n")
        except UserError as error:
            failed = True
            sys.stderr.write(f"error: {path}: {error}\n")
    return USER_ERROR if failed else DONE


def check(path: Path, asked: dict[str, list[Demand]]) -> str:
    """Check one file; what it is.

    Args:
        asked: demands of other files, which a cluster in this one must meet too unless it is dedicated.

    Raises:
        UserError: what is wrong with the file, in one line.
    """
    documents = read(path)
    for document in documents:
        demands = dict(document.demands)
        for command in document.commands:
            demands |= _demands_of(command, path)
        if document.cluster is None:
            continue
        if not document.cluster.dedicated:
            demands = asked | demands
            if not demands:
                raise ConfigError(
                    "names no recipe, so that no room was checked: list what runs there in metadata.recipes, as "
                    "Ray's launcher allows, or give recipes beside the file"
                )
        _check_room(document.cluster, demands, document.beside)
    return ", ".join(dict.fromkeys(document.kind for document in documents))


def read(path: Path) -> list[Document]:
    """The documents of a file, each valid in itself. Raises UserError."""
    trees = _trees(path)
    if not trees:
        raise ConfigError("is empty")
    try:
        return [_read(require_mapping(tree, "the document")) for tree in trees]
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError) as error:
        if isinstance(error, UserError):
            raise
        # A shape that no check foresaw: the file is at fault all the same.
        raise ConfigError(f"cannot be read: {[*str(error).splitlines(), type(error).__name__][0]}") from None


def _trees(path: Path) -> list[Any]:
    if not path.is_file():
        raise ConfigError("there is no such file")
    try:
        return parse_yaml(path.read_text())
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not valid YAML: {error}") from None


def _read(tree: dict[str, Any]) -> Document:
    from pipelines.lint.kuberay import read_kubernetes
    from pipelines.lint.launcher import read_launcher
    from pipelines.lint.serve_file import read_serve_file

    if "apiVersion" in tree:
        return read_kubernetes(tree)
    if "cluster_name" in tree or "provider" in tree:
        return read_launcher(tree)
    if "applications" in tree:
        return read_serve_file(tree)
    if tree.keys() & {field.name for field in dataclasses.fields(Recipe)}:
        return Document(kind="recipe", demands=stage_demands(parse_recipe(tree)))
    raise ConfigError("is neither a recipe, a Serve config, a file of Ray's launcher nor a Kubernetes object")


def _recipes_among(files: Sequence[Path]) -> dict[str, list[Demand]]:
    """What the recipes and Serve configs of the command line ask for; files at fault are reported in their turn."""
    asked: dict[str, list[Demand]] = {}
    for path in files:
        try:
            documents = read(path)
        except UserError:
            continue
        for document in (document for document in documents if document.cluster is None):
            asked |= {f"{path}, {stage}": demands for stage, demands in document.demands.items()}
    return asked


def _demands_of(command: Command, beside: Path) -> dict[str, list[Demand]]:
    """What a recipe asks for with the overrides that stand behind it."""
    path = _find(command.recipe, beside)
    try:
        if command.overrides or command.stage:
            _trees(path)
            found = [asked_by(load_recipe(path, list(command.overrides)), command.stage)]
        else:
            found = [document.demands for document in read(path)]
    except UserError as error:
        raise ConfigError(f"{command.recipe}: {error}") from None
    return {f"{command.recipe}, {stage}": demands for asked in found for stage, demands in asked.items()}


def _find(name: str, beside: Path) -> Path:
    """A recipe that a cluster file names: by its path in the image or the project, from the file's folder upwards."""
    relative = Path(name).relative_to(IMAGE_ROOT) if name.startswith(IMAGE_ROOT) else Path(name)
    for folder in beside.resolve().parents:
        if (folder / relative).is_file():
            return folder / relative
    raise ConfigError(f"names the recipe '{name}', which is nowhere above it")


def _check_room(cluster: Cluster, demands: dict[str, list[Demand]], beside: Sequence[Demand]) -> None:
    # A command may need no more than its driver.
    for stage, together in (demands or {"entrypoint": []}).items():
        if problem := shortage([*together, *beside], cluster.nodes, max_nodes=cluster.max_nodes):
            raise ConfigError(f"{stage}: {problem}")


if __name__ == "__main__":
    sys.exit(main())
