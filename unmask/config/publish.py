"""What a published version is called and where it goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unmask.config.checks import require


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishConfig:
    """An immutable, versioned directory that a service can load."""

    name: str | None = None
    """None is `dflash`, or the objective of the student."""
    directory: str | None = None
    """Where versions go; None is `<run_dir>/published`."""
    draft: str | None = None
    """The draft or student to publish; None is what `distill` made."""
    adopt: bool = False
    """Accept a draft that does not say which target it is for, and record this target in it."""
    format: Literal["zlab", "speculators"] = "zlab"
    """Layout of a draft's `config.json`; the weights are the same."""
    license: str = "apache-2.0"

    def __post_init__(self) -> None:
        require(
            self.name is None or self.name.replace("-", "").replace("_", "").isalnum(),
            "publish.name",
            "must be letters, digits, '-' and '_'",
        )
