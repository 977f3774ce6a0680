"""Prompts of the draft benchmark's data folder: gsm8k/, mtbench/ and selfinstruct/ (jsonl.gz)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Prompts:
    """Prompts under the target's chat template, as token ids.

    Args:
        longest: in tokens; longer ones are left out.
    """

    def __init__(self, folder: Path, tokenizer: Any, longest: int) -> None:
        self.folder, self.tokenizer, self.longest = folder, tokenizer, longest

    def train(self) -> list[list[int]]:
        """GSM8K's training questions with the self-instruct prompts among them."""
        questions = [row["question"] for row in self._rows("gsm8k/train")]
        broad = [
            "\n".join(filter(None, (row["instruction"], row["instances"][0]["input"])))
            for name in ("selfinstruct/seed_tasks", "selfinstruct/user_oriented_instructions")
            for row in self._rows(name)
        ]
        step = max(1, len(questions) // len(broad))
        mixed: list[str] = []
        for index, text in enumerate(broad):
            mixed += [text, *questions[index * step : (index + 1) * step]]
        return self._encode(mixed + questions[len(broad) * step :])

    def gsm8k(self) -> list[list[int]]:
        """Held-out GSM8K questions."""
        return self._encode([row["question"] for row in self._rows("gsm8k/test")])

    def mtbench(self) -> list[list[int]]:
        """First turns of MT-bench."""
        return self._encode([row["turns"][0] for row in self._rows("mtbench/question")])

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
