"""Cluster files of Ray's launcher (`ray up`): Ray's own schema, and what it lets pass."""

from __future__ import annotations

import copy
import shlex
from typing import Any

from pipelines.lint.document import Cluster, Command, Document
from pipelines.lint.launcher_access import check_access
from pipelines.lint.start_commands import check_start_commands
from unmask.errors import ConfigError
from unmask.placement import NodeType


def read_launcher(tree: dict[str, Any]) -> Document:
    """A cluster file and the node types that it offers; `metadata.recipes` names what runs there.

    Raises:
        ConfigError: it is not what Ray's schema asks for, its counts contradict each other, its nodes would not start,
            or it is open to others.
    """
    types = tree.get("available_node_types")
    if not types:
        raise ConfigError("is needed: without it all nodes are alike", field="available_node_types")
    _check_image(tree)
    filled = _check_schema(tree)
    _check_counts(filled)
    check_start_commands(tree)
    check_access(tree)
    nodes = [
        NodeType(
            name=name,
            resources=node["resources"],
            labels=node.get("labels", {}),
            most=1 if name == tree["head_node_type"] else filled["available_node_types"][name]["max_workers"],
        )
        for name, node in types.items()
    ]
    return Document(
        kind="Ray cluster",
        cluster=Cluster(nodes=nodes, max_nodes=filled["max_workers"] + 1),
        commands=_commands(tree),
    )


def _commands(tree: dict[str, Any]) -> list[Command]:
    recipes = (tree.get("metadata") or {}).get("recipes") or []
    if not isinstance(recipes, list) or not all(isinstance(recipe, str) and recipe.strip() for recipe in recipes):
        raise ConfigError("must be a list of recipes, as in [recipes/demo.yaml]", field="metadata.recipes")
    words = [shlex.split(recipe) for recipe in recipes]
    return [Command(recipe=recipe, overrides=overrides) for recipe, *overrides in words]


def _check_image(tree: dict[str, Any]) -> None:
    """Ray starts nodes without a container where no image is named, or stops at an assertion."""
    docker = tree.get("docker")
    if not docker:
        return
    if not docker.get("image") and not (docker.get("head_image") and docker.get("worker_image")):
        raise ConfigError("is needed: name the image that deploy/Dockerfile builds", field="docker.image")
    if not docker.get("container_name"):
        raise ConfigError("is needed: Ray runs no image without it", field="docker.container_name")


def _check_schema(tree: dict[str, Any]) -> dict[str, Any]:
    """The file with Ray's defaults filled in."""
    # Imported here: Ray takes a second to import, which a recipe's check should not cost.
    from jsonschema.exceptions import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        filled = prepare_config(copy.deepcopy(tree))
        validate_config(filled)
    except ValidationError as error:
        raise ConfigError(error.message, field=".".join(map(str, error.absolute_path)) or None) from None
    except (ValueError, KeyError, NotImplementedError, AssertionError) as error:
        # Any of them is how Ray refuses, by what is wrong with the file.
        raise ConfigError(f"Ray refuses the file: {error}") from None
    return filled


def _check_counts(filled: dict[str, Any]) -> None:
    """Ray accepts counts that contradict each other, and then never adds a node."""
    bound = filled["max_workers"]
    least = 0
    for name, node in filled["available_node_types"].items():
        low, high = node["min_workers"], node["max_workers"]
        where = f"available_node_types.{name}"
        if low < 0 or high < 0:
            raise ConfigError("must not be negative", field=f"{where}.{'min' if low < 0 else 'max'}_workers")
        if low > high:
            raise ConfigError(f"is {low}, more than max_workers = {high}", field=f"{where}.min_workers")
        if high > bound:
            raise ConfigError(
                f"is {high}, more than max_workers = {bound} of the cluster", field=f"{where}.max_workers"
            )
        least += low
    if least > bound:
        raise ConfigError(
            f"is {bound}, less than the {least} that min_workers of the types add up to", field="max_workers"
        )
