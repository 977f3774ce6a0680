"""Cluster files of Ray's launcher (`ray up`): Ray's own schema, and what it lets pass."""

from __future__ import annotations

import copy
from typing import Any

from pipelines.lint.document import Cluster, Document
from unmask.errors import ConfigError
from unmask.placement import NodeType


def read_launcher(tree: dict[str, Any]) -> Document:
    """A cluster file and the node types that it offers; `metadata.recipes` names what runs there.

    Raises:
        ConfigError: it is not what Ray's schema asks for, its counts contradict each other, or it is open to others.
    """
    types = tree.get("available_node_types")
    if not types:
        raise ConfigError("is needed: without it all nodes are alike", field="available_node_types")
    filled = _check_schema(tree)
    _check_counts(filled)
    _check_commands(tree)
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
        recipes=(tree.get("metadata") or {}).get("recipes", []),
    )


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
    except (ValueError, KeyError, NotImplementedError) as error:
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


def _check_commands(tree: dict[str, Any]) -> None:
    """Every node demands the token, and the dashboard listens to its own host."""
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in tree.get(name, []) if "ray start" in command]
        if not starts:
            raise ConfigError("must hold a `ray start`: Ray's default one asks for no token", field=name)
        for command in starts:
            if "RAY_AUTH_MODE=token" not in command:
                raise ConfigError("must set RAY_AUTH_MODE=token before `ray start`", field=name)
            if "--dashboard-host" in command and "--dashboard-host=127.0.0.1" not in command:
                raise ConfigError("must keep the dashboard on 127.0.0.1; `ray dashboard` forwards it", field=name)
            if name.startswith("head") and "RAY_enable_autoscaler_v2=1" not in command:
                raise ConfigError("must set RAY_enable_autoscaler_v2=1: version 1 ignores labels", field=name)
