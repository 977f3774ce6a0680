"""Hashes of the pages of prompts, for a runner whose host knows the tokens of a request's beginning and of no more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from unmask.pairing.page_hashes import PageHashes


@dataclass(slots=True)
class _Prompt:
    tokens: np.ndarray
    reached: int


class PromptHashes:
    """Follows requests from their first chunk to the last of their prompt."""

    def __init__(self) -> None:
        self._hashes = PageHashes()
        self._prompts: dict[str, _Prompt] = {}

    def introduce(self, name: str, tokens: Sequence[int], num_computed: int) -> None:
        """A request begins, or begins again after a preemption.

        Args:
            tokens: all that is known before it runs.
            num_computed: of them, those that the target has in its own cache.
        """
        self._hashes.forget(name)
        self._prompts[name] = _Prompt(np.array(tokens, dtype=np.int32), num_computed)

    def of(self, names: Sequence[str], num_scheduled: np.ndarray) -> list[tuple[int, ...]]:
        """Hashes of each request's last full pages (see `PageHashes.of`) in a step that runs so many tokens of it [R];
        none for requests beyond their prompt."""
        return [self._advance(name, int(count)) for name, count in zip(names, num_scheduled, strict=True)]

    def forget(self, names: Iterable[str]) -> None:
        """Requests have ended."""
        for name in names:
            self._prompts.pop(name, None)
            self._hashes.forget(name)

    def _advance(self, name: str, count: int) -> tuple[int, ...]:
        prompt = self._prompts.get(name)
        if prompt is None:
            return ()
        start, prompt.reached = prompt.reached, prompt.reached + count
        told = self._hashes.of(name, start, min(prompt.reached, len(prompt.tokens)), prompt.tokens)
        if prompt.reached >= len(prompt.tokens):
            self.forget([name])
        return told
