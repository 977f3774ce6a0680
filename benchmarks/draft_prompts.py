"""Prompts of the draft benchmark's data folder: gsm8k/, mtbench/ and selfinstruct/ (jsonl.gz)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HELD_OUT = (120, 40)
"""GSM8K questions and self-instruct prompts that are kept aside for choosing recipes."""


class Prompts:
    """Prompts under the target's chat template, as token ids.

    Args:
        longest: in tokens; longer ones are left out.
    """

    def __init__(self, folder: Path, tokenizer: Any, longest: int) -> None:
        self.folder, self.tokenizer, self.longest = folder, tokenizer, longest

    def train(self) -> list[list[int]]:
        """GSM8K's training questions with the self-instruct prompts among them, without those of `development`."""
        questions, broad = self._questions()[: -_HELD_OUT[0]], self._broad()[: -_HELD_OUT[1]]
        step = max(1, len(questions) // len(broad))
        mixed: list[str] = []
        for index, text in enumerate(broad):
            mixed += [text, *questions[index * step : (index + 1) * step]]
        return self._encode(mixed + questions[len(broad) * step :])

    def development(self) -> list[list[int]]:
        """Training prompts that are kept aside: recipes are chosen by them, and never by the test sets."""
        questions, broad = self._questions()[-_HELD_OUT[0] :], self._broad()[-_HELD_OUT[1] :]
        ratio = _HELD_OUT[0] // _HELD_OUT[1]
        mixed = [text for i, one in enumerate(broad) for text in (one, *questions[i * ratio : (i + 1) * ratio])]
        return self._encode(mixed)

    def gsm8k(self) -> list[list[int]]:
        """Held-out GSM8K questions."""
        return self._encode([row["question"] for row in self._rows("gsm8k/test")])

    def mtbench(self) -> list[list[int]]:
        """First turns of MT-bench."""
        return self._encode([row["turns"][0] for row in self._rows("mtbench/question")])

    def _questions(self) -> list[str]:
        return [row["question"] for row in self._rows("gsm8k/train")]

    def _broad(self) -> list[str]:
        return [
            "\n".join(filter(None, (row["instruction"], row["instances"][0]["input"])))
            for name in ("selfinstruct/seed_tasks", "selfinstruct/user_oriented_instructions")
            for row in self._rows(name)
        ]

    def _rows(self, name: str) -> list[dict[str, Any]]:
        with gzip.open(self.folder / f"{name}.jsonl.gz", "rt") as file:
            return [json.loads(line) for line in file]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of the texts that fit."""
        encoded = (
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
            for text in texts
        )
        return [ids for ids in encoded if len(ids) <= self.longest]
