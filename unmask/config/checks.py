"""The one check that every configuration makes."""

from __future__ import annotations

from unmask.errors import ConfigError


def require(condition: bool, field_name: str, message: str) -> None:
    """Refuse a configuration by the name of the field that is wrong.

    Raises:
        ConfigError: `condition` does not hold.
    """
    if not condition:
        raise ConfigError(message, field=field_name)
