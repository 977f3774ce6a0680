"""Verdicts on token ids: a verifier with the tokenizer and the column that holds the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unmask.errors import PromptError
from unmask.verification.verifier import Verifier


class Judge:
    """Judges responses to the rows of a source.

    Args:
        tokenizer: the model's Hugging Face tokenizer.
        column: the row's value to compare with.
    """

    def __init__(self, tokenizer: Any, verifier: Verifier, column: str) -> None:
        self._tokenizer, self._verifier, self._column = tokenizer, verifier, column

    def reference(self, row: Mapping[str, Any]) -> Any:
        """The reference of a row. Raises PromptError where the row has none that can be used."""
        if row.get(self._column) is None:
            raise PromptError(f"the row lacks the reference '{self._column}'", field="generate.reference")
        return self._verifier.reference(row[self._column])

    def is_right(self, response_ids: Sequence[int], reference: Any) -> bool:
        """Whether a response is right; control tokens are no part of its text."""
        text = self._tokenizer.decode(list(response_ids), skip_special_tokens=True)
        return self._verifier.is_right(text, reference)
