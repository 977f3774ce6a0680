"""Verifiers by name: how a recipe asks for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from unmask.errors import ConfigError, nearest
from unmask.verification.code import CodeVerifier
from unmask.verification.numbers import NumberVerifier


class Verifier(Protocol):
    """Compares a response with a row's reference. One instance serves several threads."""

    def reference(self, value: Any) -> Any:
        """What to compare with, from the row's value. Raises PromptError for one that cannot be compared with."""
        ...

    def is_right(self, response: str, reference: Any) -> bool:
        """Whether a response's text is right. It may be anything, hostile code included."""
        ...


_VERIFIERS: dict[str, Callable[[], Verifier]] = {"number": NumberVerifier, "code": CodeVerifier}


def build_verifier(name: str) -> Verifier:
    """A verifier by its name.

    Raises:
        ConfigError: an unknown name, or `code` on a machine that cannot confine code.
    """
    if name not in _VERIFIERS:
        raise ConfigError(
            f"unknown verifier '{name}'{nearest(name, _VERIFIERS)}; choose {' or '.join(_VERIFIERS)}",
            field="generate.verifier",
        )
    return _VERIFIERS[name]()
