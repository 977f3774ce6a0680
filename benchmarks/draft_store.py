"""What a draft benchmark has finished, on disk: a JSON file a case, trajectories, drafts; and all rows merged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.batched_generation import Response
from unmask.checkpoints import load_draft, save_draft
from unmask.files import atomic_path, write_json
from unmask.models.dflash import DFlashDraft

FIELDS = frozenset({
    "trainer", "recipe", "seed", "gpu_minutes", "tokens_seen", "samples_per_second", "mfu", "temperature", "eval_set",
    "acceptance_length", "acceptance_by_position",
})  # fmt: skip
"""Every row has them; None where a baseline has no such figure."""


class Store:
    """A folder that goes from one call to the next.

    Args:
        folder: small files; a copy of it is enough to go on.
        out: where the merged rows go.
    """

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder, self.out = folder, out
        (folder / "cases").mkdir(parents=True, exist_ok=True)
        self._responses: dict[str, list[Response]] = {}

    def done(self, case: str) -> dict[str, Any] | None:
        """What a finished case left; None if it has not finished."""
        path = self.folder / "cases" / f"{case}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def finish(self, case: str, rows: Sequence[Mapping[str, Any]], notes: Mapping[str, Any]) -> None:
        """Keep a case, and write all rows anew.

        Raises:
            ValueError: a row lacks a field.
        """
        for row in rows:
            if missing := FIELDS - row.keys():
                raise ValueError(f"rows of '{case}' lack {sorted(missing)}")
        write_json(self.folder / "cases" / f"{case}.json", {"rows": list(rows), "notes": dict(notes)})
        self.merge()

    def merge(self) -> None:
        """Rows of all cases in `out`, and the notes beside it."""
        cases = {path.stem: json.loads(path.read_text()) for path in sorted((self.folder / "cases").glob("*.json"))}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.out, [{"case": name} | row for name, case in cases.items() for row in case["rows"]])
        write_json(self.out.with_suffix(".run.json"), {name: case["notes"] for name, case in cases.items()})

    def keep_draft(self, name: str, draft: DFlashDraft) -> None:
        """Keep a draft (bfloat16)."""
        save_draft(draft, self.folder / "drafts" / name, None)

    def draft(self, name: str) -> DFlashDraft:
        """A kept draft, float32."""
        return load_draft(self.folder / "drafts" / name)

    @property
    def names(self) -> list[str]:
        """Sets of responses that are kept."""
        return sorted(path.stem for path in (self.folder / "responses").glob("*.npz"))

    def keep_responses(self, sets: Mapping[str, Sequence[Response]]) -> None:
        """Keep sets of responses: ids below 2**16 one after another, and lengths."""
        (self.folder / "responses").mkdir(exist_ok=True)
        for name, responses in sets.items():
            parts = [part for r in responses for part in (r.prompt, r.tokens, r.beyond)]
            lengths = np.array([len(part) for part in parts], np.uint16)
            with atomic_path(self.folder / "responses" / f"{name}.npz") as path, path.open("wb") as file:
                np.savez_compressed(file, ids=np.array([i for p in parts for i in p], np.uint16), lengths=lengths)

    def responses(self, name: str) -> list[Response]:
        """A kept set of responses."""
        if name not in self._responses:
            with np.load(self.folder / "responses" / f"{name}.npz") as kept:
                ids, ends = kept["ids"].tolist(), np.cumsum(kept["lengths"], dtype=np.int64).tolist()
            parts = [tuple(ids[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
            self._responses[name] = [Response(*parts[i : i + 3]) for i in range(0, len(parts), 3)]
        return self._responses[name]
