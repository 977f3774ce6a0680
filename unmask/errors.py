"""Errors that a user can mend. Every one names the field at fault and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a recipe, a file, a checkpoint or a request.

    Args:
        message: what is wrong and what to do about it, in one line.
        field: dotted path of the offending field (`distill.max_seconds`), or None.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.field = field

    def __str__(self) -> str:
        text = super().__str__()
        return f"{self.field}: {text}" if self.field else text

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), super().__str__(), self.field)


def _rebuild(cls: type[UserError], message: str, field: str | None) -> UserError:
    """Unpickle an error that crossed a process boundary (keyword-only fields defeat the default)."""
    return cls(message, field=field)


class ConfigError(UserError):
    """A recipe that cannot be run: unknown key, impossible value or combination."""


class PromptError(UserError):
    """A prompt that cannot be processed. Its row goes to quarantine and the job goes on."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, of an unsafe format, or made for something else."""


class PairingError(CheckpointError):
    """A draft whose records do not fit the target that it is paired with."""


class WireError(UserError):
    """A message on the draft wire that breaks the protocol, or a peer that failed to authenticate."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint ` (did you mean X?)` for a misspelt name, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{matches[0]}'?)" if matches else ""
