"""The `ray start` commands of a launcher file: every node demands the token, and offers what its type says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.lint.shell import assignments, options, program, simple_commands
from unmask.errors import ConfigError

_OF_TYPES = ("num-cpus", "num-gpus", "memory", "resources", "labels", "labels-file")
"""Options that say of a node what its type says already, by which the autoscaler counts."""
_COUNTS = {"num-cpus": "CPU", "num-gpus": "GPU"}
_LOOPBACK = ("127.0.0.1", "localhost")


@dataclass(frozen=True, slots=True)
class _Start:
    """A `ray start`: the variables that it sees, and its options in their order."""

    variables: dict[str, str]
    options: list[tuple[str, str]]


def check_start_commands(tree: dict[str, Any]) -> None:
    """Refuse start commands that are open, that never scale or that contradict the node types. Raises ConfigError."""
    head = tree["available_node_types"][tree["head_node_type"]]["resources"]
    for field in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [start for command in tree.get(field, []) for start in _starts(command)]
        if not starts:
            raise ConfigError("must hold a `ray start`: Ray's default one asks for no token", field=field)
        for start in starts:
            _check_token(start, field)
            if field.startswith("head"):
                _check_head(start, head, field)
            else:
                _check_worker(start, field)


def _starts(command: str) -> Iterator[_Start]:
    exported: dict[str, str] = {}
    for words in simple_commands(command):
        at = _ray_start(words)
        if at is not None:
            yield _Start({**exported, **assignments(words[:at])}, options(words[at:]))
        elif words[0] == "export":
            exported |= assignments(words[1:])


def _ray_start(words: Sequence[str]) -> int | None:
    """Where `ray start` stands among the words of a command."""
    places = [at for at, word in enumerate(words[:-1]) if program([word]) == "ray" and words[at + 1] == "start"]
    return places[0] if places else None


def _check_token(start: _Start, field: str) -> None:
    if start.variables.get("RAY_AUTH_MODE") != "token":
        raise ConfigError("must set RAY_AUTH_MODE=token before `ray start`", field=field)
    # Of several Ray takes the last.
    if any(name == "dashboard-host" and value not in _LOOPBACK for name, value in start.options):
        raise ConfigError("must keep the dashboard on 127.0.0.1; `ray dashboard` forwards it", field=field)


def _check_worker(start: _Start, field: str) -> None:
    for name, _ in start.options:
        if name in _OF_TYPES:
            raise ConfigError(
                f"must not set --{name}, which would be the same on every type: give it in available_node_types",
                field=field,
            )


def _check_head(start: _Start, resources: dict[str, int], field: str) -> None:
    if start.variables.get("RAY_enable_autoscaler_v2") not in ("1", "true"):
        raise ConfigError("must set RAY_enable_autoscaler_v2=1: version 1 ignores labels", field=field)
    if not any(name == "autoscaling-config" and value for name, value in start.options):
        raise ConfigError(
            "must give --autoscaling-config=~/ray_bootstrap_config.yaml: without it no node is ever added", field=field
        )
    for name, value in start.options:
        if name in _COUNTS and value != str(resources.get(_COUNTS[name], 0)):
            raise ConfigError(
                f"sets --{name}={value} where the head's type says {resources.get(_COUNTS[name], 0)}: give it in "
                "available_node_types",
                field=field,
            )
        if name in _OF_TYPES and name not in _COUNTS:
            raise ConfigError(f"must not set --{name}: give it in available_node_types", field=field)
