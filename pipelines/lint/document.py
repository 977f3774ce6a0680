"""What one checked file says: the processes that it asks for, and the nodes that it offers."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from unmask.errors import ConfigError
from unmask.placement import Demand, NodeType


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The nodes that a cluster may have."""

    nodes: Sequence[NodeType]
    max_nodes: float = math.inf
    dedicated: bool = False
    """Whether it is there for what its own file names, and for nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A recipe that a file names as what runs on its cluster."""

    recipe: str
    overrides: Sequence[str] = ()
    stage: str | None = None
    """The stage that runs; None: each of them at some time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One YAML document that is valid in itself."""

    kind: str
    demands: dict[str, list[Demand]] = field(default_factory=dict)
    """By stage: what runs at the same time."""
    cluster: Cluster | None = None
    commands: Sequence[Command] = ()
    beside: Sequence[Demand] = ()
    """What runs all the while beside the commands, such as their driver."""


def config_error(error: ValidationError) -> ConfigError:
    """The first thing that pydantic found, as one line that names the field."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    # A whole object says nothing that the field's name does not.
    got = "" if isinstance(first["input"], dict | list) else f" (got {first['input']!r:.80})"
    return ConfigError(f"{message}{got}", field=where or None)


def require_mapping(value: Any, what: str) -> dict[str, Any]:
    """The value, if it is a mapping. Raises ConfigError."""
    if not isinstance(value, dict):
        raise ConfigError(f"{what} must be a mapping, not {type(value).__name__}")
    return value


def is_everywhere(cidr: str) -> bool:
    """Whether an address range is all of the internet, or half of it. Raises ValueError where it is no range."""
    return ipaddress.ip_network(cidr, strict=False).prefixlen <= 1
