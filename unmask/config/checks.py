"""The checks that configurations make."""

from __future__ import annotations

import re
from collections.abc import Mapping

from unmask.errors import ConfigError

_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_LABEL_KEY = re.compile(rf"([a-z0-9.-]{{1,253}}/)?{_LABEL.pattern}")


def require(condition: bool, field_name: str, message: str) -> None:
    """Refuse a configuration by the name of the field that is wrong.

    Raises:
        ConfigError: `condition` does not hold.
    """
    if not condition:
        raise ConfigError(message, field=field_name)


def require_labels(labels: Mapping[str, str], field_name: str) -> None:
    """Refuse node labels that no node could carry. Raises ConfigError."""
    for name, value in labels.items():
        require(
            bool(_LABEL_KEY.fullmatch(name) and _LABEL.fullmatch(value)),
            field_name,
            f"'{name}: {value}' is no node label: letters, digits, '-', '_' and '.', at most 63",
        )


def require_workers(section: str, rows_field: str, rows: int, num_workers: int, min_workers: int | None) -> None:
    """Refuse more workers than a step has rows, and a least number above the number. Raises ConfigError."""
    require(rows >= num_workers, f"{section}.{rows_field}", f"must be at least {section}.num_workers = {num_workers}")
    require(
        min_workers is None or 1 <= min_workers <= num_workers,
        f"{section}.min_workers",
        f"must lie between 1 and {section}.num_workers = {num_workers}",
    )
