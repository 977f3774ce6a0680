"""Where prompts come from."""

from __future__ import annotations

from dataclasses import dataclass

from unmask.config.checks import require


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptsConfig:
    """Where prompts come from."""

    source: str = "demo"
    """`demo`, `word_problems` or `copying` (the project's own), a .jsonl/.json/.parquet file (.gz too), or a hub id."""
    split: str = "train"
    """For `demo`: train, new_items or new_templates. For the others: train or test. Else a hub data set's own."""
    field: str = "prompt"
    """The column that holds the text, or a list of chat messages."""
    system: str | None = None
    """A system message put before plain-text prompts."""
    limit: int | None = None
    """Use only the first rows."""

    def __post_init__(self) -> None:
        require(self.limit is None or self.limit > 0, "prompts.limit", "must be positive (leave it out for all rows)")
