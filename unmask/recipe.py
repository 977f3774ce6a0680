"""Recipes: YAML and dotted overrides in, a validated `Recipe` or a one-line `ConfigError` out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from unmask.config import Recipe
from unmask.errors import ConfigError, UserError, nearest
from unmask.strict_yaml import parse_yaml

T = typing.TypeVar("T")


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file and apply `section.field=value` overrides (values are YAML).

    Raises:
        ConfigError: missing or unreadable file, unknown key (the nearest one is named), wrong type,
            impossible value or combination.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no recipe at '{path}'; give the path of a YAML file such as recipes/demo.yaml")
    try:
        documents = parse_yaml(path.read_text(), field=str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not valid YAML: {error}", field=str(path)) from None
    if len(documents) > 1:
        raise ConfigError("holds several YAML documents; a recipe is one", field=str(path))
    tree = documents[0] if documents else {}
    if not isinstance(tree, dict):
        raise ConfigError(f"'{path}' must hold a mapping of sections, not {type(tree).__name__}")
    for override in overrides or []:
        _apply(tree, override)
    return parse_recipe(tree)


def parse_recipe(tree: dict[str, Any]) -> Recipe:
    """Validate a nested mapping into a `Recipe`. Raises ConfigError."""
    return parse(Recipe, tree)


def parse(cls: type[T], tree: dict[str, Any]) -> T:
    """Validate a nested mapping into any configuration dataclass. Raises ConfigError."""
    _refuse_unknown_keys(cls, tree, "")
    try:
        return TypeAdapter(cls).validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, UserError):
            raise cause from None
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{first['msg']} (got {first['input']!r})", field=where or None) from None


def completed(tree: dict[str, Any]) -> dict[str, Any]:
    """Some sections of a recipe with the defaults of all that they leave out. What sections ask of each other is not
    checked, since others may be missing.

    Raises:
        ConfigError: an unknown key or an impossible value.
    """
    _refuse_unknown_keys(Recipe, tree, "")
    hints = typing.get_type_hints(Recipe)
    sections = {name: _dataclass_types(hints[name]) for name, value in tree.items() if isinstance(value, dict)}
    return {
        name: to_tree(parse(sections[name][0], value)) if sections.get(name) else value for name, value in tree.items()
    }


def to_tree(config: Any) -> dict[str, Any]:
    """A configuration as plain nested values, for `run.yaml` and `--plan`."""
    return dataclasses.asdict(config)


def digest(*parts: Any) -> str:
    """A short stable hash of configuration values (16 hex digits): equal inputs, equal digest."""
    plain = [to_tree(p) if dataclasses.is_dataclass(p) and not isinstance(p, type) else p for p in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _apply(tree: dict[str, Any], override: str) -> None:
    path, separator, value = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"override '{override}' must look like section.field=value")
    *parents, leaf = path.split(".")
    for part in parents:
        child = tree.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"'{part}' is a value, not a section", field=path)
        tree = child
    try:
        tree[leaf] = yaml.safe_load(value)
    except yaml.YAMLError:
        tree[leaf] = value


def _refuse_unknown_keys(cls: Any, tree: Any, prefix: str) -> None:
    """Walk dataclass fields beside the mapping, so that the hint can name the nearest known key."""
    if not dataclasses.is_dataclass(cls) or not isinstance(tree, dict):
        return
    hints = typing.get_type_hints(cls)
    for key, value in tree.items():
        if key not in hints:
            raise ConfigError(f"unknown key{nearest(str(key), hints)}", field=f"{prefix}{key}")
        for candidate in _dataclass_types(hints[key]):
            _refuse_unknown_keys(candidate, value, f"{prefix}{key}.")


def _dataclass_types(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [arg for arg in typing.get_args(hint) if dataclasses.is_dataclass(arg)]
    return [hint] if dataclasses.is_dataclass(hint) else []


__all__ = ["completed", "digest", "load_recipe", "parse", "parse_recipe", "to_tree"]
