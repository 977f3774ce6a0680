"""Prompts of the draft benchmark: of its data folder (gsm8k/, mbpp/, mtbench/, selfinstruct/), and the target's own."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.batched_generation import BatchedLlama

_HELD_OUT = (120, 40)
"""GSM8K questions and self-instruct prompts that are kept aside for choosing recipes."""
_MBPP_TRAIN = range(601, 975)
_WRITTEN = (6, 120)
"""Tokens of a prompt that the target has written."""
_MARK = "THE USER'S TEXT"


class Prompts:
    """Prompts under the target's chat template, as token ids.

    Args:
        longest: in tokens; longer ones are left out.
    """

    def __init__(self, folder: Path, tokenizer: Any, longest: int) -> None:
        self.folder, self.tokenizer, self.longest = folder, tokenizer, longest

    def questions(self) -> list[list[int]]:
        """GSM8K's training questions, without those of `development`."""
        return self._encode(self._questions()[: -_HELD_OUT[0]])

    def broad(self) -> list[list[int]]:
        """Self-instruct prompts, without those of `development`, and MBPP's training tasks."""
        tasks = [row["text"] for row in self._rows("mbpp/mbpp") if row["task_id"] in _MBPP_TRAIN]
        return self._encode(self._broad()[: -_HELD_OUT[1]] + tasks)

    def written(self, count: int, sampler: BatchedLlama) -> list[list[int]]:
        """Prompts that the target writes itself, given the beginning of a user's turn alone (arXiv 2406.08464)."""
        opening, closing = self._frame()
        found: dict[tuple[int, ...], None] = {}
        for _ in range(-(-count // sampler.rows)):
            for response in sampler.generate([opening] * min(sampler.rows, count), 1.0, longest=_WRITTEN[1] + 1):
                text = response.tokens[:-1]
                # One that does not end is no question, one of two words hardly.
                if response.tokens[-1] == sampler.eos_id and _WRITTEN[0] <= len(text) <= _WRITTEN[1]:
                    found[text] = None
        return [[*opening, *text, *closing] for text in list(found)[:count]]

    def _frame(self) -> tuple[list[int], list[int]]:
        """Ids before and after a user's text."""
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], add_generation_prompt=True, tokenize=False
        )
        before, _, after = text.partition(_MARK)
        return tuple(self.tokenizer.encode(part, add_special_tokens=False) for part in (before, after))

    def development(self) -> list[list[int]]:
        """Training prompts that are kept aside: recipes are chosen by them, and never by the test sets."""
        questions, broad = self._questions()[-_HELD_OUT[0] :], self._broad()[-_HELD_OUT[1] :]
        ratio = _HELD_OUT[0] // _HELD_OUT[1]
        mixed = [text for i, one in enumerate(broad) for text in (one, *questions[i * ratio : (i + 1) * ratio])]
        return self._encode(mixed)

    def gsm8k(self) -> list[list[int]]:
        """Held-out GSM8K questions."""
        return self._encode([row["question"] for row in self._rows("gsm8k/test")])

    def examples(self, num_tokens: int) -> list[int]:
        """The first ids of solved training questions, as they stand before a question that is to be answered alike."""
        # Each has more than fifty tokens.
        rows = self._rows("gsm8k/train")[: num_tokens // 50 + 1]
        text = "\n\n".join(f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows)
        return self.tokenizer.encode(text, add_special_tokens=False)[:num_tokens]

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
