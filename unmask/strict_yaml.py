"""YAML in which no key is given twice: others take the last one, and what the first said is gone without a word."""

from __future__ import annotations

from typing import Any

import yaml

from unmask.errors import ConfigError


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Before keys are merged by `<<`: a key beside it replaces what is merged, and is no second one.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' is given twice", problem_mark=key.start_mark)
            seen.add(name)
        return node


def parse_yaml(text: str, field: str | None = None) -> list[Any]:
    """The documents of a text that are not empty. Raises ConfigError with the field that holds the text."""
    try:
        return [tree for tree in yaml.load_all(text, _Loader) if tree is not None]
    except yaml.YAMLError as error:
        raise ConfigError(f"is not valid YAML: {error}", field=field) from None
